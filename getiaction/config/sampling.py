"""Let a trained policy denoise by another scheduler, or in other steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from getiaction.config.build import build_group
from getiaction.config.compose import CONF_DIR
from getiaction.errors import InputError
from getiaction.policy import DiffusionPolicy

TRAINED = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
)
"""What a policy was trained with, and keeps."""


def change_scheduler(policy: DiffusionPolicy, scheduler: Mapping[str, Any]) -> None:
    """Let `policy` denoise by `scheduler`, a leaf of `conf/scheduler/`, on the noise that it was trained with.

    Raises:
        InputError: the scheduler cannot be built, or means another amount of noise by a step.
    """
    trained = policy.noise_scheduler.config
    kept = {key: trained[key] for key in TRAINED if key in scheduler and key in trained}
    changed = build_group("scheduler", {**scheduler, **kept})
    own = policy.noise_scheduler.alphas_cumprod
    noise = getattr(changed, "alphas_cumprod", None)
    if noise is None or noise.shape != own.shape or not noise.allclose(own.to(noise), atol=1e-6):
        raise InputError(
            f"scheduler={type(changed).__name__} adds noise in another way than the policy was trained with, so it "
            "cannot denoise for it: use ddpm, ddim or dpm_solver"
        )
    policy.noise_scheduler = changed


def find_scheduler(name: str) -> dict[str, Any]:
    """Return the leaf of `conf/scheduler/` of this name, with those that it builds on.

    Raises:
        InputError: there is none.
    """
    folder = Path(CONF_DIR) / "scheduler"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise InputError(f"--scheduler {name} is not known: use {', '.join(known)}")
    leaf = yaml.safe_load((folder / f"{name}.yaml").read_text())
    bases = [base for base in leaf.pop("defaults", []) if base != "_self_"]
    merged: dict[str, Any] = {}
    for base in bases:
        merged |= find_scheduler(base)
    return merged | leaf


def check_steps(policy: DiffusionPolicy, num_inference_steps: int | None, key: str = "num_inference_steps") -> None:
    """Check that the policy can denoise in as many steps as it is asked to.

    Raises:
        InputError: it was trained with fewer.
    """
    if num_inference_steps is not None and not 1 <= num_inference_steps <= policy.num_train_timesteps:
        raise InputError(
            f"{key}={num_inference_steps} must be between 1 and {policy.num_train_timesteps}, the denoising steps in "
            "training"
        )
