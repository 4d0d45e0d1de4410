"""Check each key of a config on its own: choices, ranges, shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from getiaction.config.problems import Problem
from getiaction.config.schema import Config

LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")
CHOICES = {
    "policy.normalization.visual": ("mean_std", "min_max", "identity"),
    "policy.normalization.state": ("mean_std", "min_max", "identity"),
    "policy.normalization.env": ("mean_std", "min_max", "identity"),
    "policy.normalization.action": ("mean_std", "min_max", "identity"),
    "backbone.norm": ("group", "batch"),
    "scheduler.prediction_type": ("epsilon", "sample", "v_prediction"),
    "lr_scheduler.name": LR_SCHEDULERS,
    "dataset.image_stats": ("imagenet", "half", "dataset"),
    "optimizer.scale_lr": ("none", "sqrt", "linear"),
    "hardware.device": ("auto", "cuda", "mps", "cpu"),
    "hardware.mixed_precision": ("no", "bf16", "fp16", "auto"),
    "hardware.compile_mode": ("default", "reduce-overhead", "max-autotune"),
    "hardware.data_placement": ("auto", "device", "host"),
    "tracker.name": ("local", "tensorboard", "wandb"),
    "sweep_metric": ("val_loss", "loss", "val_action_error", "score", "success"),
}
FLAGS = (
    "backbone.crop_is_random",
    "unet.use_film_scale_modulation",
    "unet.gradient_checkpointing",
    "scheduler.clip_sample",
    "optimizer.fused",
)
AT_LEAST = {
    "seed": 0,
    "policy.n_obs_steps": 1,
    "policy.horizon": 1,
    "policy.n_action_steps": 1,
    "policy.num_inference_steps": 1,
    "policy.drop_n_last_frames": 0,
    "backbone.num_keypoints": 1,
    "unet.kernel_size": 1,
    "unet.n_groups": 1,
    "unet.diffusion_step_embed_dim": 4,
    "scheduler.num_train_timesteps": 1,
    "lr_scheduler.num_warmup_steps": 0,
    "training.batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.max_steps": 1,
    "training.max_epochs": 1,
    "training.log_every": 1,
    "training.save_every": 1,
    "training.keep_checkpoints": 1,
    "validation.every": 1,
    "validation.max_samples": 1,
    "validation.max_sampled": 0,
    "evaluation.every": 1,
    "evaluation.episodes": 1,
    "evaluation.final_episodes": 1,
    "evaluation.seed": 0,
    "evaluation.num_envs": 1,
    "evaluation.num_workers": 0,
    "hardware.num_processes": 1,
    "hardware.num_nodes": 1,
    "hardware.hang_timeout": 1,
    "hardware.num_threads": 1,
}


def look_up(config: Config, key: str) -> Any:
    """Return a dotted key's value; None where the chosen group does not have it."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else getattr(node, part)
    return node


def check_values(config: Config) -> Iterator[Problem]:
    """Check each key on its own: choices and ranges."""
    for key, choices in CHOICES.items():
        value = look_up(config, key)
        if value is not None and value not in choices:
            yield Problem(f"{key}={value} must be one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        value = look_up(config, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            yield Problem(f"{key}={value} must be a whole number of at least {least}")
    for key in FLAGS:
        if (value := look_up(config, key)) is not None and not isinstance(value, bool):
            yield Problem(f"{key}={value} must be true or false")
    if not all(isinstance(key, str) for key in config.dataset.observations or ()):
        yield Problem(f"dataset.observations={config.dataset.observations} must be names: [observation.state]")
    for key in ("optimizer.lr", "training.max_grad_norm", "ema.power"):
        value = look_up(config, key)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            yield Problem(f"{key}={value} must be a positive number")
    if not 0 <= config.training.observation_noise <= 1:
        yield Problem(
            f"training.observation_noise={config.training.observation_noise} must be in [0, 1], a share of half the "
            "range of the states: 0.008 is little, 0.1 is much"
        )
    if not 0 <= config.dataset.val_fraction < 1:
        yield Problem(
            f"dataset.val_fraction={config.dataset.val_fraction} must be in [0, 1): 0.05 holds out one episode in 20"
        )
    if not 0 <= config.ema.max_decay < 1:
        yield Problem(f"ema.max_decay={config.ema.max_decay} must be in [0, 1): 0.9999 is the reference")
    for key in ("backbone.resize_shape", "backbone.crop_shape"):
        value = look_up(config, key)
        if value is not None and not (
            isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value)
        ):
            yield Problem(f"{key}={value} must be null or two positive numbers, [height, width]")
    dims = config.unet.get("down_dims")
    if dims is not None and not (
        isinstance(dims, list) and dims and all(isinstance(dim, int) and dim > 0 for dim in dims)
    ):
        yield Problem(f"unet.down_dims={dims} must be a list of positive numbers: [256,512,1024]")
