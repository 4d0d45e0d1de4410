"""Say a file of the format as overrides of the config here: one way in, and the same training."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from getiaction.config.lightning import keys
from getiaction.config.lightning.arguments import Arguments
from getiaction.config.lightning.mend import mend
from getiaction.data.metadata import DatasetMetadata, find_dataset
from getiaction.data.statistics import split_episodes
from getiaction.errors import InputError


@dataclass
class Translation:
    """Hold what a file means here.

    Args:
        values: key of the config here -> value; groups (`scheduler`, `env`, ...) -> their choice.
        sources: key here -> key of the file that said so.
        changed: what contradicted itself, and how it was mended.
        left_out: what has no effect here, and why.
        notes: what is otherwise here, and no contradiction.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, source: str) -> None:
        """Set a key, remembering what said so."""
        self.values[key] = value
        self.sources[key] = source

    @property
    def overrides(self) -> list[str]:
        """Return the overrides, groups first, as Hydra takes them."""
        groups = [key for key in self.values if key in GROUPS]
        return [
            f"{key}={quote(self.values[key])}"
            for key in [*groups, *(set_ for set_ in self.values if set_ not in GROUPS)]
        ]


GROUPS = ("backbone", "unet", "scheduler", "optimizer", "dataset", "hardware", "env", "tracker")


def translate(arguments: Arguments) -> Translation:
    """Translate the content of a command line.

    Raises:
        InputError: an unknown key (with the nearest that exists), an impossible value, or no such dataset; with
            `strict`, what contradicts itself.
    """
    content = arguments.content
    check_names("", content, dict.fromkeys(keys.SECTIONS))
    found = Translation()
    if arguments.files:
        found.set("name", re.sub(r"[^\w.-]", "_", arguments.files[-1].stem) or "fit", "--config")
    model = read_model(content.get("model") or {}, found)
    data = read_section("data", content.get("data") or {}, keys.DATA_CLASSES)
    check_names("data.init_args.", data, {**keys.DATA, **keys.DATA_SPECIAL, **keys.DATA_WITHOUT_EFFECT})
    trainer = content.get("trainer") or {}
    check_names("trainer.", trainer, {**keys.TRAINER, **keys.TRAINER_SPECIAL, **keys.TRAINER_WITHOUT_EFFECT})

    set_data(data, found)
    metadata = find_dataset(data.get("repo_id") or "local", data.get("root"), data.get("revision"))
    mended = mend(model, data.get("delta_timestamps"), metadata)
    found.changed += mended.lines
    set_model(mended.values, metadata, found)
    set_trainer(trainer, found)
    if dormant := [name for name in keys.DORMANT if name in model]:
        found.notes.append(f"{', '.join(dormant)} take effect here; the first GetiAction read them and left it at that")
    found.notes.append("averaged weights (EMA) are validated and saved; --getiaction.ema.enabled=false does without")
    set_rest(content, found)
    set_validation(trainer, mended.values, metadata, found)
    if arguments.strict and found.changed:
        raise InputError(
            "--strict: this contradicts itself, and runs as follows without --strict:\n       "
            + "\n       ".join(found.changed)
        )
    return found


def check_names(prefix: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse keys that do not exist, naming the nearest that does."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{prefix}{name} does not exist: {hint}")


def read_section(section: str, content: Any, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the `init_args` of a section, after a look at its class."""
    if not isinstance(content, dict):
        raise InputError(f"{section}={content} must be class_path: and init_args:")
    path = content.get("class_path")
    if path is not None and str(path).rsplit(".", 1)[-1] not in classes:
        raise InputError(f"{section}.class_path={path} has no equal here: there is {' and '.join(classes)}")
    return dict(content.get("init_args") or {})


def read_model(content: Any, found: Translation) -> dict[str, Any]:
    """Return `model.init_args` with our names for those that have two, and what has no effect listed."""
    model = read_section("model", content, keys.POLICY_CLASSES)
    policy = model.pop("policy_name", "diffusion")
    if policy != "diffusion":
        raise InputError(f"model.init_args.policy_name={policy} has no equal here: there is diffusion")
    model |= model.pop("config_kwargs", None) or {}
    check_names("model.init_args.", model, {**keys.MODEL, **keys.MODEL_SPECIAL, **keys.MODEL_WITHOUT_EFFECT})
    rate = model.pop("optimizer_lr", None)
    if rate is not None and model.setdefault("learning_rate", rate) != rate:
        found.changed.append(f"optimizer_lr {rate} -> {model['learning_rate']}: learning_rate says so")
    ratio = model.pop("crop_ratio", None)
    if ratio is not None and model.get("resize_shape") is not None:
        shape = [int(side * ratio) for side in model["resize_shape"]] if ratio < 1 else None
        model["crop_shape"] = shape
    for key, why in keys.MODEL_WITHOUT_EFFECT.items():
        if model.get(key) is not None:
            found.left_out.append(f"model.init_args.{key}: {why}")
    return model


def set_model(model: dict[str, Any], metadata: DatasetMetadata, found: Translation) -> None:
    """Set what the model says; the class's own defaults where it says nothing."""
    said = {**keys.MODEL_DEFAULTS, **model}
    scheduler = str(said.get("noise_scheduler_type") or "DDPM").lower()
    if scheduler not in ("ddpm", "ddim"):
        raise InputError(f"model.init_args.noise_scheduler_type={said['noise_scheduler_type']} must be DDPM or DDIM")
    found.set("scheduler", scheduler, "model.init_args.noise_scheduler_type")
    for name, key in keys.MODEL.items():
        if name in said:
            found.set(key, said[name], f"model.init_args.{name}")
    if "use_group_norm" in said:
        found.set("backbone.norm", "group" if said["use_group_norm"] else "batch", "model.init_args.use_group_norm")
    if (weights := said.get("pretrained_backbone_weights")) is not None:
        found.set("backbone.weights", str(weights).rsplit(".", 1)[-1], "model.init_args.pretrained_backbone_weights")
    if said.get("use_amp"):
        found.set("hardware.mixed_precision", "auto", "model.init_args.use_amp")
    kinds = {"VISUAL": "visual", "STATE": "state", "ENV": "env", "ACTION": "action"}
    mapping = said.get("normalization_mapping") or {}
    check_names("model.init_args.normalization_mapping.", mapping, kinds)
    for kind, mode in mapping.items():
        source = f"model.init_args.normalization_mapping.{kind}"
        found.set(f"policy.normalization.{kinds[kind]}", str(mode).rsplit(".", 1)[-1].lower(), source)
    if said.get("input_features"):
        found.set("dataset.observations", list(said["input_features"]), "model.init_args.input_features")
    if said.get("pretrained_path"):
        revision = f"@{said['pretrained_revision']}" if said.get("pretrained_revision") else ""
        found.set("training.init_from", f"{said['pretrained_path']}{revision}", "model.init_args.pretrained_path")
    if not metadata.cameras:
        found.changed.append("vision_backbone none: the dataset has no pictures")
        found.values = {"backbone": "none", **{k: v for k, v in found.values.items() if not k.startswith("backbone")}}


def set_data(data: dict[str, Any], found: Translation) -> None:
    """Set what the data section says."""
    for name, key in keys.DATA.items():
        if name in data:
            found.set(key, data[name], f"data.init_args.{name}")
    found.values.setdefault("training.batch_size", keys.DATA_DEFAULTS["train_batch_size"])
    if not (data.get("repo_id") or data.get("root")):
        raise InputError("data.init_args.repo_id is needed: the dataset's name on the Hub, or root: its folder")
    gyms = [data[name] for name in ("val_gyms", "test_gyms") if data.get(name) is not None]
    classes = {str(gym.get("class_path") if isinstance(gym, dict) else gym).rsplit(".", 1)[-1] for gym in gyms}
    if unknown := classes - keys.GYMS.keys():
        raise InputError(
            f"data.init_args.val_gyms={', '.join(unknown)} has no equal here: there is {', '.join(keys.GYMS)}"
        )
    env = next((keys.GYMS[name] for name in classes), "pusht" if "pusht" in str(data.get("repo_id")) else "none")
    found.set("env", env, "data.init_args.val_gyms")
    if env == "none":
        found.values.pop("env.max_steps", None)
    for key, why in keys.DATA_WITHOUT_EFFECT.items():
        if data.get(key) is not None:
            found.left_out.append(f"data.init_args.{key}: {why}")


def set_trainer(trainer: dict[str, Any], found: Translation) -> None:
    """Set what the trainer says."""
    for name, key in keys.TRAINER.items():
        if name in trainer:
            found.set(key, trainer[name], f"trainer.{name}")
    steps, epochs = (found.values.get(f"training.{name}") for name in ("max_steps", "max_epochs"))
    steps, epochs = (None if value in (None, -1) else value for value in (steps, epochs))
    if steps is None and epochs is None:
        epochs = keys.LIGHTNING_MAX_EPOCHS
    found.values |= {"training.max_steps": steps, "training.max_epochs": epochs}
    if trainer.get("gradient_clip_val") == 0:
        found.values["training.max_grad_norm"] = None
    if trainer.get("gradient_clip_algorithm") not in (None, "norm"):
        raise InputError(f"trainer.gradient_clip_algorithm={trainer['gradient_clip_algorithm']}: there is norm only")
    if (precision := trainer.get("precision")) is not None:
        name = choice("trainer.precision", precision, keys.PRECISIONS)
        found.set("hardware.mixed_precision", name, "trainer.precision")
    if (accelerator := trainer.get("accelerator")) is not None:
        name = choice("trainer.accelerator", accelerator, keys.ACCELERATORS)
        found.set("hardware.device", name, "trainer.accelerator")
    set_devices(trainer, found)
    if trainer.get("enable_checkpointing") is False:
        found.set("training.save_every", None, "trainer.enable_checkpointing")  # the last one is always written
    logger = trainer.get("logger")
    for one in logger if isinstance(logger, list) else [logger]:
        if isinstance(one, dict):
            tracker = choice("trainer.logger", str(one.get("class_path")).rsplit(".", 1)[-1], keys.LOGGERS)
            found.set("tracker", tracker, "trainer.logger")
            if (project := (one.get("init_args") or {}).get("project")) is not None:
                found.set("tracker.project", project, "trainer.logger")
    for key, why in keys.TRAINER_WITHOUT_EFFECT.items():
        if trainer.get(key) is not None:
            found.left_out.append(f"trainer.{key}: {why}")


def set_devices(trainer: dict[str, Any], found: Translation) -> None:
    """Set the number of processes: one for each device."""
    devices, strategy = trainer.get("devices"), trainer.get("strategy", "auto")
    if strategy not in keys.STRATEGIES:
        raise InputError(f"trainer.strategy={strategy} has no equal here: there is {', '.join(keys.STRATEGIES)}")
    if devices is None:
        return
    if devices in ("auto", -1, "-1"):
        import torch

        count = 1 if trainer.get("accelerator") == "cpu" else max(torch.cuda.device_count(), 1)
    elif isinstance(devices, list):
        count = len(devices)
        found.left_out.append(f"trainer.devices={devices}: {count} of them; CUDA_VISIBLE_DEVICES chooses which")
    elif str(devices).isdigit() and int(devices) > 0:
        count = int(devices)
    else:
        raise InputError(f"trainer.devices={devices} must be a number, a list or auto")
    found.set("hardware.num_processes", count, "trainer.devices")


def set_validation(
    trainer: dict[str, Any], model: dict[str, Any], metadata: DatasetMetadata, found: Translation
) -> None:
    """Say in optimiser steps when to validate."""
    if "validation.every" in found.values:
        return
    interval, epochs = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch")
    accumulation = found.values.get("training.gradient_accumulation_steps", 1)
    if isinstance(interval, int) and not isinstance(interval, bool):
        found.set("validation.every", max(interval // accumulation, 1), "trainer.val_check_interval")
    elif interval is not None or epochs is not None:
        share = (interval if interval is not None else 1) * (epochs if epochs is not None else 1)
        if not isinstance(share, int | float) or share <= 0:
            raise InputError(f"trainer.check_val_every_n_epoch={epochs} must be a whole number of at least 1")
        batch = found.values["training.batch_size"] * accumulation * found.values.get("hardware.num_processes", 1)
        steps = max(math.ceil(share * count_samples(model, metadata, found.values) / batch), 1)
        found.set("validation.every", steps, "trainer.check_val_every_n_epoch")


def count_samples(model: Mapping[str, Any], metadata: DatasetMetadata, values: Mapping[str, Any]) -> int:
    """Return how many samples an epoch has."""
    dropped = model.get("drop_n_last_frames")
    if dropped is None:
        dropped = model.get("horizon", 16) - model.get("n_action_steps", 8) - model.get("n_obs_steps", 2) + 1
    chosen = values.get("dataset.episodes")
    train, _ = split_episodes(
        list(metadata.episode_indices if chosen is None else chosen),
        val_fraction=values.get("dataset.val_fraction", 0.05),
        val_episodes=values.get("dataset.val_episodes"),
        seed=values.get("seed", 0),
    )
    return sum(max(int(row["length"]) - dropped, 0) for row in metadata.rows_of(train))


def set_rest(content: dict[str, Any], found: Translation) -> None:
    """Set the seed, the run to go on with, and what is said in our own words."""
    seed = content.get("seed_everything")
    if seed is not None and not isinstance(seed, bool):
        found.set("seed", seed, "seed_everything")
    if content.get("ckpt_path") is not None:
        found.set("training.resume", str(content["ckpt_path"]), "ckpt_path")

    def walk(prefix: str, node: Any) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and f"{prefix}{key}" not in ("dataset.delta_timestamps",):
                walk(f"{prefix}{key}.", value)
            else:
                found.set(f"{prefix}{key}", value, f"getiaction.{prefix}{key}")

    walk("", content.get("getiaction") or {})


def choice(name: str, value: Any, choices: Mapping[str, str]) -> str:
    """Return what a value is called here.

    Raises:
        InputError: it is none of those that exist.
    """
    if str(value) not in choices:
        raise InputError(f"{name}={value} must be one of {', '.join(choices)}")
    return choices[str(value)]


def quote(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(quote(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{quote(item)}' for key, item in value.items())}}}"
    if isinstance(value, int | float) or re.fullmatch(r"[A-Za-z_][\w./-]*", str(value)):
        return str(value)
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
