"""Describe a policy as plain JSON, `getiaction.json`, and build it again."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from getiaction.errors import InputError
from getiaction.policy import ConditionalUnet1d, DiffusionPolicy, Features, ImageEncoder, Normalizer
from getiaction.policy.normalizer import Statistics

LARGEST = 1 << 16
"""Steps of time and pixels of a side that no weights answer for: more would only fill the memory."""


def describe(policy: DiffusionPolicy) -> dict[str, Any]:
    """Return all that `build` needs to build this policy again, as plain JSON."""
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
            "drop_n_last_frames": policy.drop_n_last_frames,
        },
        "noising": {"prediction_type": policy.prediction_type, "loss_weighting": policy.noising.loss_weighting},
    }


def json_only(config: Any) -> dict[str, Any]:
    """Return the entries of a diffusers config that are its own and plain data."""
    plain = (int, float, str, bool, type(None), list, tuple)
    return {key: value for key, value in dict(config).items() if isinstance(value, plain) and not key.startswith("_")}


def build(described: dict[str, Any], statistics: Statistics, device: str = "cpu") -> DiffusionPolicy:
    """Build a policy from `describe`'s answer. Classes come from this package and diffusers' schedulers only.

    Args:
        device: where its weights lie; "meta" takes no memory for them.

    Raises:
        InputError: it names no scheduler of diffusers', or times that cannot be.
    """
    name = described["scheduler"]["class"]
    scheduler_class: Any = getattr(diffusers, name, None)
    bases = (diffusers.SchedulerMixin, diffusers.ConfigMixin)
    if not (isinstance(scheduler_class, type) and all(issubclass(scheduler_class, base) for base in bases)):
        raise InputError(
            f"the policy names the scheduler {name}, which diffusers {diffusers.__version__} does not have"
        )
    features = dict(described["features"])
    features["cameras"] = {key: tuple(shape) for key, shape in features["cameras"].items()}
    encoder = described["encoder"]
    check_times(described)
    normalizer = Normalizer(statistics, described["normalization"])
    scheduler = scheduler_class.from_config(described["scheduler"]["config"])  # type: ignore[attr-defined]
    with torch.device(device):
        return DiffusionPolicy(
            Features(**features),
            normalizer=normalizer,
            noise_scheduler=scheduler,
            encoder=partial(ImageEncoder, **encoder) if encoder else None,
            unet=partial(ConditionalUnet1d, **described["unet"]),
            **described["policy"],
            **described.get("noising", {}),  # folders of before have none
        )


def check_times(described: dict[str, Any]) -> None:
    """Refuse times with which a policy could be built, but not act.

    Raises:
        InputError: the horizon does not fit the U-Net, or the executed actions do not fit the horizon.
    """
    times, factor = described["policy"], 2 ** (len(described["unet"]["down_dims"]) - 1)
    steps, sides = described["scheduler"]["config"].get("num_train_timesteps", 1), described["features"]["cameras"]
    if max(times["horizon"], steps, *(side for shape in sides.values() for side in shape)) > LARGEST:
        raise InputError(f"the policy's times and pictures must be at most {LARGEST}, or they would fill the memory")
    horizon, longest = times["horizon"], times["horizon"] - times["n_obs_steps"] + 1
    if horizon % factor:
        raise InputError(f"the policy's horizon={horizon} must be divisible by {factor}, the halvings of its U-Net")
    if not 1 <= times["n_action_steps"] <= longest:
        raise InputError(
            f"the policy's n_action_steps={times['n_action_steps']} must be 1 to horizon - n_obs_steps + 1 = {longest}"
        )
