"""Say a policy in LeRobot's words: its `config.json`, its processors, and what it has no word for."""

from __future__ import annotations

from typing import Any

from getiaction.interop.layout import OURS, POSTPROCESSOR, POSTPROCESSOR_STATE, PREPROCESSOR, PREPROCESSOR_STATE
from getiaction.keys import ACTION, OBS_ENV_STATE, OBS_STATE, is_camera
from getiaction.policy import DiffusionPolicy, ImageEncoder
from getiaction.policy.normalizer import EPS

FEATURE_TYPES = {"visual": "VISUAL", "state": "STATE", "env": "ENV", "action": "ACTION"}
SCHEDULER_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "clip_sample",
    "clip_sample_range",
    "prediction_type",
)
SCHEDULERS = {"DDPMScheduler": "DDPM", "DDIMScheduler": "DDIM"}


def not_for_lerobot(policy: DiffusionPolicy) -> list[str]:
    """List what LeRobot's diffusion policy has no equal for; empty if it opens this one."""
    reasons = []
    scheduler = type(policy.noise_scheduler).__name__
    if scheduler not in SCHEDULERS:
        reasons.append(f"scheduler {scheduler}")
    else:
        mine = policy.noise_scheduler.config
        theirs = type(policy.noise_scheduler)(**{key: mine[key] for key in SCHEDULER_KEYS}).config
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
        "type": OURS if foreign else "diffusion",
        "n_obs_steps": policy.n_obs_steps,
        "input_features": {key: feature(key, features.shapes[key]) for key in features.observation_keys},
        "output_features": {ACTION: feature(ACTION, features.shapes[ACTION])},
        "device": "cpu",
        "use_amp": False,
        "push_to_hub": False,
        "horizon": policy.horizon,
        "n_action_steps": policy.n_action_steps,
        "normalization_mapping": normalization_mapping(policy),
        "drop_n_last_frames": policy.drop_n_last_frames,
        "use_separate_rgb_encoder_per_camera": policy.use_separate_rgb_encoder_per_camera,
        "down_dims": list(unet.down_dims),
        "kernel_size": unet.kernel_size,
        "n_groups": unet.n_groups,
        "diffusion_step_embed_dim": unet.diffusion_step_embed_dim,
        "use_film_scale_modulation": unet.use_film_scale_modulation,
        "gradient_checkpointing": unet.gradient_checkpointing,
        "noise_scheduler_type": SCHEDULERS.get(type(policy.noise_scheduler).__name__, "DDPM"),
        "num_train_timesteps": scheduler.num_train_timesteps,
        **{key: scheduler[key] for key in ("beta_schedule", "beta_start", "beta_end") if key in scheduler},
        "prediction_type": policy.prediction_type,
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
