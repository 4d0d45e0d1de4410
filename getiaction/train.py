"""Train a Diffusion Policy: `python -m getiaction.train +preset=pusht_cpu`. `--help` explains the rest."""

from __future__ import annotations

import logging
from pathlib import Path

from getiaction.config.compose import main as hydra_main
from getiaction.config.schema import Config
from getiaction.errors import TrainingError

log = logging.getLogger(__name__)


def train(config: Config, folder: Path) -> dict[str, float]:
    """Train what `config` says; return the last metrics.

    Args:
        folder: the run folder, new or (with `training.resume`) one with checkpoints.

    Raises:
        InputError: the config or the dataset cannot work; nothing has been decoded or written yet.
        TrainingError: the run cannot go on.
    """
    import torch

    from getiaction.config import run
    from getiaction.config.checks import check_config
    from getiaction.config.dataset_checks import check_dataset
    from getiaction.config.record import check_folder, write_run_files
    from getiaction.data.metadata import find_dataset
    from getiaction.report.run import draw_report

    check_config(config)
    check_folder(config, folder)
    metadata = find_dataset(config.dataset.repo_id, config.dataset.root, config.dataset.revision)
    check_dataset(config, metadata)
    run.check_buildable(config, metadata)
    config.output_dir = str(folder)
    accelerator = run.start_accelerator(config, folder)
    try:
        trainer = run.build_trainer(config, metadata, accelerator, folder)
        write_run_files(config, folder, accelerator)
        metrics = trainer.fit()
        if accelerator.is_main_process:
            for picture in draw_report(folder, trainer.validator, trainer.best):
                log.info("picture: %s", picture)
            log.info("policy: %s", trainer.store.folder / "last" / "pretrained_model")
    except torch.OutOfMemoryError as error:
        raise TrainingError(run.memory_advice(config, accelerator)) from error
    finally:
        accelerator.end_training()  # trackers write what they hold
    return metrics


def run_hydra_job(config: Config) -> float | None:
    """Train under Hydra; return the metric that a sweep optimises; the loss where there is no such metric."""
    from hydra.core.hydra_config import HydraConfig

    from getiaction.config.launch import launch_processes, must_launch
    from getiaction.config.resume import resumed_config

    runtime = HydraConfig.get()
    folder = Path(runtime.runtime.output_dir)
    if config.resumes:
        config = resumed_config(config, list(runtime.overrides.task), folder)
    if must_launch(config):
        return launch_processes(config, folder)
    try:
        metrics = train(config, folder)
    except SystemExit:
        log.info("stopped; to go on: python -m getiaction.train training.resume=%s", folder)
        raise
    return metrics.get(config.sweep_metric, metrics.get("loss"))


def main() -> None:
    """Run as a command."""
    hydra_main(run_hydra_job, "train")


if __name__ == "__main__":
    main()
