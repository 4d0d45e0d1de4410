"""Build what a config names: policy, optimiser, learning-rate schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from torch import Tensor

from getiaction.config.schema import Config
from getiaction.data.metadata import DatasetMetadata
from getiaction.data.mirror import Mirror
from getiaction.errors import InputError, first_line
from getiaction.keys import ACTION, OBS_ENV_STATE, OBS_STATE, is_camera
from getiaction.policy import DiffusionPolicy, Features, Normalizer
from getiaction.policy.encoder import load_resnet
from getiaction.policy.noising import is_flow
from getiaction.random import Purpose, derive_seed

LR_RULES: dict[str, Callable[[int], float]] = {"sqrt": math.sqrt, "linear": float}


def build_group(name: str, group: Mapping[str, Any], **extra: Any) -> Any:
    """Instantiate a config group by its `_target_`.

    Raises:
        InputError: the target does not exist or refuses its arguments.
    """
    try:
        return instantiate(dict(group), **extra)
    except InstantiationException as error:
        raise InputError(f"{name} cannot be built: {first_line(error.__cause__ or error)}") from error


def parameters_of(target: str) -> Collection[str]:
    """Return the names that a class takes; those that everything has where there is no such class."""
    try:
        return inspect.signature(get_class(target)).parameters
    except (ImportError, ValueError, TypeError):
        return ("prediction_type",)  # building it says what is wrong


def build_noise_scheduler(config: Config) -> Any:
    """Build the diffusers scheduler; one of flow matching leaves `prediction_type` to the policy.

    Raises:
        InputError: it has neither `alphas_cumprod` nor `sigmas` alone, so nothing here can train with it.
    """
    group = dict(config.scheduler)
    if "prediction_type" not in parameters_of(group["_target_"]):
        group.pop("prediction_type", None)
    scheduler = build_group("scheduler", group)
    if not hasattr(scheduler, "alphas_cumprod") and not is_flow(scheduler):
        raise InputError(
            f"scheduler={type(scheduler).__name__} has no alphas_cumprod: use a DDPM-like one, scheduler=ddpm"
        )
    return scheduler


def build_mirror(config: Config) -> Mirror | None:
    """Build what mirrors samples, or None.

    Raises:
        InputError: it is none, or what it says of a feature means nothing.
    """
    if config.mirror.get("_target_") is None:
        return None
    return build_group("mirror", {**config.mirror, "_convert_": "all"})


def observation_keys(config: Config, metadata: DatasetMetadata) -> list[str]:
    """Return the observations that the policy uses, in the dataset's order of keys: states, then cameras."""
    has = [key for key in (OBS_STATE, OBS_ENV_STATE) if key in metadata.vectors] + list(metadata.cameras)
    chosen = config.dataset.observations
    if chosen is not None:
        return [key for key in has if key in chosen]
    return [key for key in has if config.uses_images or not is_camera(key)]


def build_features(config: Config, metadata: DatasetMetadata) -> Features:
    """Describe the policy's inputs and output."""
    keys = observation_keys(config, metadata)
    return Features(
        action_dim=metadata.vectors[ACTION],
        state_dim=metadata.vectors[OBS_STATE] if OBS_STATE in keys else None,
        env_state_dim=metadata.vectors[OBS_ENV_STATE] if OBS_ENV_STATE in keys else None,
        cameras={key: metadata.cameras[key] for key in keys if is_camera(key)},
    )


def fetch_weights(config: Config) -> None:
    """Bring the backbone's pretrained weights into torch's cache, before anything slow is done.

    Raises:
        InputError: they do not exist, or cannot be fetched.
    """
    weights = config.backbone.get("weights")
    if weights is not None:
        try:
            load_resnet(config.backbone["resnet"], weights)
        except ValueError as error:
            raise InputError(str(error)) from error


def build_policy(
    config: Config,
    features: Features,
    statistics: Mapping[str, Mapping[str, Tensor]],
    *,
    fetch_weights: bool = True,
    device: str = "cpu",
) -> DiffusionPolicy:
    """Build the policy, its weights drawn from the run's seed.

    Args:
        fetch_weights: start from the backbone's pretrained weights; a run that resumes has its own.
        device: "meta" builds shapes only, at once and without memory.

    Raises:
        InputError: a group refuses its arguments.
    """
    policy = config.policy
    modes = {kind: getattr(policy.normalization, kind) for kind in ("visual", "state", "env", "action")}
    kept = {key: statistics[key] for key in (*features.observation_keys, ACTION) if key in statistics}
    backbone = dict(config.backbone) if fetch_weights else {**config.backbone, "weights": None}
    scheduler = build_noise_scheduler(config)
    torch.manual_seed(derive_seed(config.seed, Purpose.WEIGHTS))
    try:
        with torch.device(device):
            return DiffusionPolicy(
                features,
                normalizer=Normalizer(kept, modes),
                noise_scheduler=scheduler,
                encoder=build_group("backbone", backbone) if config.uses_images else None,
                unet=build_group("unet", config.unet),
                n_obs_steps=policy.n_obs_steps,
                horizon=policy.horizon,
                n_action_steps=policy.n_action_steps,
                num_inference_steps=policy.num_inference_steps,
                use_separate_rgb_encoder_per_camera=policy.use_separate_rgb_encoder_per_camera,
                do_mask_loss_for_padding=policy.do_mask_loss_for_padding,
                drop_n_last_frames=config.drop_n_last_frames,
                prediction_type=config.scheduler.get("prediction_type"),
                loss_weighting=policy.loss_weighting,
            )
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        if device != "meta":
            raise
        raise InputError(f"the policy is larger than any memory ({error}): lower {sizes(config)}") from error


def sizes(config: Config) -> str:
    """Return what makes a policy large, as overrides."""
    chosen = {"unet": ("down_dims", "diffusion_step_embed_dim", "kernel_size"), "backbone": ("num_keypoints",)}
    groups = {name: getattr(config, name) for name in chosen}
    return " or ".join(
        f"{name}.{key}={groups[name][key]}" for name, keys in chosen.items() for key in keys if key in groups[name]
    )


def build_optimizer(
    config: Config, parameters: Iterable[torch.nn.Parameter], *, parts: int = 1
) -> torch.optim.Optimizer:
    """Build the optimiser over all parameters, in the policy's order.

    Args:
        parts: micro-batches of one step, on all processes: what `optimizer.scale_lr` multiplies the rate by.
    """
    group = {**config.optimizer, "_convert_": "all"}
    rule = group.pop("scale_lr", None) or "none"  # runs of before it was there have no such key
    if rule != "none" and group.get("lr") is not None:
        group["lr"] *= LR_RULES[rule](parts)
    return build_group("optimizer", group, params=list(parameters))


def build_lr_scheduler(
    config: Config, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the learning-rate schedule over `steps` optimiser steps, by diffusers' names."""
    from diffusers.optimization import get_scheduler

    schedule = config.lr_scheduler
    return get_scheduler(schedule.name, optimizer, num_warmup_steps=schedule.num_warmup_steps, num_training_steps=steps)
