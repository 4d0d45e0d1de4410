"""Runs of a sweep become means, intervals and a Pareto line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from getiaction.errors import InputError
from getiaction.report.sweep import configurations, pareto, read_runs, training_seconds, write_report

MakeJob = Callable[..., Path]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """Return a function that writes a job of a sweep: what its command set, its last metrics, its training time."""

    def make(*overrides: str, seconds: float = 60.0, threads: int = 2, **metrics: float) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        about = {"overrides": list(overrides), "device": "a CPU", "threads": threads}
        (folder / "run.json").write_text(json.dumps(about))
        line = {"step": 10, "samples": 1000, "samples_per_s": 1000 / seconds, "loss": 0.1}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if metrics:
            (folder / "result.json").write_text(json.dumps({"step": 10, "metrics": metrics}))
        return tmp_path

    return make


def test_mean_and_interval_over_seeds_are_students(make_job: MakeJob) -> None:
    for seed, score in enumerate((0.7, 0.8, 0.9)):
        folder = make_job("unet=small", f"seed={seed}", score=score)
    (one,) = configurations(read_runs(folder))
    found = one.metric("score")
    assert found.mean == pytest.approx(0.8)
    assert found.high - found.mean == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)  # t(0.975, 2)
    assert one.minutes.mean == pytest.approx(1)


def test_configurations_are_named_by_what_differs(make_job: MakeJob) -> None:
    for unet in ("small", "base"):
        for seed in (0, 1):
            folder = make_job("+preset=pusht_cpu", f"unet={unet}", f"seed={seed}", "optimizer.lr=1e-3", val_loss=1.0)
    assert [one.name for one in configurations(read_runs(folder))] == ["unet=small", "unet=base"]


def test_the_pareto_line_has_what_nothing_beats_in_both(make_job: MakeJob) -> None:
    for name, seconds, score in (("a", 60, 0.5), ("b", 120, 0.4), ("c", 180, 0.9), ("d", 240, 0.9), ("e", 300, 0.95)):
        folder = make_job(f"unet={name}", seconds=seconds, score=score, val_loss=1 - score)
    found = configurations(read_runs(folder))
    assert [one.name for one in pareto(found, "score")] == ["unet=a", "unet=c", "unet=e"]
    assert [one.name for one in pareto(found, "val_loss")] == ["unet=a", "unet=c", "unet=e"]


def test_a_report_says_what_it_left_out_and_what_cannot_be_compared(make_job: MakeJob) -> None:
    make_job("seed=0", "unet=small", score=0.5, score_low=0.4, score_high=0.6, val_loss=0.1)
    make_job("seed=0", "unet=base", score=0.6, score_low=0.5, score_high=0.7, val_loss=0.2, threads=1)
    folder = make_job("seed=1", "unet=base")
    text = write_report(folder)
    assert "| unet=small | 1 | 0.5 (episodes: [0.4, 0.6]) | 0.1 | 1 |  |" in text
    assert "Not complete, and left out: 2." in text
    assert "compare no training times" in text
    assert (folder / "report.md").read_text() == text
    assert (folder / "report.png").stat().st_size > 10_000
    rows = list(csv.DictReader((folder / "report.csv").open()))
    assert [(row["run"], row["unet"], row["score"]) for row in rows] == [
        ("0", "small", "0.5"),
        ("1", "base", "0.6"),
        ("2", "base", ""),
    ]


def test_time_that_a_kill_undid_does_not_count() -> None:
    lines = [{"samples": 100, "samples_per_s": 10.0}, {"val_loss": 1.0}, {"samples": 300, "samples_per_s": 50.0}]
    assert training_seconds(lines) == pytest.approx(10 + 4)


def test_what_cannot_be_reported_is_said(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no runs"):
        write_report(tmp_path)
    make_job("seed=0")
    with pytest.raises(InputError, match="no run of this sweep is complete"):
        write_report(tmp_path)
    make_job("seed=1", val_loss=1.0)
    with pytest.raises(InputError, match="--metric score is not in every run: choose from val_loss"):
        write_report(tmp_path, "score")
