"""A run that is killed again and again, at any moment, ends bit-identical to the one that nothing interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import warm

from getiaction.training.metrics import read_metrics

LONG = ("training.gradient_accumulation_steps=2", "training.max_steps=120", "training.save_every=6", "seed=3")
KILLED = -signal.SIGKILL


def torture(tiny: Any, folder: Path, accidents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run into one accident after the other, then to the end; return what was there after each.

    Every second run saves aside, as on a GPU.
    """
    overrides = tiny.overrides(*LONG, "hardware.num_threads=1")
    accidents = [*({**accident, "aside": number % 2 == 0} for number, accident in enumerate(accidents)), {}]
    file = folder.with_name("plan.json")
    file.write_text(json.dumps({"folder": str(folder), "overrides": overrides, "accidents": accidents}))
    finished = warm.run("-m", "torture", str(file), cwd=Path(__file__).parent, timeout=400)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(accidents), finished.stderr[-3000:]
    return [json.loads(line) for line in lines]


def assert_nothing_was_lost(rounds: list[dict[str, Any]]) -> None:
    newest = [max(entry["saved"], default=0) for entry in rounds]
    assert newest == sorted(newest)
    assert [entry["damaged"] for entry in rounds] == [[]] * len(rounds)


def assert_same_run(helpers: Any, folder: Path, uninterrupted: Path) -> None:
    helpers.assert_same_bits(folder, uninterrupted, step=120)
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == list(range(1, 121))
    assert helpers.losses(folder) == helpers.losses(uninterrupted)
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {"000108", "000114", "000120", "last"}


@pytest.fixture(scope="module")
def uninterrupted(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    (last,) = torture(tiny, folder, [])
    assert last["code"] == 0
    return folder


def test_twenty_kills_change_nothing(tiny: Any, helpers: Any, tmp_path: Path, uninterrupted: Path) -> None:
    draw = random.Random(0)
    at_a_write = [{"what": "kill", "writes": draw.randint(1, 60)} for _ in range(12)]
    at_a_time = [{"what": "kill", "seconds": draw.uniform(0.2, 0.9)} for _ in range(8)]
    accidents = draw.sample(at_a_write + at_a_time, 20)
    rounds = torture(tiny, tmp_path / "run", accidents)
    assert [entry["code"] for entry in rounds] == [KILLED] * 20 + [0]
    assert_nothing_was_lost(rounds)
    assert_same_run(helpers, tmp_path / "run", uninterrupted)


def test_a_full_disk_at_any_write_loses_nothing(tiny: Any, helpers: Any, tmp_path: Path, uninterrupted: Path) -> None:
    draw = random.Random(1)
    accidents = [{"what": "full disk", "writes": draw.randint(10, 80)} for _ in range(6)]
    rounds = torture(tiny, tmp_path / "run", accidents)
    assert {entry["code"] for entry in rounds[:-1]} == {28}
    assert rounds[-1]["code"] == 0
    assert_nothing_was_lost(rounds)
    assert_same_run(helpers, tmp_path / "run", uninterrupted)


def test_a_small_disk_that_fills_up(tiny: Any, helpers: Any, tmp_path: Path, uninterrupted: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a file system of 3 MB cannot be mounted here; the test above stands for it")
    try:
        (full,) = torture(tiny, disk / "run", [])
        assert full["code"] == 28
        assert full["saved"]
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        (done,) = torture(tiny, disk / "run", [])
        assert done["code"] == 0
        assert_nothing_was_lost([full, done])
        assert_same_run(helpers, disk / "run", uninterrupted)
    finally:
        subprocess.run(["umount", disk], check=True)
