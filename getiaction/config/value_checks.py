"""Check each key of a config on its own: choices, ranges, shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from getiaction.config.problems import Problem
from getiaction.config.schema import Config
from getiaction.policy.noising import LOSS_WEIGHTINGS, PREDICTION_TYPES

LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")
CHOICES = {
    "policy.normalization.visual": ("mean_std", "min_max", "identity"),
    "policy.normalization.state": ("mean_std", "min_max", "identity"),
    "policy.normalization.env": ("mean_std", "min_max", "identity"),
    "policy.normalization.action": ("mean_std", "min_max", "identity"),
    "backbone.norm": ("group", "batch"),
    "policy.loss_weighting": LOSS_WEIGHTINGS,
    "scheduler.prediction_type": PREDICTION_TYPES,
    "lr_scheduler.name": LR_SCHEDULERS,
    "dataset.image_stats": ("imagenet", "half", "dataset"),
    "optimizer.scale_lr": ("none", "sqrt", "linear"),
    "hardware.device": ("auto", "cuda", "mps", "cpu"),
    "hardware.mixed_precision": ("no", "bf16", "fp16", "auto"),
    "hardware.compile_mode": ("default", "reduce-overhead", "max-autotune"),
    "hardware.data_placement": ("auto", "device", "host"),
    "hardware.convolutions": ("auto", "library", "taps"),
    "tracker.name": ("local", "tensorboard", "wandb"),
    "sweep_metric": ("val_loss", "loss", "val_action_error", "score", "success"),
}
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
    "training.noise_draws": 1,
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
LARGEST = 2**31 - 1  # of what torch counts with
MOST = {
    "seed": 2**63 - 1,
    "evaluation.seed": 2**63 - 1,
    "scheduler.num_train_timesteps": 100_000,  # its tables are made at once
    "hardware.num_threads": 1024,  # all of them start at once; with many more than cores, nothing gets done
}
OF_TYPE: dict[str, tuple[type, str]] = {  # in groups that stay open, so that the schema does not type them
    "backbone.resnet": (str, "the name of a torchvision ResNet"),
    "backbone.weights": (str, "null or the name of torchvision's weights"),
    "backbone.crop_is_random": (bool, "true or false"),
    "unet.use_film_scale_modulation": (bool, "true or false"),
    "unet.gradient_checkpointing": (bool, "true or false"),
    "scheduler.beta_schedule": (str, "the name of a schedule of diffusers'"),
    "scheduler.clip_sample": (bool, "true or false"),
    "optimizer.fused": (bool, "true or false"),
}
POSITIVE = (
    "optimizer.lr",
    "optimizer.eps",
    "training.max_grad_norm",
    "ema.power",
    "scheduler.beta_start",
    "scheduler.beta_end",
    "scheduler.clip_sample_range",
)
DECAYS = ("optimizer.weight_decay", "optimizer.betas")
MAY_BE_NULL = ("backbone.weights", "backbone.resize_shape", "backbone.crop_shape", "optimizer.fused")


def look_up(config: Config, key: str) -> Any:
    """Return a dotted key's value; None where the chosen group does not have it."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else getattr(node, part)
    return node


def check_values(config: Config) -> Iterator[Problem]:
    """Check each key on its own: choices and ranges."""
    yield from check_nulls(config)
    for key, choices in CHOICES.items():
        value = look_up(config, key)
        if value is not None and value not in choices:
            yield Problem(f"{key}={value} must be one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        value = look_up(config, key)
        most = MOST.get(key, LARGEST)
        if value is not None and not is_whole(value, least, most):
            too_much = f", and at most {most}" if isinstance(value, int) and value > most else ""
            yield Problem(f"{key}={value} must be a whole number of at least {least}{too_much}")
    for key, (kind, wanted) in OF_TYPE.items():
        value = look_up(config, key)
        if value is not None and not isinstance(value, kind):
            yield Problem(f"{key}={value} must be {wanted}")
    for key in POSITIVE:
        value = look_up(config, key)
        if value is not None and not (is_number(value) and value > 0):
            yield Problem(f"{key}={value} must be a positive number")
    yield from check_shares(config)
    yield from check_shapes(config)
    yield from check_lists(config)


def check_nulls(config: Config) -> Iterator[Problem]:
    """Check that what an open group has is not null, where null means nothing."""
    for key in (*CHOICES, *AT_LEAST, *OF_TYPE, *POSITIVE, *DECAYS, "unet.down_dims"):
        group, _, name = key.partition(".")
        values = getattr(config, group)
        if isinstance(values, dict) and name in values and values[name] is None and key not in MAY_BE_NULL:
            yield Problem(f"{key}=null means nothing: give a value")


def check_shares(config: Config) -> Iterator[Problem]:
    """Check the numbers between 0 and 1, and the optimiser's decays."""
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
    shift = look_up(config, "scheduler.shift")
    if shift is not None and not (is_number(shift) and 0.01 <= shift <= 100):
        yield Problem(
            f"scheduler.shift={shift} must be a number from 0.01 to 100: 1 is straight, 3 dwells in the noise"
        )
    decay, betas = (look_up(config, key) for key in DECAYS)
    if decay is not None and not (is_number(decay) and decay >= 0):
        yield Problem(f"optimizer.weight_decay={decay} must be a number of at least 0: 1e-6 is the reference")
    if betas is not None and not (
        isinstance(betas, list) and len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
    ):
        yield Problem(f"optimizer.betas={betas} must be two numbers in [0, 1): [0.95,0.999]")


def check_shapes(config: Config) -> Iterator[Problem]:
    """Check the sizes of pictures and of the U-Net's levels."""
    for key in ("backbone.resize_shape", "backbone.crop_shape"):
        value = look_up(config, key)
        if value is not None and not (
            isinstance(value, list) and len(value) == 2 and all(is_whole(side, 1) for side in value)
        ):
            yield Problem(f"{key}={value} must be null or two positive numbers, [height, width]")
    dims = config.unet.get("down_dims")
    if dims is not None and not (isinstance(dims, list) and dims and all(is_whole(dim, 1) for dim in dims)):
        yield Problem(f"unet.down_dims={dims} must be a list of positive numbers: [256,512,1024]")


def check_lists(config: Config) -> Iterator[Problem]:
    """Check lists of the dataset, whose members OmegaConf lets be lists themselves."""
    dataset = config.dataset
    for key in ("episodes", "val_episodes"):
        if not all(is_whole(index, 0) for index in getattr(dataset, key) or ()):
            yield Problem(f"dataset.{key}={getattr(dataset, key)} must be a list of whole numbers: [0,1,2]")
    if not all(isinstance(name, str) for name in dataset.observations or ()):
        yield Problem(f"dataset.observations={dataset.observations} must be a list of names: [observation.state]")
    for key, times in (dataset.delta_timestamps or {}).items():
        if not all(is_number(time) for time in times):
            yield Problem(f"dataset.delta_timestamps.{key}={times} must be a list of seconds: [-0.1,0.0]")


def is_whole(value: Any, least: int, most: int = LARGEST) -> bool:
    """Tell whether a value is a whole number in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
