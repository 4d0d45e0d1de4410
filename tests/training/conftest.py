"""Share a tiny run: a small dataset, a small network, in this process or in one of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import warm
from accelerate.state import AcceleratorState
from composing import compose
from safetensors.torch import load_file

from getiaction.config import run
from getiaction.config.overrides import quote
from getiaction.config.resume import resumed_config
from getiaction.config.schema import Config
from getiaction.config.sources import find_data
from getiaction.train import train
from getiaction.training.loop import Trainer
from getiaction.training.metrics import read_metrics

TINY = (
    "+preset=pusht_cpu",
    "dataset.episodes=null",
    "backbone=none",
    "unet.down_dims=[16,32]",
    "lr_scheduler.num_warmup_steps=3",
    "optimizer.lr=1e-3",
    "training.batch_size=4",
    "training.max_steps=4",
    "training.log_every=1",
    "training.save_every=2",
    "validation.every=null",
    "validation.max_sampled=2",
)
WITH_PICTURES = (  # ResNet-18: ten times slower
    "backbone=resnet18",
    "backbone.norm=group",
    "backbone.resize_shape=[40,40]",
    "backbone.crop_shape=[36,36]",
)
PATIENCE = 300  # seconds until a test gives up waiting for a process


@dataclass(frozen=True)
class TinyRun:
    """Start tiny runs; `more` are overrides on top of `TINY`."""

    root: Path

    def overrides(self, *more: str) -> list[str]:
        return [*TINY, f"dataset.root={self.root}", *more]

    def config(self, *more: str) -> Config:
        return compose(self.overrides(*more))

    def train(self, folder: Path, *more: str) -> dict[str, float]:
        """Train in this process, as the command does: with config, report and trackers."""
        folder.mkdir(parents=True, exist_ok=True)
        return train(self.config(f"output_dir={quote(str(folder))}", *more), folder)

    def fit(self, folder: Path, *more: str) -> dict[str, float]:
        """Train in this process and leave only checkpoints and metrics."""
        return self.trainer(folder, *more).fit()

    def trainer(self, folder: Path, *more: str) -> Trainer:
        """Build a trainer without running it."""
        config = self.config(*more)
        folder.mkdir(parents=True, exist_ok=True)
        return run.build_trainer(config, find_data(config), run.start_accelerator(config, folder), folder)

    def resume(self, folder: Path, *more: str) -> dict[str, float]:
        """Resume in this process, as the command does."""
        return train(self.resumed_config(folder, *more), folder)

    def resumed_config(self, folder: Path, *more: str) -> Config:
        overrides = [f"training.resume={quote(str(folder))}", *more]
        return resumed_config(compose(overrides), overrides, folder)

    def start(self, folder: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Train in a process of its own, which writes what it says to `<folder>.log`."""
        return self.start_command(folder, *self.overrides(f"output_dir={quote(str(folder))}", *more), launcher=launcher)

    def start_command(self, folder: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Run `python -m getiaction.train` with these overrides, in a session of its own beside `folder`."""
        with said_file(folder).open("a") as said:
            outside: dict[str, Any] = {"stdout": said, "stderr": subprocess.STDOUT, "cwd": folder.parent}
            outside["start_new_session"] = True
            command = ("-m", "getiaction.train", *overrides)
            if not launcher or launcher[0] == sys.executable:
                return warm.start(*launcher[1:], *command, **outside)
            return subprocess.Popen((*launcher, *command), text=True, **outside)


@pytest.fixture(scope="session")
def tiny(make_dataset: Callable[..., Path]) -> TinyRun:
    """Return a way to start tiny runs. One of the three episodes is held out for validation."""
    root = make_dataset(
        lengths=(17, 15, 16), cameras=("observation.image",), image_size=(48, 48), state_dim=2, action_dim=2, fps=10
    )
    return TinyRun(root)


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Let each test choose its precision: Accelerate keeps the first one of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def drawn() -> None:
    """Let a run in this process draw its report, as every run in one of its own does."""


@pytest.fixture(autouse=True)
def _draws_for_who_looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no report unless a test asks for it to be `drawn`: it takes longer than a tiny run."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("getiaction.report.run.draw_report", lambda *_: [])


@pytest.fixture(autouse=True)
def _end_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the processes that a failed test has left behind, with what they started."""
    started: list[subprocess.Popen[str]] = []
    start = TinyRun.start_command
    monkeypatch.setattr(TinyRun, "start_command", lambda *a, **k: started.append(start(*a, **k)) or started[-1])
    yield
    for process in [one for one in started if one.poll() is None]:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def helpers() -> Any:
    """Return this module: `helpers.wait_for_checkpoint(...)`."""
    return sys.modules[__name__]


def forget_precision() -> None:
    """Let a second run in a test choose another precision."""
    AcceleratorState._reset_state(True)


def said_file(folder: Path) -> Path:
    """Return where a process of `TinyRun.start` writes what it says."""
    return folder.with_name(f"{folder.name}.log")


def said(folder: Path) -> str:
    """Return what the processes of a run have said."""
    return said_file(folder).read_text()


def steps_saved(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, ascending."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


def remove_checkpoint(folder: Path, step: int) -> None:
    """Go back to the checkpoint before `step`, as a run that was killed before it was saved."""
    shutil.rmtree(folder / "checkpoints" / f"{step:06d}")


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until something happened in a running process."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, f"the process ended with {process.returncode} too early:\n{said(folder)}"
        assert time.monotonic() < deadline, f"nothing happened in {PATIENCE} s:\n{said(folder)}"
        time.sleep(0.005)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], *, after: int = 0) -> None:
    """Wait until a running process has saved a checkpoint of a step past `after`."""
    wait_until(lambda: max(steps_saved(folder), default=0) > after, process, folder)


def finish(process: subprocess.Popen[str]) -> int:
    """Wait for a process; return its exit code."""
    return process.wait(PATIENCE)


def losses(folder: Path) -> list[float]:
    """Return the training losses of a run, in the order of its metrics."""
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def final_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint: the policy, the raw weights and the optimiser's state."""
    checkpoint = folder / "checkpoints" / f"{step:06d}"
    files = (
        "pretrained_model/model.safetensors",
        "training_state/model.safetensors",
        "training_state/optimizer_state.safetensors",
    )
    return {f"{file}:{key}": value for file in files for key, value in load_file(checkpoint / file).items()}


def assert_same_bits(one: Path, other: Path, step: int) -> None:
    """Compare two runs' checkpoints: each tensor bit by bit, and the rest of the training state as text."""
    first, second = final_state(one, step), final_state(other, step)
    assert first.keys() == second.keys()
    assert not [key for key, value in first.items() if not torch.equal(value, second[key])]
    for name in ("optimizer_param_groups.json", "scheduler_state.json", "training_step.json"):
        paths = [run / "checkpoints" / f"{step:06d}" / "training_state" / name for run in (one, other)]
        assert paths[0].read_text() == paths[1].read_text()


def kill(process: subprocess.Popen[str], number: int) -> int:
    """Send a signal to a process; return its exit code."""
    os.kill(process.pid, number)
    return finish(process)
