"""Record a scripted expert: `python -m getiaction.demonstrate env=pusht episodes=100 seed=0`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from getiaction.config.compose import main as hydra_main
from getiaction.config.overrides import command_for
from getiaction.config.schema import DemonstrateConfig
from getiaction.errors import InputError, TrainingError
from getiaction.files import claimed
from getiaction.startup import release_collector

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

    from getiaction import __version__
    from getiaction.config.evaluation import build_environment
    from getiaction.data.writer import write_dataset
    from getiaction.random import Purpose, derive_seed
    from getiaction.simulation.demonstrations import Attempts, collect

    for key, least in (("episodes", 1), ("seed", 0), ("num_workers", 0)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise InputError(f"{key}={value} must be a whole number of at least {least}")
    make: Any = build_environment(config.env)
    environment = make()
    if not 0 <= config.disturbance < float("inf"):
        raise InputError(f"disturbance={config.disturbance} must be 0 or more, a share of the distance asked for")
    if not 0 <= config.midway <= 1:
        raise InputError(f"midway={config.midway} must be between 0 and 1, a share of the episodes")
    if not hasattr(environment, "make_expert"):
        raise InputError(f"env={environment.name} has no scripted expert: the environments that have one: pusht")
    root = folder / "dataset"
    if root.exists():
        raise InputError(f"{root} exists, and would be overwritten: give another output_dir")

    def seeds(number: int) -> tuple[int, int]:
        start, expert = (derive_seed(config.seed, Purpose.DEMONSTRATION, number, which) for which in (0, 1))
        return start, expert % 2**32

    about = {
        "env": dict(config.env),
        "seed": config.seed,
        "midway": config.midway,
        "disturbance": config.disturbance,
        "version": __version__,
        "expert": environment.make_expert(0).version,
    }
    attempts = Attempts(folder / "attempts", about)
    release_collector()
    workers = os.cpu_count() or 1 if config.num_workers is None else config.num_workers
    try:
        numbers, tried = collect(
            make,
            attempts,
            episodes=config.episodes,
            seeds=seeds,
            midway=config.midway,
            disturbance=config.disturbance,
            num_workers=workers,
        )
    except RuntimeError as error:
        raise TrainingError(str(error)) from error
    log.info("%d of %d attempts succeeded; writing the dataset", len(numbers), tried)
    frames = sum(len(np.load(attempts.path(number))["action"]) for number in numbers)
    readme = README.format(
        episodes=len(numbers),
        attempts=tried,
        frames=frames,
        fps=environment.fps,
        name=environment.name,
        task=environment.task,
        version=__version__,
        expert=about["expert"],
        done=DISTURBED.format(config.disturbance) if config.disturbance else UNDISTURBED,
        arguments=" ".join(f"{key}={getattr(config, key)}" for key in ("episodes", "seed", "midway", "disturbance")),
    )
    recordings = (attempts.read(number) for number in numbers)
    write_dataset(root, recordings, repo_id=config.repo_id, fps=environment.fps, task=environment.task, readme=readme)
    shutil.rmtree(attempts.folder)
    log.info("dataset: %s; train on it with dataset.root=%s", root, root)
    return root


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
