"""Let a trained policy act by another scheduler, in other denoising steps, or for longer before it looks again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from getiaction.config.build import build_group, parameters_of
from getiaction.config.compose import CONF_DIR
from getiaction.config.problems import Problem
from getiaction.errors import InputError
from getiaction.policy import DiffusionPolicy
from getiaction.policy.noising import Noising, is_flow, missed_noise

log = logging.getLogger(__name__)
STARTS_LATE, STARTS_TOO_LATE = 0.3, 0.6
"""Shares of the noise (of its variance) missed at the start from which acting suffers, and from which it is noise."""
TRAINED = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "shift", "prediction_type")
"""What a policy was trained with, and keeps."""


def change_scheduler(policy: DiffusionPolicy, scheduler: Mapping[str, Any]) -> None:
    """Let `policy` denoise by `scheduler`, a leaf of `conf/scheduler/`, on the noise that it was trained with.

    The policy's own settings hold (clipping, the spacing of steps), unless `scheduler` says otherwise than its leaf.

    Raises:
        InputError: the scheduler cannot be built, or would change what the policy was trained with.
    """
    own, target = policy.noise_scheduler.config, scheduler["_target_"]
    usual = usual_values(target)
    asked = {key: value for key, value in scheduler.items() if key[0] != "_" and usual.get(key, own) != value}
    trained = {**{key: own.get(key) for key in TRAINED}, "prediction_type": policy.prediction_type}
    if other := [key for key in TRAINED if key in asked and asked[key] != trained[key]]:
        raise InputError(
            f"scheduler.{other[0]}={asked[other[0]]} cannot change after training, where it was "
            f"{trained[other[0]]}: leave it out"
        )
    takes = parameters_of(target)
    unset = own.get("_use_default_values", [])
    kept = {key: value for key, value in own.items() if key in takes and (key in TRAINED or key not in unset)}
    asked = {key: value for key, value in asked.items() if key in takes or key != "prediction_type"}  # flow's is ours
    changed = build_group("scheduler", {"_target_": target, **kept, **asked})
    if not adds_noise_like(policy, changed):
        fit = "flow_matching" if is_flow(policy.noise_scheduler) else "ddpm, ddim or dpm_solver"
        raise InputError(
            f"scheduler={type(changed).__name__} adds noise in another way than the policy was trained with, so it "
            f"cannot denoise for it: use {fit}"
        )
    policy.noise_scheduler = changed


def adds_noise_like(policy: DiffusionPolicy, scheduler: Any) -> bool:
    """Tell whether a scheduler, fresh, adds as much noise at every step as the policy was trained with."""
    try:
        own, other = policy.noising.noise.cpu(), Noising(scheduler, policy.prediction_type).noise
    except ValueError:
        return False
    return other.shape == own.shape and bool(other.allclose(own, atol=1e-6))


def usual_values(target: str) -> dict[str, Any]:
    """Return what the leaf of `conf/scheduler/` that builds this class says; nothing for another class."""
    leaves = (find_scheduler(path.stem) for path in (Path(CONF_DIR) / "scheduler").glob("*.yaml"))
    return next((leaf for leaf in leaves if leaf["_target_"] == target), {})


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
        InputError: it was trained with fewer, or it would start where little noise is left.
    """
    if num_inference_steps is not None and not 1 <= num_inference_steps <= policy.num_train_timesteps:
        raise InputError(
            f"{key}={num_inference_steps} must be between 1 and {policy.num_train_timesteps}, the denoising steps in "
            "training"
        )
    steps = num_inference_steps or policy.num_inference_steps
    if steps <= policy.num_train_timesteps and (problem := few_steps(policy.noise_scheduler, steps, key)):
        if problem.is_error:
            raise InputError(problem.message)
        log.warning("warning: %s", problem.message)


def change_action_steps(policy: DiffusionPolicy, n_action_steps: int, key: str = "n_action_steps") -> None:
    """Let `policy` execute so many actions of each chunk before it looks again.

    Raises:
        InputError: its chunks do not hold so many.
    """
    longest = policy.horizon - policy.n_obs_steps + 1
    if not 1 <= n_action_steps <= longest:
        raise InputError(
            f"{key}={n_action_steps} must be between 1 and the policy's horizon - n_obs_steps + 1 = {longest}"
        )
    policy.n_action_steps = n_action_steps


def few_steps(scheduler: Any, steps: int, key: str) -> Problem | None:
    """Return what is wrong with so few denoising steps that pure noise is taken for half-denoised actions, or None."""
    if (missed := missed_noise(scheduler, steps)) <= STARTS_LATE:
        return None
    return Problem(
        f"{key}={steps} starts {type(scheduler).__name__} where {missed:.0%} of the noise is gone already, and takes "
        f"pure noise for that: use at least {least_steps(scheduler)}, or +scheduler.timestep_spacing=trailing",
        is_error=missed > STARTS_TOO_LATE,
    )


def least_steps(scheduler: Any) -> int:
    """Return the fewest denoising steps that `few_steps` has nothing against."""
    total = int(scheduler.config.num_train_timesteps)
    return next((steps for steps in range(1, total) if missed_noise(scheduler, steps) <= STARTS_LATE), total)
