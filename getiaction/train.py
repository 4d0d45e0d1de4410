"""Train a Diffusion Policy: `python -m getiaction.train +preset=pusht_cpu`. `--help` explains the rest."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from getiaction.config.compose import main as hydra_main
from getiaction.config.folders import job_folder
from getiaction.config.overrides import as_override
from getiaction.config.schema import Config
from getiaction.errors import TrainingError
from getiaction.run_folder import last_policy
from getiaction.startup import release_collector

log = logging.getLogger(__name__)


def train(config: Config, folder: Path) -> dict[str, float]:
    """Train what `config` says; return the last metrics.

    Args:
        folder: the run folder, new or (with `training.resume`) one with checkpoints.

    Raises:
        InputError: the config or the dataset cannot work; nothing has been decoded or written yet.
        TrainingError: the run cannot go on.
    """
    from safetensors import SafetensorError

    from getiaction.config import run
    from getiaction.config.memory import memory_advice, ran_out
    from getiaction.config.prepare import find_checked_data
    from getiaction.config.record import check_folder, write_result, write_run_files
    from getiaction.files import claimed, is_full
    from getiaction.report.run import draw_report

    check_folder(config, folder)
    mixture = find_checked_data(config)
    run.check_buildable(config, mixture)
    config.output_dir = str(folder)
    accelerator = run.start_accelerator(config, folder)
    is_main = accelerator.is_main_process
    held = contextlib.ExitStack()
    try:
        if is_main:
            held.enter_context(claimed(folder))
        trainer = run.build_trainer(config, mixture, accelerator, folder)
        write_run_files(config, folder, accelerator)
        release_collector()
        metrics = trainer.fit()
        if is_main:
            for picture in draw_report(folder, trainer.validator, trainer.best):
                log.info("picture: %s", picture)
            log.info("policy: %s", last_policy(folder))
            write_result(folder, trainer.step, metrics)
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if ran_out(error):
            raise TrainingError(memory_advice(config, accelerator)) from error
        if is_full(error):
            again = as_override("training.resume", str(folder))
            raise TrainingError(
                f"no room to write to {folder} ({error}); what was saved stays. Make room, then go on: {again}"
            ) from error
        raise
    finally:
        accelerator.end_training()  # trackers write what they hold
        held.close()
    return metrics


def run_hydra_job(config: Config) -> float | None:
    """Train under Hydra; return the metric that a sweep optimises; the loss where there is no such metric."""
    from hydra.core.hydra_config import HydraConfig

    from getiaction.config.cluster import requeue
    from getiaction.config.launch import launch_processes, must_launch
    from getiaction.config.record import read_result
    from getiaction.config.resume import can_go_on, take_up
    from getiaction.config.sweep import in_sweep

    runtime = HydraConfig.get()
    folder = job_folder(config.output_dir)
    if in_sweep() and not config.resumes:
        config.training.resume = "auto"
    config = take_up(config, list(runtime.overrides.task), folder)
    metrics = read_result(folder, config) if config.resumes else None
    try:
        if metrics is not None:
            log.info("%s is complete", folder)
        elif must_launch(config):
            metrics = launch_processes(config, folder)
        else:
            metrics = train(config, folder)
    except SystemExit as stopped:
        if can_go_on(folder):
            log.info("stopped; to go on: python -m getiaction.train %s", as_override("training.resume", str(folder)))
        requeue(int(stopped.code or 0) - 128)
        raise
    return metrics.get(config.sweep_metric, metrics.get("loss"))


def main() -> None:
    """Run as a command."""
    hydra_main(run_hydra_job, "train")


if __name__ == "__main__":
    main()
