"""Say a file of the format as overrides of the config here: one way in, and the same training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from getiaction.config.lightning import keys
from getiaction.config.lightning.arguments import Arguments
from getiaction.config.lightning.mend import mend
from getiaction.config.lightning.trainer import set_trainer, set_validation
from getiaction.config.lightning.translation import Translation, check_names, choice
from getiaction.config.lightning.values import read_values
from getiaction.data.metadata import DatasetMetadata, find_dataset
from getiaction.errors import InputError
from getiaction.run_folder import CHECKPOINTS


def translate(arguments: Arguments) -> Translation:
    """Translate the content of a command line.

    Raises:
        InputError: an unknown key (with the nearest that exists), an impossible value, or no such dataset; with
            `strict`, what contradicts itself.
    """
    content = arguments.content
    check_names("", content, dict.fromkeys(keys.SECTIONS))
    for name in ("model", "data", "trainer", "getiaction"):
        check_mapping(name, content.get(name))
    found = Translation()
    if arguments.files and content.get("ckpt_path") is None:  # a run that goes on has its name
        found.set("name", re.sub(r"[^A-Za-z0-9_.-]", "_", arguments.files[-1].stem), "--config")
    model = read_model(content.get("model") or {}, found)
    data = read_section("data", content.get("data") or {}, keys.DATA_CLASSES)
    check_names("data.init_args.", data, {**keys.DATA, **keys.DATA_SPECIAL, **keys.DATA_WITHOUT_EFFECT})
    data = read_values("data.init_args", data)
    trainer = content.get("trainer") or {}
    check_names("trainer.", trainer, {**keys.TRAINER, **keys.TRAINER_SPECIAL, **keys.TRAINER_WITHOUT_EFFECT})
    trainer = read_values("trainer", trainer)

    set_data(data, found)
    metadata = find_dataset(found.values["dataset.repo_id"], data.get("root"), data.get("revision"))
    mended = mend(model, data.get("delta_timestamps"), metadata)
    found.changed += mended.lines
    set_model(mended.values, metadata, found)
    set_trainer(trainer, found)
    if dormant := [name for name in keys.DORMANT if name in model]:
        found.notes.append(f"in effect here, only read by the first GetiAction: {', '.join(dormant)}")
    found.notes.append("averaged weights (EMA) are validated and saved; --getiaction.ema.enabled=false does without")
    set_rest(content, found)
    set_validation(trainer, data, mended.values, metadata, found)
    if arguments.strict and found.changed:
        raise InputError(
            "--strict: this contradicts itself, and runs as follows without --strict:\n       "
            + "\n       ".join(found.changed)
        )
    return found


def read_section(section: str, content: dict[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the `init_args` of a section, after a look at its class."""
    path = content.get("class_path")
    if path is not None and str(path).rsplit(".", 1)[-1] not in classes:
        raise InputError(f"{section}.class_path={path} has no equal here: there is {' and '.join(classes)}")
    check_mapping(f"{section}.init_args", content.get("init_args"))
    return dict(content.get("init_args") or {})


def check_mapping(name: str, value: Any) -> None:
    """Refuse a section that holds no keys."""
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{name}={value} must hold keys, {name}: {{key: value}}")


def read_model(content: dict[str, Any], found: Translation) -> dict[str, Any]:
    """Return `model.init_args` with one name for each thing, and list what has no effect."""
    given = read_section("model", content, keys.POLICY_CLASSES)
    known = {**keys.MODEL, **keys.MODEL_SPECIAL, **keys.MODEL_WITHOUT_EFFECT}
    check_names("model.init_args.", given, known)
    model = read_values("model.init_args", given)
    if (policy := model.pop("policy_name", "diffusion")) != "diffusion":
        raise InputError(f"model.init_args.policy_name={policy} has no equal here: there is diffusion")
    inner = model.pop("config_kwargs", {})
    check_names("model.init_args.config_kwargs.", inner, known)
    for key, value in read_values("model.init_args", inner).items():
        if model.get(key, value) != value:
            found.changed.append(f"{key} {model[key]} -> {value}: config_kwargs says so")
        model[key] = value
    rate = model.pop("optimizer_lr", None)
    if rate is not None and model.setdefault("learning_rate", rate) != rate:
        found.changed.append(f"optimizer_lr {rate} -> {model['learning_rate']}: learning_rate says so")
    ratio, resize = model.pop("crop_ratio", None), model.get("resize_shape")
    if resize is not None and "crop_shape" not in model:  # as in LeRobot: what was resized is cropped by a ratio only
        model["crop_shape"] = [int(side * ratio) for side in resize] if ratio is not None and ratio < 1 else None
    elif ratio is not None and ratio < 1:
        found.left_out.append("model.init_args.crop_ratio: a share of resize_shape alone, without crop_shape")
    for key, why in keys.MODEL_WITHOUT_EFFECT.items():
        if model.get(key) is not None:
            found.left_out.append(f"model.init_args.{key}: {why}")
    return model


def set_model(model: dict[str, Any], metadata: DatasetMetadata, found: Translation) -> None:
    """Set what the model says; the class's own defaults where it says nothing."""
    said = {**keys.MODEL_DEFAULTS, **model}
    scheduler = str(said.get("noise_scheduler_type", "DDPM")).lower()
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
    mapping = said.get("normalization_mapping", {})
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
        named = [name for name, key in {**keys.MODEL, **keys.MODEL_SPECIAL}.items() if str(key).startswith("backbone.")]
        if given := [name for name in named if name in model]:
            found.left_out.append(f"model.init_args.{', '.join(given)}: the dataset has no pictures")
        found.values = {"backbone": "none", **{k: v for k, v in found.values.items() if not k.startswith("backbone")}}


def set_data(data: dict[str, Any], found: Translation) -> None:
    """Set what the data section says."""
    for name, key in keys.DATA.items():
        if name in data:
            found.set(key, data[name], f"data.init_args.{name}")
    found.values.setdefault("training.batch_size", keys.DATA_DEFAULTS["train_batch_size"])
    if not (data.get("repo_id") or data.get("root")):
        raise InputError("data.init_args.repo_id is needed: the dataset's name on the Hub, or root: its folder")
    found.values.setdefault("dataset.repo_id", f"local/{Path(str(data.get('root'))).name}")
    env = "pusht" if "pusht" in str(data.get("repo_id")) else "none"
    for name in ("val_gyms", "test_gyms"):
        gyms = data.get(name, [])
        for gym in gyms if isinstance(gyms, list) else [gyms]:
            path = gym.get("class_path") if isinstance(gym, dict) else gym
            env = choice(f"data.init_args.{name}", str(path).rsplit(".", 1)[-1], keys.GYMS)
            if isinstance(gym, dict) and gym.get("init_args"):
                found.left_out.append(f"data.init_args.{name}.init_args: --getiaction.env sets the simulator's keys")
    found.set("env", env, "data.init_args.val_gyms")
    if env == "none":
        found.values.pop("env.max_steps", None)
    if "num_rollouts_test" in data:
        found.notes.append("data.init_args.num_rollouts_test: `getiaction test` rolls so many out")
    for key, why in keys.DATA_WITHOUT_EFFECT.items():
        if key in data:
            found.left_out.append(f"data.init_args.{key}: {why}")


def set_rest(content: dict[str, Any], found: Translation) -> None:
    """Set the seed, the run to go on with, and what is said in our own words, which holds."""
    seed = content.get("seed_everything")
    if isinstance(seed, bool):
        found.notes.append(f"seed_everything={str(seed).lower()}: every run here has a seed, 0 unless given")
    elif seed is not None:
        found.set("seed", seed, "seed_everything")
    if content.get("ckpt_path") is not None:
        found.set("training.resume", run_of(str(content["ckpt_path"])), "ckpt_path")

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and f"{prefix}{key}" != "dataset.delta_timestamps":
                walk(f"{prefix}{key}.", value)
            else:
                found.values[f"{prefix}{key}"] = value

    walk("", content.get("getiaction") or {})


def run_of(checkpoint: str) -> str:
    """Return the run folder of a checkpoint; what is none is left to the check of `training.resume`.

    Raises:
        InputError: it is a file of Lightning's.
    """
    path = Path(checkpoint)
    if path.suffix == ".ckpt":
        raise InputError(
            f"ckpt_path={checkpoint} is a file of Lightning's, a pickle, which is never opened here: give a run "
            "folder, or start from LeRobot's weights with --getiaction.training.init_from"
        )
    return str(next((parent.parent for parent in (path, *path.parents) if parent.name == CHECKPOINTS), path))
