"""Two real processes on the CPU (gloo): the same run as one process with the same global batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from getiaction.training.metrics import read_metrics

TWO = ("hardware.num_processes=2", "hardware.num_threads=1", "training.batch_size=4", "training.max_steps=6")
LAUNCHERS = {
    "plain": (),
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "accelerate": (str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes=2"),
}


@pytest.fixture(scope="module")
def alone(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    tiny.fit(folder, "training.batch_size=8", "training.max_steps=6")
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(tiny: Any, helpers: Any, tmp_path: Path, alone: Path, launcher: str) -> None:
    folder = tmp_path / "run"
    process = tiny.start(folder, *TWO, launcher=LAUNCHERS[launcher])
    assert helpers.finish(process) == 0, helpers.said(folder)
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert helpers.losses(folder) == pytest.approx(helpers.losses(alone), rel=1e-4)
    assert [line["step"] for line in read_metrics(folder) if "val_loss" in line] == [6]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"000002", "000004", "000006", "last"}
    assert_close_weights(folder, alone)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def assert_close_weights(folder: Path, other: Path) -> None:
    for kind in ("pretrained_model", "training_state"):
        mine, theirs = (load_file(run / "checkpoints/last" / kind / "model.safetensors") for run in (folder, other))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value.numpy() == pytest.approx(theirs[key].numpy(), abs=1e-4), key


def test_pictures_and_accumulation_in_two_processes(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    more = (*helpers.WITH_PICTURES, "training.max_steps=3")
    tiny.fit(tmp_path / "alone", *more, "training.batch_size=8")
    folder = tmp_path / "run"
    split = ("training.batch_size=2", "training.gradient_accumulation_steps=2")
    process = tiny.start(folder, *more, *TWO, *split, "training.max_steps=3")
    assert helpers.finish(process) == 0, helpers.said(folder)
    assert helpers.losses(folder) == pytest.approx(helpers.losses(tmp_path / "alone"), rel=1e-4)


def test_a_process_that_dies_ends_the_run_with_an_error_and_it_can_go_on(
    tiny: Any, helpers: Any, tmp_path: Path
) -> None:
    length = ("training.max_steps=60", "training.save_every=4")
    process = tiny.start_command(tmp_path / "run", *tiny.overrides(*TWO, *length))
    runs = tmp_path / "outputs/pusht_cpu"
    helpers.wait_until(lambda: any(runs.glob("*/checkpoints/[0-9]*")), process, tmp_path / "run")
    workers = workers_of(process)
    workers["1"].kill()
    assert helpers.finish(process) != 0
    assert_all_end(list(workers.values()))
    (folder,) = runs.iterdir()
    assert helpers.steps_saved(folder)[-1] < 60
    resumed = tiny.start_command(tmp_path / "resumed", f"training.resume={folder.relative_to(tmp_path)}")
    assert helpers.finish(resumed) == 0, helpers.said(tmp_path / "resumed")
    tiny.fit(tmp_path / "alone", "training.batch_size=8", *length)
    assert helpers.losses(folder) == pytest.approx(helpers.losses(tmp_path / "alone"), rel=1e-3)
    assert list(runs.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        ("command", signal.SIGTERM, 143),  # kill, a container that stops
        ("group", signal.SIGINT, 130),  # Ctrl-C reaches every process of the terminal
        ("rank 1", signal.SIGTERM, None),  # a scheduler that is about to take one machine back
    ],
)
def test_a_signal_stops_all_processes_at_one_step(
    tiny: Any, helpers: Any, tmp_path: Path, target: str, number: signal.Signals, code: int | None
) -> None:
    folder = tmp_path / "run"
    process = tiny.start(folder, *TWO, "training.max_steps=600", "training.save_every=null", "training.log_every=2")
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 2, process, folder)
    workers = workers_of(process)
    send = {"command": process.send_signal, "rank 1": workers["1"].send_signal}
    send.get(target, lambda signum: os.killpg(process.pid, signum))(number)
    assert_all_end(list(workers.values()))
    returned = helpers.finish(process)
    assert returned in ((code,) if code else range(1, 256))
    (step,) = helpers.steps_saved(folder)
    assert step == read_metrics(folder)[-1]["step"] < 600
    assert f"to go on: python -m getiaction.train training.resume={folder}" in helpers.said(folder)


def workers_of(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Return the training processes that a command has started, by rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}


def assert_all_end(processes: list[psutil.Process]) -> None:
    """Wait until processes have ended; end those that hang."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    for process in alive:
        process.kill()
    assert not alive
