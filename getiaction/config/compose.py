"""Stand between Hydra and the entry points: find `conf/`, type the config, and explain mistakes in one message."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from getiaction.config.folders import run_folder
from getiaction.config.help import help_text
from getiaction.config.schema import Config
from getiaction.config.sweep import in_sweep, sweep_folder
from getiaction.errors import InputError, exit_with_message, stop
from getiaction.startup import hold_collector

_PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The config tree: inside the installed wheel, or beside the package in a checkout."""

ALIASES = {  # names of LeRobot, Lightning and the seed document -> ours
    "learning_rate": "optimizer.lr",
    "optimizer_lr": "optimizer.lr",
    "optimizer_betas": "optimizer.betas",
    "optimizer_eps": "optimizer.eps",
    "optimizer_weight_decay": "optimizer.weight_decay",
    "scheduler_name": "lr_scheduler.name",
    "scheduler_warmup_steps": "lr_scheduler.num_warmup_steps",
    "train_batch_size": "training.batch_size",
    "gradient_clip_val": "training.max_grad_norm",
    "accumulate_grad_batches": "training.gradient_accumulation_steps",
    "log_every_n_steps": "training.log_every",
    "enable_checkpointing": "training.save_every",
    "check_val_every_n_epoch": "validation.every",
    "precision": "hardware.mixed_precision",
    "accelerator": "hardware.device",
    "devices": "hardware.num_processes",
    "strategy": "hardware.num_processes",
    "sync_batchnorm": "hardware.sync_batch_norm",
    "vision_backbone": "backbone.resnet",
    "pretrained_backbone_weights": "backbone.weights",
    "use_group_norm": "backbone.norm",
    "spatial_softmax_num_keypoints": "backbone.num_keypoints",
    "crop_ratio": "backbone.crop_shape",
    "noise_scheduler_type": "scheduler",
    "normalization_mapping": "policy.normalization",
    "compile_model": "hardware.compile",
}


def main(run: Callable[[Any], Any], config_name: str, schema: type[Any] = Config) -> Any:
    """Run an entry point under Hydra; a mistake in the input is printed as one message and exits with 2.

    Args:
        run: the entry point; takes the typed config.
        config_name: the root of its config, `conf/<config_name>.yaml`.
        schema: the dataclass that types it.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(CONF_DIR, config_name))
        return None
    hold_collector()
    import hydra

    register_resolvers()
    began = False

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)
    def entry(composed: DictConfig) -> Any:
        nonlocal began
        began = True
        with contextlib.nullcontext() if in_sweep() else exit_with_message():  # one that fails does not end the others
            return run(to_config(composed, config_name, schema))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the handler below instead of Hydra's printer
    try:
        with exit_with_message():
            check_choices([item for item in sys.argv[1:] if "=" in item and item[0] != "-"], config_name)
            return entry()
    except (HydraException, OmegaConfBaseException) as error:
        stop(explain(error, config_name), code=2)
    except OSError as error:
        if began:
            raise
        stop(f"output_dir cannot be made ({error}): give a folder that can be written to, output_dir=<folder>", code=2)


def to_config[Schema](composed: DictConfig, config_name: str, schema: type[Schema]) -> Schema:
    """Check a composed config against the schema and return it as plain typed objects.

    Raises:
        InputError: a key that does not exist, or a value of the wrong type or none at all.
    """
    register_resolvers()
    try:
        plain = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key}= is needed{key_comment(config_name, str(error.full_key))}") from error
    except OmegaConfBaseException as error:
        text = explain(error, config_name)
        named = getattr(error, "full_key", None) or text.startswith("training.resume")
        raise InputError(text if named else f"{find_culprit(composed, schema)}: {text}") from error
    assert isinstance(typed, schema)
    return typed


def key_comment(config_name: str, key: str) -> str:
    """Return ": " and the comment above a key of a root config; nothing for a key that is not there."""
    lines = (CONF_DIR / f"{config_name}.yaml").read_text().splitlines()
    comments = (comment for comment, line in pairwise(lines) if line.startswith(f"{key}:") and comment[:1] == "#")
    return next((f": {comment.removeprefix('# ')}" for comment in comments), "")


def find_culprit(composed: DictConfig, schema: type[Any]) -> str:
    """Return the dotted key whose value does not fit the schema, where OmegaConf's error does not name it."""
    sections = {str(key): value for key, value in composed.items()}
    pairs = [(key, name) for key, value in sections.items() if isinstance(value, DictConfig) for name in value]
    for key, name in pairs:
        try:
            OmegaConf.merge(OmegaConf.structured(schema), {key: {str(name): sections[key][name]}})
        except OmegaConfBaseException:
            return f"{key}.{name!s}"
    return "the config"


def compose(overrides: list[str]) -> Config:
    """Compose a config as the command line would: `compose(["+preset=pusht_cpu", "seed=1"])`.

    Raises:
        InputError: an override that cannot work.
    """
    import hydra

    register_resolvers()
    GlobalHydra.instance().clear()
    check_choices(overrides, "train")
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_config(hydra.compose("train", overrides=overrides), "train", Config)
    except HydraException as error:
        raise InputError(explain(error, "train")) from error


def check_choices(overrides: list[str], config_name: str) -> None:
    """Check that what is chosen of a group is a name: Hydra answers `unet=3` with a traceback.

    Raises:
        InputError: it is a number, null, or a list.
    """
    groups = groups_of(config_name)
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:  # Hydra says it again
            continue
        name = override.key_or_group
        if name in groups and not (override.is_delete() or override.is_sweep_override()):
            value = override.value()
            if not isinstance(value, str):
                choices = sorted(path.stem for path in (CONF_DIR / name).glob("*.yaml"))
                raise InputError(f"{text} chooses no {name}: the choices are {', '.join(choices)}")


def explain(error: Exception, config_name: str) -> str:
    """Turn Hydra's or OmegaConf's message into one that names the key and the nearest that exists."""
    if isinstance(error, OverrideParseException):
        return f"the override {error.override} cannot be read: write key=value, and lists in quotes, key='[1,2]'"
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error))
    if found := re.search(r"Could not find '([\w/.-]+)/([\w.-]+)'", text):
        group, choice = found.groups()
        choices = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
        return f"{group}={choice} does not exist: {nearest(choice, choices)}the choices are {', '.join(choices)}"
    missing_key = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    if missing_key and (name := missing_key.group(1)) in groups_of(config_name):
        choices = sorted(path.stem for path in (CONF_DIR / name).glob("*.yaml"))
        return f"{name}= needs a plus: +{name}=<choice>, one of {', '.join(choices)}"
    if missing_key:
        key = getattr(error, "full_key", None) or missing_key.group(1)
        if having := choices_with(key, config_name):
            group = key.split(".")[0]
            return f"{key} is not in the {group} that is chosen: choose one that has it, {group}=<{'|'.join(having)}>"
        if key in known_keys(config_name) and key.count(".") > 2:  # mirror.features.observation.state.order
            group, part, *names, last = key.split(".")
            whole = f"'{group}.{part}={{{'.'.join(names)}: {{{last}: ...}}}}'"
            return f"{key} has a name with a dot in it, or is not in the {group} that is chosen: write {whole}"
        return f"{key} does not exist: {nearest(key, known_keys(config_name))}--cfg job shows every key"
    full_key = None if text.startswith("training.resume") else getattr(error, "full_key", None)
    first = text.splitlines()[0] if text else type(error).__name__
    return f"{full_key}: {first}" if full_key else first


def choices_with(key: str, config_name: str) -> list[str]:
    """Return the choices of a dotted key's group that have the key."""
    group, *path = key.split(".")
    if len(path) != 1 or group not in groups_of(config_name):
        return []
    files = sorted((CONF_DIR / group).glob("*.yaml"))
    return [file.stem for file in files if f"\n{path[0]}:" in file.read_text()]


def nearest(name: str, known: list[str]) -> str:
    """Return "did you mean ...? ", or nothing if no known name is near."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ALIASES:
        return f"did you mean {ALIASES[leaf]}? "
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
    near_leaf = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)
    near_name = difflib.get_close_matches(name, [key for key in known if not name.startswith(key)], n=1, cutoff=0.7)
    close = [by_leaf[match] for match in near_leaf] or near_name
    return f"did you mean {close[0]}? " if close else ""


@cache
def known_keys(config_name: str = "train") -> list[str]:
    """Return every key of an entry point's config tree, dotted."""
    keys: set[str] = set()

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                keys.add(f"{prefix}{key}")
                walk(f"{prefix}{key}.", value)

    root = CONF_DIR / f"{config_name}.yaml"
    for path in (root, *(path for group in groups_of(config_name) for path in (CONF_DIR / group).glob("*.yaml"))):
        content = read_yaml(path) or {}
        group = path.parent.relative_to(CONF_DIR)
        is_root = path == root or group.name == "preset"
        walk(
            "" if is_root else f"{group.name}.",
            {key: value for key, value in content.items() if key not in ("defaults", "hydra")},
        )
    return sorted(key for key in keys if not key.rsplit(".", 1)[-1].startswith("_"))


@cache
def groups_of(config_name: str) -> list[str]:
    """Return the config groups of an entry point, as its defaults list names them; training has presets, too."""
    defaults = read_yaml(CONF_DIR / f"{config_name}.yaml").get("defaults", [])
    named = [group for entry in defaults if isinstance(entry, dict) for group in entry]
    return ["preset", *named] if config_name == "train" else named


def read_yaml(path: Path) -> Any:
    """Read a file as `yaml.safe_load` does; where PyYAML has its C library, ten times as fast."""
    text = path.read_text()
    return yaml.load(text, yaml.CSafeLoader) if yaml.__with_libyaml__ else yaml.safe_load(text)


def register_resolvers() -> None:
    """Register the resolvers that name the run folder, and what comes with the package."""
    OmegaConf.register_new_resolver("getiaction_run_folder", run_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("getiaction_sweep_folder", sweep_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("getiaction_packaged", lambda path: str(_PACKAGE / path), replace=True)
