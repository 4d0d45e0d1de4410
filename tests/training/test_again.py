"""What is started again goes on: sweeps, jobs that come back from the queue, folders that somebody else is in."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig

from getiaction.check import check
from getiaction.config.compose import compose
from getiaction.config.launch import overrides_for
from getiaction.config.sweep import COMPLETE, sweep_folder
from getiaction.errors import InputError
from getiaction.files import claimed
from getiaction.training.metrics import read_metrics

LONG = ("training.max_steps=120", "training.save_every=60", "training.log_every=2", "hardware.num_threads=1")


def sweep(tiny: Any, folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start a sweep in `folder.parent`; it says what it says to `<folder>.log`."""
    return tiny.start_command(folder, "-m", *tiny.overrides("hardware.num_threads=1", *more))


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_job_that_fails_does_not_end_the_sweep_and_started_again_it_skips_what_is_complete(
    tiny: Any, helpers: Any, tmp_path: Path
) -> None:
    jobs = ("optimizer.lr=-1,1e-3", "seed=0,1")
    assert helpers.finish(sweep(tiny, tmp_path / "one", *jobs)) == 2
    said = helpers.said(tmp_path / "one")
    assert said.count("failed: optimizer.lr=-1 must be a positive number") == 2
    (folder,) = (tmp_path / "outputs/pusht_cpu").iterdir()
    assert [number for number in range(4) if (folder / f"{number}/result.json").exists()] == [2, 3]
    before = (folder / "2/metrics.jsonl").stat()
    assert helpers.finish(sweep(tiny, tmp_path / "two", *jobs)) == 2
    assert f"going on with {folder.relative_to(tmp_path)}, 2 jobs of it are complete" in helpers.said(tmp_path / "two")
    assert (folder / "2/metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in (tmp_path / "outputs/pusht_cpu").iterdir()] == [folder.name]


def test_a_sweep_that_was_killed_goes_on_where_it_was(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    jobs = ("seed=0,1", "training.max_steps=100", "training.save_every=20", "training.log_every=1")
    process = sweep(tiny, tmp_path / "one", *jobs)
    runs = tmp_path / "outputs/pusht_cpu"
    helpers.wait_until(lambda: any(runs.glob("sweep_*/1/checkpoints/[0-9]*")), process, tmp_path / "one")
    helpers.kill(process, signal.SIGKILL)
    (folder,) = runs.iterdir()
    assert max(helpers.steps_saved(folder / "1")) < 100
    assert helpers.finish(sweep(tiny, tmp_path / "two", *jobs)) == 0, helpers.said(tmp_path / "two")
    said = helpers.said(tmp_path / "two")
    assert f"{folder / '0'} is complete" in said
    assert f"resuming {folder / '1'} at step" in said
    assert f"getiaction report {folder.relative_to(tmp_path)}" in said
    tiny.fit(tmp_path / "alone", *jobs[1:], "seed=1", "hardware.num_threads=1")
    assert helpers.losses(folder / "1") == helpers.losses(tmp_path / "alone")
    assert (folder / COMPLETE).exists()


def test_processes_of_a_job_go_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that a sweep starts for each process says so: there it is no sweep."""
    typed = ["+preset=pusht_multigpu", "seed=1", "output_dir=elsewhere", "training.resume=auto"]
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(overrides=SimpleNamespace(task=typed)))
    config = compose(["+preset=pusht_multigpu", "training.resume=null"])
    assert overrides_for(config, Path("a run/1")) == [*typed[:2], "output_dir='a run/1'"]
    config.training.resume = "a run/1"
    assert overrides_for(config, Path("a run/1")) == [
        *typed[:2],
        "output_dir='a run/1'",
        "training.resume='a run/1'",
    ]


def test_a_sweep_that_is_complete_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/mine/sweep_2026-01-01_00-00-00")
    folder.mkdir(parents=True)
    (folder / "command.json").write_text('["+preset=pusht_cpu", "seed=0"]')
    command = ("mine", ["+preset=pusht_cpu", "seed=0"], ["hydra/launcher=submitit_local"])
    assert sweep_folder(*command) == str(folder)
    assert sweep_folder("mine", ["+preset=pusht_cpu", "seed=0,1"], []) != str(folder)
    assert sweep_folder("mine", ["seed=0", "+preset=pusht_cpu"], []) != str(folder)  # other numbers of the jobs
    with claimed(folder):  # it is running
        assert sweep_folder(*command) != str(folder)
    (folder / COMPLETE).touch()
    assert sweep_folder(*command) != str(folder)


# --- the queue --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend to be SLURM's job 417; return the file of what its `scontrol` is asked for."""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "417")
    return tmp_path / "asked"


def test_a_warning_of_slurm_saves_and_requeues_and_the_same_command_goes_on(
    tiny: Any, helpers: Any, tmp_path: Path, asked: Path
) -> None:
    command = tiny.overrides(*LONG, "training.resume=auto")
    process = tiny.start_command(tmp_path / "run", *command)
    folder = tmp_path / "outputs/pusht_cpu/slurm_417"
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 5, process, tmp_path / "run")
    assert helpers.kill(process, signal.SIGUSR1) == 128 + signal.SIGUSR1
    assert asked.read_text() == "requeue 417\n"
    (step,) = helpers.steps_saved(folder)
    assert step < 120
    again = tiny.start_command(tmp_path / "run", *command)
    assert helpers.finish(again) == 0, helpers.said(tmp_path / "run")
    assert f"resuming {folder} at step {step} of 120" in helpers.said(tmp_path / "run")
    tiny.fit(tmp_path / "alone", *LONG)
    helpers.assert_same_bits(folder, tmp_path / "alone", step=120)
    once_more = tiny.start_command(tmp_path / "run", *command)
    assert helpers.finish(once_more) == 0
    assert f"{folder} is complete" in helpers.said(tmp_path / "run")


def test_a_warning_stops_several_processes_and_requeues_once(
    tiny: Any, helpers: Any, tmp_path: Path, asked: Path
) -> None:
    folder = tmp_path / "run"
    process = tiny.start(folder, *LONG, "training.max_steps=100000", "hardware.num_processes=2")
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 5, process, folder)
    os.killpg(process.pid, signal.SIGUSR1)  # as a cluster does: to every process that it knows
    assert helpers.finish(process) == 128 + signal.SIGUSR1
    assert helpers.steps_saved(folder) == [read_metrics(folder)[-1]["step"]]
    assert asked.read_text() == "requeue 417\n"


def test_auto_needs_a_folder_that_stays(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match="output_dir, which has another name at each start"):
        tiny.config("training.resume=auto")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = tiny.start(folder, *LONG, "training.max_steps=100000", "training.save_every=null")
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 2, first, folder)
    with pytest.raises(InputError, match=f"process {first.pid} of .* is at work"):
        tiny.train(folder)
    assert len(helpers.losses(folder)) > 2
    assert helpers.kill(first, signal.SIGKILL) == -signal.SIGKILL
    tiny.train(folder)  # who died holds nothing
    assert helpers.steps_saved(folder) == [2, 4]


def test_a_run_that_was_killed_before_it_saved_starts_anew(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = tiny.start(folder, *LONG)
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 2, first, folder)
    helpers.kill(first, signal.SIGKILL)
    assert helpers.steps_saved(folder) == []
    again = tiny.start(folder, *LONG, "training.resume=auto", "training.max_steps=4")
    assert helpers.finish(again) == 0, helpers.said(folder)
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == [2, 4]


def test_a_result_belongs_to_a_run_that_is_complete(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    metrics = tiny.train(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == {"step": 4, "metrics": metrics}


def test_a_folder_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        assert "nothing keeps a second process from writing to" in caplog.text


def test_check_refuses_what_training_would(tiny: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(asdict(tiny.config())))
    again = f"training.resume={tmp_path / 'run'}"
    assert check(tiny.overrides(again))[-1] == "all is well"
    with pytest.raises(InputError, match=r"optimizer.lr=1 cannot change in a run that resumes"):
        check(tiny.overrides(again, "optimizer.lr=1"))
    with pytest.raises(InputError, match="already holds a run"):
        check(tiny.overrides(f"output_dir={tmp_path / 'run'}"))
