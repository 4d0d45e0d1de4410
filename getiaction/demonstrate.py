"""Record a scripted expert: `python -m getiaction.demonstrate env=pusht episodes=100 seed=0`."""

from __future__ import annotations

import logging
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from getiaction.config.compose import main as hydra_main
from getiaction.config.overrides import command_for
from getiaction.config.schema import DemonstrateConfig
from getiaction.errors import TrainingError
from getiaction.files import claimed
from getiaction.machine import count_cores
from getiaction.startup import release_collector

log = logging.getLogger(__name__)


def demonstrate(config: DemonstrateConfig, folder: Path) -> Path:
    """Record what `config` says; return the dataset's folder.

    Raises:
        InputError: there is no expert for this environment, or the folder holds something else; nothing was written.
        TrainingError: the expert fails nearly always.
    """
    from getiaction.config.demonstration import check_numbers, check_place, say_how, seeds_of, what_decides
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
            num_workers=count_cores() if config.num_workers is None else config.num_workers,
        )
    except BrokenProcessPool as error:
        raise TrainingError(f"{error}: for lack of memory, perhaps; lower num_workers") from error
    log.info("%d of %d attempts succeeded; writing the dataset", len(numbers), tried)
    readme = say_how(config, environment, about, attempts=tried, frames=sum(map(attempts.length, numbers)))
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
