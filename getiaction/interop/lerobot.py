"""Write and read policies as LeRobot policy folders (`config.json`, `model.safetensors`, processor files).

LeRobot 0.6's `DiffusionPolicy.from_pretrained` opens what `write_policy` writes. What its config cannot say goes into
`getiaction.json`, which LeRobot ignores and `load_policy` reads.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from getiaction.errors import InputError
from getiaction.keys import ACTION, OBS_ENV_STATE, OBS_STATE, is_camera
from getiaction.policy import ConditionalUnet1d, DiffusionPolicy, Features, ImageEncoder, Normalizer
from getiaction.policy.normalizer import EPS, Statistics

CONFIG, EXTRA, WEIGHTS = "config.json", "getiaction.json", "model.safetensors"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
PREPROCESSOR_STATE = f"{PREPROCESSOR}_step_3_normalizer_processor.safetensors"
POSTPROCESSOR_STATE = f"{POSTPROCESSOR}_step_0_unnormalizer_processor.safetensors"
FEATURE_TYPES = {"visual": "VISUAL", "state": "STATE", "env": "ENV", "action": "ACTION"}
LEROBOT_SCHEDULER_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "clip_sample",
    "clip_sample_range",
    "prediction_type",
)
LEROBOT_SCHEDULERS = {"DDPMScheduler": "DDPM", "DDIMScheduler": "DDIM"}


def write_policy(folder: Path, policy: DiffusionPolicy) -> None:
    """Write a policy folder: weights, config, normalisation, and `getiaction.json`."""
    folder.mkdir(parents=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in policy.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    write_json(folder / CONFIG, lerobot_config(policy))
    write_json(folder / EXTRA, describe(policy))
    statistics = {
        f"{key}.{name}": value.cpu().clone()
        for key, stats in policy.normalizer.statistics.items()
        for name, value in stats.items()
    }
    save_file(statistics, folder / PREPROCESSOR_STATE)
    save_file(statistics, folder / POSTPROCESSOR_STATE)
    write_json(folder / f"{PREPROCESSOR}.json", preprocessor(policy))
    write_json(folder / f"{POSTPROCESSOR}.json", postprocessor(policy))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=4))


# --- LeRobot's files --------------------------------------------------------------------------------------------------


def not_for_lerobot(policy: DiffusionPolicy) -> list[str]:
    """List what LeRobot's diffusion policy has no equal for; empty if it opens this one."""
    reasons = []
    scheduler = type(policy.noise_scheduler).__name__
    if scheduler not in LEROBOT_SCHEDULERS:
        reasons.append(f"scheduler {scheduler}")
    else:
        mine = policy.noise_scheduler.config
        theirs = type(policy.noise_scheduler)(**{key: mine[key] for key in LEROBOT_SCHEDULER_KEYS}).config
        differ = [key for key in theirs if not key.startswith("_") and mine[key] != theirs[key]]
        reasons += [f"scheduler.{key}={mine[key]}" for key in differ]
    if policy.prediction_type not in ("epsilon", "sample"):
        reasons.append(f"scheduler.prediction_type={policy.prediction_type}")
    if OBS_STATE not in policy.features.vectors:
        reasons.append("no observation.state")
    elif not policy.features.cameras and OBS_ENV_STATE not in policy.features.vectors:
        reasons.append("neither a camera nor observation.environment_state")
    if policy.horizon % 2 ** len(policy.diffusion.unet.down_dims):
        reasons.append(f"policy.horizon={policy.horizon} with {len(policy.diffusion.unet.down_dims)} U-Net levels")
    for encoder in policy.encoders[:1]:
        if crop_ratio(encoder) is None:
            reasons.append(f"backbone.crop_shape={encoder.crop_shape} of backbone.resize_shape={encoder.resize_shape}")
    return reasons


def crop_ratio(encoder: ImageEncoder) -> float | None:
    """Return a ratio from which LeRobot's `int(side * ratio)` gives the crop of a resized picture, if there is one."""
    if not encoder.resize_shape or not encoder.crop_shape:
        return 1.0
    ratio = max((crop + 0.01) / side for crop, side in zip(encoder.crop_shape, encoder.resize_shape, strict=True))
    same = tuple(int(side * ratio) for side in encoder.resize_shape) == encoder.crop_shape
    return min(ratio, 1.0) if same else None


def lerobot_config(policy: DiffusionPolicy) -> dict[str, Any]:
    """Return LeRobot's `config.json`; where LeRobot has no equal, another type in it makes LeRobot refuse."""
    features, unet, scheduler = policy.features, policy.diffusion.unet, policy.noise_scheduler.config
    encoder = policy.encoders[0] if policy.encoders else None
    foreign = bool(not_for_lerobot(policy))
    config = {
        "type": "getiaction_diffusion" if foreign else "diffusion",
        "n_obs_steps": policy.n_obs_steps,
        "input_features": {key: feature(key, features.shapes[key]) for key in features.observation_keys},
        "output_features": {ACTION: feature(ACTION, features.shapes[ACTION])},
        "device": "cpu",
        "use_amp": False,
        "push_to_hub": False,
        "horizon": policy.horizon,
        "n_action_steps": policy.n_action_steps,
        "normalization_mapping": normalization_mapping(policy),
        "drop_n_last_frames": max(policy.horizon - policy.n_action_steps - policy.n_obs_steps + 1, 0),
        "use_separate_rgb_encoder_per_camera": policy.use_separate_rgb_encoder_per_camera,
        "down_dims": list(unet.down_dims),
        "kernel_size": unet.kernel_size,
        "n_groups": unet.n_groups,
        "diffusion_step_embed_dim": unet.diffusion_step_embed_dim,
        "use_film_scale_modulation": unet.use_film_scale_modulation,
        "gradient_checkpointing": unet.gradient_checkpointing,
        "noise_scheduler_type": LEROBOT_SCHEDULERS.get(type(policy.noise_scheduler).__name__, "DDPM"),
        "num_train_timesteps": scheduler.num_train_timesteps,
        "beta_schedule": scheduler.beta_schedule,
        "beta_start": scheduler.beta_start,
        "beta_end": scheduler.beta_end,
        "prediction_type": scheduler.prediction_type,
        "clip_sample": scheduler.get("clip_sample", False),
        "clip_sample_range": scheduler.get("clip_sample_range", 1.0),
        "num_inference_steps": policy.num_inference_steps,
        "do_mask_loss_for_padding": policy.do_mask_loss_for_padding,
        "pretrained_backbone_weights": None,  # the weights are in the checkpoint: LeRobot would fetch them again
        "crop_shape": None,
    }
    if encoder is not None:
        config |= {
            "vision_backbone": encoder.resnet,
            "resize_shape": list(encoder.resize_shape) if encoder.resize_shape else None,
            "crop_ratio": crop_ratio(encoder) or 1.0,
            "crop_shape": list(encoder.crop_shape) if encoder.crop_shape else None,
            "crop_is_random": encoder.crop_is_random,
            "use_group_norm": encoder.norm == "group",
            "spatial_softmax_num_keypoints": encoder.num_keypoints,
        }
    return config


def feature(key: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return LeRobot's description of one feature."""
    kinds = {OBS_STATE: "STATE", OBS_ENV_STATE: "ENV", ACTION: "ACTION"}
    return {"type": "VISUAL" if is_camera(key) else kinds[key], "shape": list(shape)}


def normalization_mapping(policy: DiffusionPolicy) -> dict[str, str]:
    """Return LeRobot's feature type -> normalisation mode."""
    return {FEATURE_TYPES[kind]: mode.upper() for kind, mode in policy.normalizer.modes.items()}


def normalizer_step(policy: DiffusionPolicy, name: str, keys: tuple[str, ...], state_file: str) -> dict[str, Any]:
    """Return a normaliser step of a LeRobot processor."""
    config = {
        "eps": EPS,
        "features": {key: feature(key, policy.features.shapes[key]) for key in keys},
        "norm_map": normalization_mapping(policy),
    }
    return {"registry_name": name, "config": config, "state_file": state_file}


def preprocessor(policy: DiffusionPolicy) -> dict[str, Any]:
    """Return LeRobot's `policy_preprocessor.json`."""
    keys = (*policy.features.observation_keys, ACTION)
    steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
        normalizer_step(policy, "normalizer_processor", keys, PREPROCESSOR_STATE),
    ]
    return {"name": PREPROCESSOR, "steps": steps}


def postprocessor(policy: DiffusionPolicy) -> dict[str, Any]:
    """Return LeRobot's `policy_postprocessor.json`."""
    steps = [
        normalizer_step(policy, "unnormalizer_processor", (ACTION,), POSTPROCESSOR_STATE),
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    return {"name": POSTPROCESSOR, "steps": steps}


# --- our own file -----------------------------------------------------------------------------------------------------


def describe(policy: DiffusionPolicy) -> dict[str, Any]:
    """Return all that `load_policy` needs to build this policy again, as plain JSON."""
    features, unet = policy.features, policy.diffusion.unet
    encoder = policy.encoders[0] if policy.encoders else None
    scheduler = {"class": type(policy.noise_scheduler).__name__, "config": json_only(policy.noise_scheduler.config)}
    return {
        "features": {
            "action_dim": features.action_dim,
            "state_dim": features.state_dim,
            "env_state_dim": features.env_state_dim,
            "cameras": {key: list(shape) for key, shape in features.cameras.items()},
        },
        "normalization": policy.normalizer.modes,
        "scheduler": scheduler,
        "encoder": None
        if encoder is None
        else {
            "resnet": encoder.resnet,
            "norm": encoder.norm,
            "resize_shape": encoder.resize_shape,
            "crop_shape": encoder.crop_shape,
            "crop_is_random": encoder.crop_is_random,
            "num_keypoints": encoder.num_keypoints,
        },
        "unet": {
            "down_dims": unet.down_dims,
            "kernel_size": unet.kernel_size,
            "n_groups": unet.n_groups,
            "diffusion_step_embed_dim": unet.diffusion_step_embed_dim,
            "use_film_scale_modulation": unet.use_film_scale_modulation,
            "gradient_checkpointing": unet.gradient_checkpointing,
        },
        "policy": {
            "n_obs_steps": policy.n_obs_steps,
            "horizon": policy.horizon,
            "n_action_steps": policy.n_action_steps,
            "num_inference_steps": policy.num_inference_steps,
            "use_separate_rgb_encoder_per_camera": policy.use_separate_rgb_encoder_per_camera,
            "do_mask_loss_for_padding": policy.do_mask_loss_for_padding,
        },
    }


def json_only(config: Any) -> dict[str, Any]:
    """Return the entries of a diffusers config that are its own and plain data."""
    plain = (int, float, str, bool, type(None), list, tuple)
    return {key: value for key, value in dict(config).items() if isinstance(value, plain) and not key.startswith("_")}


def load_policy(folder: str | Path, *, device: str | torch.device = "cpu") -> DiffusionPolicy:
    """Open a policy folder that training wrote (`checkpoints/<step>/pretrained_model`), ready to act.

    Args:
        folder: as `find_policy_folder` takes it.

    Raises:
        InputError: it is no policy folder, or its weights do not fit its config.
    """
    folder = find_policy_folder(folder)
    described = json.loads((folder / EXTRA).read_text())
    policy = build(described, read_statistics(folder / PREPROCESSOR_STATE))
    try:
        policy.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except RuntimeError as error:
        raise InputError(f"{folder / WEIGHTS} does not fit {EXTRA}: {error}") from error
    return policy.to(device).eval()


def find_policy_folder(path: str | Path) -> Path:
    """Return the policy folder that is meant: itself, that of a checkpoint, or that of a run's last checkpoint.

    Raises:
        InputError: nothing of the kind is there.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"checkpoint={path} is no folder: give a run folder, outputs/<name>/<date_time>")
    places = [path / "checkpoints" / "last" / "pretrained_model", path / "pretrained_model", path]
    folder = next((place for place in places if (place / WEIGHTS).exists()), None)
    if folder is None:
        raise InputError(
            f"checkpoint={path} holds no policy (no {WEIGHTS}): give a run folder with checkpoints, a "
            "checkpoints/<step> folder or its pretrained_model"
        )
    if missing := [name for name in (EXTRA, PREPROCESSOR_STATE) if not (folder / name).exists()]:
        raise InputError(f"checkpoint={folder} is no policy folder of getiaction: it has no {', '.join(missing)}")
    return folder


def build(described: dict[str, Any], statistics: Statistics) -> DiffusionPolicy:
    """Build a policy from `describe`'s answer. Classes come from this package and diffusers' schedulers only."""
    name = described["scheduler"]["class"]
    scheduler_class: Any = getattr(diffusers, name, None)
    bases = (diffusers.SchedulerMixin, diffusers.ConfigMixin)
    if not (isinstance(scheduler_class, type) and all(issubclass(scheduler_class, base) for base in bases)):
        raise InputError(f"{EXTRA} names the scheduler {name}, which diffusers {diffusers.__version__} does not have")
    features = dict(described["features"])
    features["cameras"] = {key: tuple(shape) for key, shape in features["cameras"].items()}
    encoder = described["encoder"]
    return DiffusionPolicy(
        Features(**features),
        normalizer=Normalizer(statistics, described["normalization"]),
        noise_scheduler=scheduler_class.from_config(described["scheduler"]["config"]),  # type: ignore[attr-defined]
        encoder=partial(ImageEncoder, **encoder) if encoder else None,
        unet=partial(ConditionalUnet1d, **described["unet"]),
        **described["policy"],
    )


def read_statistics(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read normalisation statistics from a processor's state file."""
    statistics: dict[str, dict[str, Tensor]] = {}
    for flat_key, value in load_file(path).items():
        key, name = flat_key.rsplit(".", 1)
        statistics.setdefault(key, {})[name] = value
    return statistics
