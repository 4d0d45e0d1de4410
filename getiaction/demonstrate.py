"""Record a scripted expert: `python -m getiaction.demonstrate env=pusht episodes=100 seed=0`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from getiaction.config.compose import main as hydra_main
from getiaction.config.overrides import command_for
from getiaction.config.schema import DemonstrateConfig
from getiaction.errors import InputError, TrainingError
from getiaction.files import claimed
from getiaction.startup import release_collector

if TYPE_CHECKING:
    from getiaction.simulation.environment import Environment

log = logging.getLogger(__name__)
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


def demonstrate(config: DemonstrateConfig, folder: Path) -> Path:
    """Record what `config` says; return the dataset's folder.

    Raises:
        InputError: there is no expert for this environment, or the folder holds something else; nothing was written.
        TrainingError: the expert fails nearly always.
    """
    import numpy as np

    from getiaction.config.evaluation import build_environment
    from getiaction.data.writer import write_dataset
    from getiaction.simulation.demonstrations import Attempts, collect

    check_numbers(config)
    make: Any = build_environment(config.env)
    environment = make()
    root = folder / "dataset"
    check_place(environment, root)
    about = what_decides(config, environment.make_expert(0).version)
    attempts = Attempts(folder / "attempts", about)
    release_collector()
    try:
        numbers, tried = collect(
            make,
            attempts,
            episodes=config.episodes,
            seeds=partial(seeds_of, config.seed),
            midway=config.midway,
            disturbance=config.disturbance,
            num_workers=os.cpu_count() or 1 if config.num_workers is None else config.num_workers,
        )
    except RuntimeError as error:
        raise TrainingError(str(error)) from error
    log.info("%d of %d attempts succeeded; writing the dataset", len(numbers), tried)
    frames = sum(len(np.load(attempts.path(number))["action"]) for number in numbers)
    readme = README.format(
        **{key: about[key] for key in ("version", "expert")},
        episodes=len(numbers),
        attempts=tried,
        frames=frames,
        fps=environment.fps,
        name=environment.name,
        task=environment.task,
        done=DISTURBED.format(config.disturbance) if config.disturbance else UNDISTURBED,
        arguments=" ".join(f"{key}={getattr(config, key)}" for key in ("episodes", "seed", "midway", "disturbance")),
    )
    recordings = (attempts.read(number) for number in numbers)
    write_dataset(root, recordings, repo_id=config.repo_id, fps=environment.fps, task=environment.task, readme=readme)
    shutil.rmtree(attempts.folder)
    log.info("dataset: %s; train on it with dataset.root=%s", root, root)
    return root


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
    from getiaction import __version__

    decides = {key: getattr(config, key) for key in ("seed", "midway", "disturbance")}
    return {"env": dict(config.env), **decides, "version": __version__, "expert": expert}


def seeds_of(seed: int, number: int) -> tuple[int, int]:
    """Return the seeds of an attempt's start and of its expert."""
    from getiaction.random import Purpose, derive_seed

    start, expert = (derive_seed(seed, Purpose.DEMONSTRATION, number, which) for which in (0, 1))
    return start, expert % 2**32


def run_hydra_job(config: DemonstrateConfig) -> None:
    """Record under Hydra."""
    folder = Path(config.output_dir)
    try:
        with claimed(folder):
            demonstrate(config, folder)
    except KeyboardInterrupt:
        again = command_for("demonstrate", sys.argv[1:], folder)
        log.info("stopped; finished episodes stay. To go on: %s", again)
        sys.exit(130)


def main() -> None:
    """Run as a command."""
    hydra_main(run_hydra_job, "demonstrate", DemonstrateConfig)


if __name__ == "__main__":
    main()
