"""Sweeps: go on with one that was interrupted, and tell which of its jobs failed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from getiaction.errors import InputError, TrainingError
from getiaction.files import claimed, is_claimed, replace_text
from getiaction.run_folder import RESULT

log = logging.getLogger(__name__)
held = contextlib.ExitStack()  # the folder of the sweep; not in `SweepLog`, which travels to the machines of its jobs
COMMAND = "command.json"
COMPLETE = "complete"
LAUNCHER = ("hydra/launcher", "hydra.launcher")  # where jobs run does not make them others


def in_sweep() -> bool:
    """Tell whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def sweep_folder(name: str, overrides: Sequence[str], hydra_overrides: Sequence[str]) -> str:
    """Return the folder of a sweep by the same command that was interrupted; a new one if there is none."""
    command = without_launcher([*overrides, *hydra_overrides])
    for folder in sorted(Path("outputs", name).glob("sweep_*"), reverse=True):
        if read_command(folder) == command and not (folder / COMPLETE).exists() and not is_claimed(folder):
            return str(folder)
    return f"outputs/{name}/sweep_{datetime.now():%Y-%m-%d_%H-%M-%S}"


def read_command(folder: Path) -> list[str] | None:
    """Return the overrides that a sweep was started with; None where that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / COMMAND).read_text())
    return None


def without_launcher(overrides: Sequence[str]) -> list[str]:
    """Return overrides without those that say where jobs run; their order numbers the jobs."""
    return [override for override in overrides if not override.startswith(LAUNCHER)]


class SweepLog(Callback):
    """Say what a sweep finds and what fails in it; Hydra calls this."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Hold the folder of the sweep, and write down its command."""
        folder, given = Path(config.hydra.sweep.dir), config.hydra.overrides
        if (folder / COMMAND).exists():
            done = len(list(folder.glob(f"*/{RESULT}")))
            log.info("going on with %s, %d jobs of it are complete; a new one: hydra.sweep.dir=<folder>", folder, done)
        held.enter_context(claimed(folder))
        replace_text(folder / COMMAND, json.dumps(without_launcher([*given.task, *given.hydra]), indent=1))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Say why a job failed; the others go on."""
        if job_return.status is not JobStatus.FAILED or config.hydra.mode is not RunMode.MULTIRUN:
            return
        error = job_return._return_value
        expected = isinstance(error, InputError | TrainingError)
        job = f"job {config.hydra.job.num} ({' '.join(job_return.overrides or [])})"
        log.error("%s failed: %s", job, error, exc_info=None if expected else error)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Mark the sweep as complete: no job failed."""
        folder = Path(config.hydra.sweep.dir)
        replace_text(folder / COMPLETE, "")
        held.close()
        log.info("done; to compare: getiaction report %s", folder)
