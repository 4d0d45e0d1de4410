"""Name the folder of a run."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from getiaction.config.sweep import in_sweep
from getiaction.errors import InputError
from getiaction.run_folder import CHECKPOINTS


def slurm_folder(name: str) -> str:
    """Return the run folder that a SLURM job finds again when it is back from the queue.

    Raises:
        InputError: this is no such job.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"outputs/{name}/slurm_{job}"
    raise InputError(
        "training.resume=auto goes on with the run in output_dir, which has another name at each start: give "
        "output_dir=<folder>"
    )


def job_folder(output_dir: str) -> Path:
    """Return the folder of this Hydra job.

    Raises:
        InputError: `output_dir` was given, and Hydra takes another.
    """
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    given = [item for item in job.overrides.task if item.lstrip("+").startswith("output_dir=")]
    if given and Path(output_dir).resolve() != folder.resolve():
        instead = "give hydra.sweep.dir=<folder> for all runs of a sweep" if in_sweep() else "leave hydra.run.dir out"
        raise InputError(f"{given[-1]} would be passed over, since Hydra's folder is {folder}: {instead}")
    return folder


def run_folder(name: str, resume: Any) -> str:
    """Return a new folder outputs/<name>/<date_time>, or the one that `resume` names (true: the newest).

    Raises:
        InputError: there is nothing to resume.
    """
    if resume in (None, False, "auto"):
        if resume == "auto" and not in_sweep():
            return slurm_folder(name)
        if int(os.environ.get("RANK", 0)) > 0:  # only rank 0 writes; Hydra wants a folder on every rank
            return str(Path(tempfile.gettempdir()) / f"getiaction-{os.getuid()}-rank-{os.environ['RANK']}")
        folder = Path(f"outputs/{name}/{datetime.now():%Y-%m-%d_%H-%M-%S}")
        twins = (folder.with_name(f"{folder.name}_{number}") for number in range(2, 1000))
        return str(next(path for path in (folder, *twins) if not path.exists()))
    if resume is True:
        pattern = "*/*" if name == "default" else f"{name}/*"
        runs = [path.parent for path in Path("outputs").glob(f"{pattern}/{CHECKPOINTS}")]
        if not runs:
            raise InputError(
                f"training.resume=true finds no run with a checkpoint in outputs/{'' if name == 'default' else name}"
            )
        return str(max(runs, key=lambda run: run.stat().st_mtime))
    folder = Path(str(resume))
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(
            f"training.resume={resume} is no run folder with checkpoints: give outputs/<name>/<date_time>, or true "
            "for the newest"
        )
    return str(folder)
