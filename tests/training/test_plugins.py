"""Sweeps by Hydra's plugins: jobs of submitit, which come back from the queue, and trials of Optuna."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from getiaction.config.sweep import COMPLETE


def needs(plugin: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        find_spec(f"hydra_plugins.{plugin}") is None, reason=f"{plugin} is not here: pip install 'getiaction[sweeps]'"
    )


@pytest.fixture(autouse=True)
def _end_jobs(tmp_path: Path) -> Iterator[None]:
    """End the jobs that submitit has started for this test, which outlive the command."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in argument for argument in process.info["cmdline"] or []):
            process.kill()


def jobs_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the jobs of submitit that run below a command."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it is over, or not yet begun
            if "submitit.core._submit" in child.cmdline() and "SUBMITIT_LOCAL_GLOBALID" in child.environ():
                found.append(child)
    return found


@needs("hydra_submitit_launcher")
def test_jobs_of_submitit_come_back_from_the_queue(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    length = ("training.max_steps=200", "training.save_every=null", "training.log_every=2", "hardware.num_threads=1")
    patience = '+hydra.launcher.setup=["sleep 2"]'  # submitit 1.5 starts a job before it makes the folder it writes to
    command = ("-m", "hydra/launcher=submitit_local", patience, *tiny.overrides(*length), "seed=0")
    runs = tmp_path / "outputs/pusht_cpu"
    process = tiny.start_command(tmp_path / "sweep", *command)
    helpers.wait_until(lambda: jobs_of(process), process, tmp_path / "sweep")
    (job,) = jobs_of(process)
    helpers.wait_until(lambda: any(map(helpers.losses, runs.glob("*/0"))), process, tmp_path / "sweep")
    (folder,) = runs.iterdir()
    job.send_signal(signal.SIGUSR2)  # as SLURM does when the time is nearly over
    assert helpers.finish(process) == 0, helpers.said(tmp_path / "sweep")
    assert "at step" in (folder / "0/train.log").read_text()
    tiny.fit(tmp_path / "alone", *length)
    helpers.assert_same_bits(folder / "0", tmp_path / "alone", step=200)


@needs("hydra_optuna_sweeper")
def test_trials_of_optuna_are_not_repeated(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    sweeper = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1")
    space = ("hydra.sweeper.sampler.seed=0", "ema.power=interval(0.5, 0.9)", "seed=choice(0, 1)")
    command = ("-m", *sweeper, *tiny.overrides("hardware.num_threads=1"), *space)
    assert helpers.finish(tiny.start_command(tmp_path / "one", *command)) == 0, helpers.said(tmp_path / "one")
    (folder,) = (tmp_path / "outputs/pusht_cpu").iterdir()
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert best["best_params"].keys() == {"ema.power", "seed"}
    (folder / COMPLETE).unlink()  # as if it had been killed at its end
    (folder / "2/result.json").unlink()
    assert helpers.finish(tiny.start_command(tmp_path / "two", *command)) == 0, helpers.said(tmp_path / "two")
    said = helpers.said(tmp_path / "two")
    assert [f"{folder / number} is complete" in said for number in "012"] == [True, True, False]
    assert yaml.safe_load((folder / "optimization_results.yaml").read_text()) == best
