"""Start a run from the weights of a policy that exists: check that the two fit, and say what to write if they don't."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from getiaction.config.overrides import as_override
from getiaction.config.schema import Config
from getiaction.errors import InputError
from getiaction.interop.description import describe
from getiaction.interop.layout import WEIGHTS
from getiaction.interop.lerobot import check_weights, find_policy_folder, load_weights, read_policy
from getiaction.interop.lerobot_files import SCHEDULER_KEYS
from getiaction.keys import is_camera
from getiaction.policy import DiffusionPolicy
from getiaction.policy.normalizer import Statistics

log = logging.getLogger(__name__)
KEY = "training.init_from"
MAY_DIFFER = (  # a policy can be trained on with others of these
    "policy.horizon",
    "policy.n_action_steps",
    "policy.num_inference_steps",
    "policy.do_mask_loss_for_padding",
    "policy.drop_n_last_frames",
    "policy.loss_weighting",
    "backbone.crop_is_random",
    "unet.gradient_checkpointing",
    "scheduler",
    "scheduler.num_train_timesteps",
    "scheduler.beta_schedule",
    "scheduler.beta_start",
    "scheduler.beta_end",
    "scheduler.clip_sample",
    "scheduler.clip_sample_range",
    "scheduler.shift",
)
GROUPS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm_solver",
    "FlowMatchEulerDiscreteScheduler": "flow_matching",
}


def check_init_from(config: Config, policy: DiffusionPolicy) -> None:
    """Check that the policy of `training.init_from` and that of the config are one architecture.

    Args:
        policy: what the config builds; on the meta device will do.

    Raises:
        InputError: they differ; the message lists the overrides that make them one.
    """
    if config.training.init_from is None:
        return
    folder = find_policy_folder(config.training.init_from, KEY)
    described, statistics, weights = read_policy(folder)
    mine = describe(policy)
    if say_features(described["features"]) != say_features(mine["features"]):
        raise InputError(
            f"{KEY}={folder} sees and does {say_features(described['features'])}; with this data it would be "
            f"{say_features(mine['features'])}: use data with the same, or choose some with dataset.observations"
        )
    theirs, ours = to_overrides(described), to_overrides(mine)
    differ = [key for key in theirs if theirs[key] != ours.get(key)]
    if must := [as_override(key, theirs[key]) for key in differ if key not in MAY_DIFFER]:
        raise InputError(
            f"{KEY}={folder} is another policy than this config builds; with these it is the same:\n       "
            + " ".join(must)
        )
    check_weights(policy, weights, folder / WEIGHTS)
    for key in differ:
        now = f"now it is {ours[key]}" if key in ours else "which there is none of here"
        log.warning("warning: %s was made with %s, %s", folder, as_override(key, theirs[key]), now)
    if policy.features.cameras and (was := image_stats(statistics)) != config.dataset.image_stats:
        log.warning("warning: %s was made with %s", folder, as_override("dataset.image_stats", was))


def start_from(config: Config, policy: DiffusionPolicy) -> None:
    """Load the weights that `training.init_from` names, if it does; the statistics stay those of this run's data."""
    if config.training.init_from is None:
        return
    folder = find_policy_folder(config.training.init_from, KEY)
    load_weights(policy, read_policy(folder)[2], folder / WEIGHTS)
    log.info("starting from the weights of %s; values are normalised by the statistics of this run's data", folder)


def to_overrides(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config that make this policy, with their values.

    Args:
        described: what `interop.description.describe` says of it.
    """
    scheduler, encoder = described["scheduler"], described["encoder"]
    noising = {"prediction_type": scheduler["config"].get("prediction_type"), "loss_weighting": "none"}
    noising |= described.get("noising", {})
    named = {
        "backbone": "resnet18" if encoder else "none",
        **{f"backbone.{key}": value for key, value in (encoder or {}).items()},
        **{f"unet.{key}": value for key, value in described["unet"].items()},
        "scheduler": GROUPS.get(scheduler["class"], scheduler["class"]),
        **{
            f"scheduler.{key}": scheduler["config"][key]
            for key in (*SCHEDULER_KEYS, "shift")
            if key in scheduler["config"]
        },
        "scheduler.prediction_type": noising["prediction_type"],
        "policy.loss_weighting": noising["loss_weighting"],
        **{f"policy.{key}": value for key, value in described["policy"].items()},
        **{f"policy.normalization.{kind}": mode for kind, mode in modes_in_use(described).items()},
    }
    if named["policy.num_inference_steps"] is None:
        named["policy.num_inference_steps"] = scheduler["config"]["num_train_timesteps"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in named.items()}


def modes_in_use(described: Mapping[str, Any]) -> dict[str, str]:
    """Return kind -> normalisation mode, for the kinds that the policy sees and does."""
    features = described["features"]
    sizes = {"visual": features["cameras"], "state": features["state_dim"], "env": features["env_state_dim"]}
    return {kind: mode for kind, mode in described["normalization"].items() if kind == "action" or sizes[kind]}


def image_stats(statistics: Statistics) -> str:
    """Return which `dataset.image_stats` a policy was made with."""
    known = {"half": [0.5, 0.5, 0.5], "imagenet": [0.485, 0.456, 0.406]}
    means = [stats["mean"] for key, stats in statistics.items() if is_camera(key) and "mean" in stats]
    fits = (name for name, mean in known.items() if means and all(is_close(found, mean) for found in means))
    return next(fits, "dataset")


def is_close(found: Tensor, wanted: list[float]) -> bool:
    """Tell whether a mean (C, 1, 1) is this one."""
    return found.numel() == len(wanted) and torch.allclose(found.flatten(), torch.tensor(wanted), atol=1e-3)


def say_features(features: Mapping[str, Any]) -> str:
    """Return the sizes of inputs and output in words."""
    vectors = {"observation.state": features["state_dim"], "observation.environment_state": features["env_state_dim"]}
    sizes = {key: [size] for key, size in vectors.items() if size is not None}
    sizes |= {key: list(shape) for key, shape in features["cameras"].items()} | {"action": [features["action_dim"]]}
    return ", ".join(f"{key} {'x'.join(str(side) for side in shape)}" for key, shape in sizes.items())
