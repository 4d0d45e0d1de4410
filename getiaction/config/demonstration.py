"""Check what demonstrations are asked for, and say how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from getiaction import __version__
from getiaction.config.schema import DemonstrateConfig
from getiaction.errors import InputError
from getiaction.random import Purpose, derive_seed
from getiaction.simulation.environment import Demonstrable, Environment

README = """# Demonstrations by a script

{episodes} episodes, {frames} frames at {fps} Hz: {task}

Recorded by the scripted expert (version {expert}) of getiaction {version}, which succeeded in
{episodes} of {attempts} attempts; the others are left out. The same command makes the same episodes again:

    python -m getiaction.demonstrate env={name} {arguments}

{done}

LeRobotDataset v3.0. Apache-2.0.
"""
UNDISTURBED = "`action` is what the expert asked for, and what was done."
DISTURBED = """`action` is what the expert asked for. What was done is that plus a drifting noise, {:g} of the distance
asked for (standard deviation), so that the recordings show how it comes back from where it does not want to be."""


def say_how(
    config: DemonstrateConfig, environment: Demonstrable, about: dict[str, Any], *, attempts: int, frames: int
) -> str:
    """Return the dataset's README: what it is, and the command that makes it again."""
    return README.format(
        **{key: about[key] for key in ("version", "expert")},
        episodes=config.episodes,
        attempts=attempts,
        frames=frames,
        fps=environment.fps,
        name=environment.name,
        task=environment.task,
        done=DISTURBED.format(config.disturbance) if config.disturbance else UNDISTURBED,
        arguments=" ".join(f"{key}={getattr(config, key)}" for key in ("episodes", "seed", "midway", "disturbance")),
    )


def check_numbers(config: DemonstrateConfig) -> None:
    """Check the numbers of a recording.

    Raises:
        InputError: the first that cannot be.
    """
    for key, least in (("episodes", 1), ("seed", 0), ("num_workers", 0)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise InputError(f"{key}={value} must be a whole number of at least {least}")
    if not 0 <= config.disturbance < float("inf"):
        raise InputError(f"disturbance={config.disturbance} must be 0 or more, a share of the distance asked for")
    if not 0 <= config.midway <= 1:
        raise InputError(f"midway={config.midway} must be between 0 and 1, a share of the episodes")


def check_place(environment: Environment, root: Path) -> None:
    """Check that there is an expert to record, and that `root` is free.

    Raises:
        InputError: one of them is not so.
    """
    if not hasattr(environment, "make_expert"):
        raise InputError(f"env={environment.name} has no scripted expert: the environments that have one: pusht")
    if root.exists():
        raise InputError(f"{root} exists, and would be overwritten: give another output_dir")


def what_decides(config: DemonstrateConfig, expert: int) -> dict[str, Any]:
    """Return all that the attempts depend on; `expert` is the expert's version."""
    decides = {key: getattr(config, key) for key in ("seed", "midway", "disturbance")}
    return {"env": dict(config.env), **decides, "version": __version__, "expert": expert}


def seeds_of(seed: int, number: int) -> tuple[int, int]:
    """Return the seeds of an attempt's start and of its expert."""
    start, expert = (derive_seed(seed, Purpose.DEMONSTRATION, number, which) for which in (0, 1))
    return start, expert % 2**32
