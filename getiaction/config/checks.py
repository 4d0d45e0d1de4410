"""Check what no single key can tell: errors for what cannot work, warnings for what works badly.

Every message names the key, the value, the rule and the fix. Nothing has been downloaded, decoded or written yet.
"""

from __future__ import annotations

from collections.abc import Iterator

from getiaction.config.device_checks import check_devices
from getiaction.config.noise_checks import check_noise
from getiaction.config.problems import Problem, report
from getiaction.config.schema import Config
from getiaction.config.sources import check_sources
from getiaction.config.value_checks import check_values
from getiaction.policy.unet import FINAL_GROUPS

BLIND = 32  # pixels of a picture's side that a ResNet halves to one
HALF = 0.5  # a crop that shows less of the picture than this loses the task


def check_config(config: Config) -> None:
    """Check everything that needs no dataset.

    Raises:
        InputError: all errors, one a line; with `strict`, warnings too.
    """
    simple = [*check_values(config), *check_sources(config)]
    checks = () if simple else (check_time, check_unet, check_pictures, check_noise, check_training, check_devices)
    report(simple + [problem for check in checks for problem in check(config)], strict=config.strict)


def check_time(config: Config) -> Iterator[Problem]:
    """Check the temporal parameters against each other and against the U-Net."""
    policy = config.policy
    longest = policy.horizon - policy.n_obs_steps + 1
    if policy.n_action_steps > longest:
        yield Problem(
            f"policy.n_action_steps={policy.n_action_steps} must be at most horizon - n_obs_steps + 1 = {longest}: "
            f"use policy.n_action_steps={max(longest, 1)} or "
            f"policy.horizon={policy.n_action_steps + policy.n_obs_steps - 1}"
        )
    dims = config.unet.get("down_dims") or [1]  # a U-Net without levels halves nothing
    factor, lerobots = 2 ** (len(dims) - 1), 2 ** len(dims)
    if policy.horizon % factor:
        low = policy.horizon // lerobots * lerobots
        options = " or ".join(str(value) for value in (low, low + lerobots) if value > 0)
        yield Problem(
            f"unet.down_dims={dims} needs policy.horizon divisible by {factor} (time halves {len(dims) - 1} times), "
            f"got {policy.horizon}: use {options}"
        )
    elif "down_dims" in config.unet and policy.horizon % lerobots:
        yield Problem(
            f"policy.horizon={policy.horizon} trains here, but LeRobot opens checkpoints of unet.down_dims={dims} "
            f"only with multiples of {lerobots}: use {-(-policy.horizon // lerobots) * lerobots} to keep that door "
            "open",
            is_error=False,
        )


def check_unet(config: Config) -> Iterator[Problem]:
    """Check the U-Net's sizes."""
    unet = config.unet
    groups, dims = unet.get("n_groups"), unet.get("down_dims") or []
    if groups and (bad := [dim for dim in dims if dim % groups]):
        divisors = [number for number in range(1, min(dims) + 1) if all(dim % number == 0 for dim in dims)]
        fits = min(divisors, key=lambda number: (abs(number - groups), -number))
        yield Problem(
            f"unet.n_groups={groups} must divide every entry of unet.down_dims={dims}, not {bad[0]}: use "
            f"unet.n_groups={fits}"
        )
    if dims and dims[0] % FINAL_GROUPS:
        fit = -(-dims[0] // FINAL_GROUPS) * FINAL_GROUPS
        yield Problem(
            f"unet.down_dims={dims} must begin with a multiple of {FINAL_GROUPS} (the groups of the last block): "
            f"use {fit} instead of {dims[0]}"
        )
    if unet.get("kernel_size", 1) % 2 == 0:
        size = unet["kernel_size"]
        yield Problem(f"unet.kernel_size={size} must be odd, or time changes its length: use {size - 1} or {size + 1}")
    if unet.get("diffusion_step_embed_dim", 2) % 2:
        size = unet["diffusion_step_embed_dim"]
        yield Problem(f"unet.diffusion_step_embed_dim={size} must be even (sines and cosines): use {size + 1}")


def check_pictures(config: Config) -> Iterator[Problem]:
    """Check crop, weights and norm of the image encoder."""
    if not config.uses_images:
        return
    backbone = config.backbone
    if backbone.get("resize_shape"):
        yield from check_crop(backbone.get("crop_shape"), backbone["resize_shape"], "backbone.resize_shape")
    sides = backbone.get("crop_shape") or backbone.get("resize_shape")
    if sides:
        yield from check_sight(sides, f"more than {BLIND} pixels on a side")
    if backbone.get("weights") and backbone.get("norm") == "group":
        yield Problem(
            f"backbone.norm=group with backbone.weights={backbone['weights']}: convolutions keep their weights, "
            "norms start from the pretrained affine values without their running statistics; backbone.norm=batch "
            "keeps the network whole",
            is_error=False,
        )
    if backbone.get("norm") == "batch" and config.training.batch_size < 4:
        yield Problem(
            f"backbone.norm=batch with training.batch_size={config.training.batch_size}: batch statistics of so "
            "few samples are "
            "noise; use backbone.norm=group or training.batch_size=16",
            is_error=False,
        )


def check_sight(sides: list[int], fix: str) -> Iterator[Problem]:
    """Check that pictures, [H, W], are large enough to look at different places."""
    if max(sides) <= BLIND:
        yield Problem(
            f"pictures of {sides} leave the spatial softmax one place to look at, so the policy would see nothing: use "
            f"{fix}"
        )


def check_crop(crop: list[int] | None, picture: list[int], name: str) -> Iterator[Problem]:
    """Check that a crop fits into a picture, [H, W] each, and shows enough of it."""
    if crop is None:
        return
    if crop[0] > picture[0] or crop[1] > picture[1]:
        fix = [min(c, p) for c, p in zip(crop, picture, strict=True)]
        yield Problem(
            f"backbone.crop_shape={crop} must fit into {name}={picture}: use backbone.crop_shape={fix}, or null"
        )
    elif (shown := crop[0] * crop[1] / (picture[0] * picture[1])) < HALF:
        yield Problem(
            f"backbone.crop_shape={crop} shows {shown:.0%} of {name}={picture}: resize first, "
            f"backbone.resize_shape=[{round(crop[0] / 0.875)},{round(crop[1] / 0.875)}]",
            is_error=False,
        )


def check_training(config: Config) -> Iterator[Problem]:
    """Check the length, the learning-rate schedule and the rollouts."""
    training, schedule = config.training, config.lr_scheduler
    if training.max_steps is None and training.max_epochs is None:
        yield Problem("training.max_steps and training.max_epochs are both null: set one, training.max_steps=20000")
    if schedule.name == "constant" and schedule.num_warmup_steps:
        yield Problem(
            "lr_scheduler.name=constant does not warm up, "
            f"lr_scheduler.num_warmup_steps={schedule.num_warmup_steps} has no "
            "effect: use lr_scheduler.name=constant_with_warmup",
            is_error=False,
        )
    elif (
        training.max_steps is not None
        and schedule.num_warmup_steps >= training.max_steps
        and training.max_epochs is None
    ):
        yield Problem(
            f"lr_scheduler.num_warmup_steps={schedule.num_warmup_steps} reaches past "
            f"training.max_steps={training.max_steps}: the "
            f"learning rate never arrives; use lr_scheduler.num_warmup_steps={training.max_steps // 10}",
            is_error=False,
        )
    if config.sweep_metric in ("score", "success") and not config.evaluates:
        yield Problem(
            f"sweep_metric={config.sweep_metric} needs rollouts: use evaluation.final_episodes=50, or "
            "sweep_metric=val_loss"
        )
    if config.evaluation.keep_best and not config.evaluates:
        yield Problem("evaluation.keep_best=true needs rollouts to know the best: use evaluation.every=5000")
    if config.evaluates and config.env.get("_target_") is None:
        yield Problem(
            "env=none has no simulator to evaluate in: leave evaluation.every and evaluation.final_episodes null, or "
            "use env=pusht where the data come from there"
        )
