"""Measure a policy on held-out episodes: `getiaction validate --config FILE.yaml --ckpt_path RUN_FOLDER`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from getiaction.config.schema import Config
from getiaction.errors import InputError

if TYPE_CHECKING:
    from getiaction.policy import DiffusionPolicy


def validate(config: Config, checkpoint: str) -> dict[str, float]:
    """Return the validation loss and the error of sampled actions of a policy, on the episodes held out of the data.

    Args:
        config: says the data and which of its episodes are held out; the policy's own shapes and times hold.
        checkpoint: as `find_policy_folder` takes it.

    Raises:
        InputError: there is no policy, it sees something else than the data show, or no episode is held out.
    """
    from getiaction.config import run
    from getiaction.config.build import build_features
    from getiaction.config.placement import place
    from getiaction.config.sources import find_data
    from getiaction.interop.lerobot import find_policy_folder, load_policy
    from getiaction.startup import release_collector

    config.tracker.name = "local"  # one measurement is no run to track
    folder = find_policy_folder(checkpoint, key="--ckpt_path")
    mixture = find_data(config)
    policy = load_policy(folder)
    take_shapes(config, policy)
    if (shown := build_features(config, mixture.metadata).shapes) != policy.features.shapes:
        raise InputError(f"--ckpt_path {folder} sees {policy.features.shapes}, the data show {shown}")
    with tempfile.TemporaryDirectory() as nowhere:
        accelerator = run.start_accelerator(config, Path(nowhere))
        episodes = run.load_data(config, mixture, accelerator)
        policy = place(policy, config.hardware, accelerator)
        _, validator = run.build_batches(config, mixture, episodes, policy, accelerator)
        if validator is None:
            raise InputError("no episode is held out: use dataset.val_fraction=0.05, or dataset.val_episodes='[0]'")
        release_collector()
        with accelerator.autocast():
            return validator(policy)


def take_shapes(config: Config, policy: DiffusionPolicy) -> None:
    """Give the config the times and picture sizes of a policy."""
    for key in ("n_obs_steps", "horizon", "n_action_steps"):
        setattr(config.policy, key, getattr(policy, key))
    if policy.encoders:
        encoder = policy.encoders[0]
        config.backbone |= {"resize_shape": encoder.resize_shape, "crop_shape": encoder.crop_shape}
    else:
        config.backbone = {"_target_": None}


def validate_command(overrides: list[str], checkpoint: str) -> None:
    """Validate and print what was measured, a line each."""
    from getiaction.config.compose import compose

    for name, value in validate(compose(overrides), checkpoint).items():
        print(f"{name} {value:.4f}")
