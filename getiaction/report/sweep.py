"""Compare the runs of a sweep: mean and interval over seeds per configuration, and score against training time."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from getiaction.errors import InputError
from getiaction.files import replace_text
from getiaction.run_folder import RESULT, RUN
from getiaction.simulation.metrics import Estimate
from getiaction.training.metrics import read_metrics

NAMES = {"score": "score A", "success": "success B", "val_loss": "validation loss", "val_action_error": "action error"}
LARGER_IS_BETTER = ("score", "success")
DECIDES_NOTHING = ("seed", "output_dir", "hardware.num_threads", "dataset.cache_dir", "training.resume")
MACHINE = ("device", "cpus", "threads", "processes", "mixed_precision")
BLUE, GREY = "C0", "0.6"


@dataclass(frozen=True)
class Run:
    """Hold one job of a sweep.

    Args:
        folder: the run folder.
        overrides: what its command line set, key -> value.
        metrics: the last ones; empty if it is not complete.
        minutes: spent training, without validation, evaluation and saving.
        machine: what the training time belongs to.
    """

    folder: Path
    overrides: dict[str, str]
    metrics: dict[str, float]
    minutes: float
    machine: dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """Hold the runs that differ in their seed only."""

    name: str
    runs: list[Run]

    def over_seeds(self, value: Callable[[Run], float]) -> Estimate:
        """Return mean and 95% interval (Student's t) over the runs; no interval, infinite, of a single one."""
        from scipy import stats

        values = np.array([value(run) for run in self.runs])
        mean = float(values.mean())
        if len(values) == 1:
            return Estimate(mean, -math.inf, math.inf)
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        return Estimate(mean, mean - half, mean + half)

    @property
    def minutes(self) -> Estimate:
        """Return the time of training."""
        return self.over_seeds(lambda run: run.minutes)

    def metric(self, name: str) -> Estimate:
        """Return a metric."""
        return self.over_seeds(lambda run: run.metrics[name])


def read_runs(folder: Path) -> list[Run]:
    """Return the runs of a sweep's folder, by number; a single run is a sweep of one.

    Raises:
        InputError: there are none.
    """
    folders = [folder] if (folder / RUN).exists() else sorted(folder.glob(f"*/{RUN}"), key=by_number)
    runs = [read_run(path if path.is_dir() else path.parent) for path in folders]
    if not runs:
        raise InputError(
            f"{folder} holds no runs: give the folder of a sweep, outputs/<preset>/sweep_<date_time>, or of a run"
        )
    return runs


def by_number(path: Path) -> tuple[int, str]:
    """Sort jobs as they were numbered."""
    name = path.parent.name
    return (int(name) if name.isdigit() else -1, name)


def read_run(folder: Path) -> Run:
    """Read one run."""
    about = json.loads((folder / RUN).read_text())
    pairs = [override.lstrip("+~").partition("=") for override in about.get("overrides", [])]
    result = folder / RESULT
    metrics = json.loads(result.read_text())["metrics"] if result.exists() else {}
    machine = {key: about.get(key) for key in MACHINE}
    return Run(
        folder, {key: value for key, _, value in pairs}, metrics, training_seconds(read_metrics(folder)) / 60, machine
    )


def training_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """Return the time that a run has trained, from the rate in each line; what a kill undid does not count."""
    seconds, seen = 0.0, 0
    for line in lines:
        if "samples_per_s" in line:
            seconds += (line["samples"] - seen) / line["samples_per_s"]
            seen = line["samples"]
    return seconds


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """Put the runs that are complete together by what their command lines set differently, but for the seed."""
    keys = sorted({key for run in runs for key in run.overrides if key not in DECIDES_NOTHING})
    varying = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        name = " ".join(f"{key}={run.overrides[key]}" for key in varying if key in run.overrides) or "as it stands"
        if run.metrics:
            grouped.setdefault(name, []).append(run)
    return [Configuration(name, members) for name, members in grouped.items()]


def choose_metric(runs: Sequence[Run], wanted: str | None) -> str:
    """Return the metric to judge by: the one that is wanted, or the first of score, success, validation loss, ...

    Raises:
        InputError: not every complete run has it.
    """
    complete = [set(run.metrics) for run in runs if run.metrics]
    has = set.intersection(*complete) if complete else set()
    choices = [name for name in (*NAMES, "loss") if name in has]
    if not choices:
        raise InputError("no run of this sweep is complete: start the same command again, and it goes on")
    if wanted is not None and wanted not in has:
        raise InputError(f"--metric {wanted} is not in every run: choose from {', '.join(choices)}")
    return wanted or choices[0]


def pareto(found: Sequence[Configuration], metric: str) -> list[Configuration]:
    """Return the configurations that no other beats in both training time and metric, by time."""
    sign = -1 if metric in LARGER_IS_BETTER else 1
    front: list[Configuration] = []
    for one in sorted(found, key=lambda one: (one.minutes.mean, sign * one.metric(metric).mean)):
        if not front or sign * one.metric(metric).mean < sign * front[-1].metric(metric).mean:
            front.append(one)
    return front


def write_report(folder: Path, metric: str | None = None) -> str:
    """Write `report.md`, `report.csv` and `report.png` into a sweep's folder; return the first.

    Raises:
        InputError: there are no runs, none is complete, or they lack the metric.
    """
    runs = read_runs(folder)
    chosen = choose_metric(runs, metric)
    found = configurations(runs)
    front = pareto(found, chosen)
    text = "\n".join([*table(found, front, chosen), "", *remarks(runs, found)]) + "\n"
    replace_text(folder / "report.md", text)
    write_rows(folder / "report.csv", runs)
    draw(folder / "report.png", found, front, chosen)
    return text


def table(found: Sequence[Configuration], front: Sequence[Configuration], metric: str) -> list[str]:
    """Return a table in Markdown, one configuration a row."""
    columns = [metric, *(name for name in NAMES if name != metric)]
    columns = [name for name in columns if all(name in run.metrics for one in found for run in one.runs)]
    heads = ["configuration", "seeds", *(NAMES.get(name, name) for name in columns), "training, minutes", ""]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for one in found:
        cells = [one.name, str(len(one.runs)), *(say(one, name) for name in columns), short(one.minutes)]
        lines.append("| " + " | ".join([*cells, "Pareto" if one in front else ""]) + " |")
    return lines


def say(one: Configuration, name: str) -> str:
    """Return a metric with its interval; a single run's own, over its episodes, where it has one."""
    low, high = (one.runs[0].metrics.get(f"{name}_{end}") for end in ("low", "high"))
    if len(one.runs) == 1 and low is not None and high is not None:
        return f"{one.metric(name).mean:.4g} (episodes: [{low:.4g}, {high:.4g}])"
    return short(one.metric(name))


def short(value: Estimate) -> str:
    """Return mean and interval with four digits."""
    return f"{value.mean:.4g}" + (f" [{value.low:.4g}, {value.high:.4g}]" if math.isfinite(value.low) else "")


def remarks(runs: Sequence[Run], found: Sequence[Configuration]) -> list[str]:
    """Return what one has to know to read the table."""
    lines = ["Mean and 95% interval over seeds (Student's t). Pareto: no other is both better and faster to train."]
    if any(len(one.runs) == 1 for one in found):
        lines.append("A configuration with one seed has no interval over seeds; one over its episodes says so.")
    if missing := [run.folder.name for run in runs if not run.metrics]:
        lines.append(f"Not complete, and left out: {', '.join(missing)}.")
    if len({json.dumps(run.machine) for run in runs}) > 1:
        lines.append("The runs were not all on the same machine, or as many threads: compare no training times.")
    machine = ", ".join(f"{key} {value}" for key, value in runs[0].machine.items() if value is not None)
    return [*lines, f"Machine: {machine}."]


def write_rows(path: Path, runs: Sequence[Run]) -> None:
    """Write one row a run: what it set, its metrics, its time."""
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides))
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *keys, *names, "minutes"])
        writer.writeheader()
        for run in runs:
            writer.writerow({"run": run.folder.name, **run.overrides, **run.metrics, "minutes": run.minutes})
    temporary.replace(path)


def draw(path: Path, found: Sequence[Configuration], front: Sequence[Configuration], metric: str) -> None:
    """Draw every configuration's seeds with mean and interval, and the metric against training time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = max(4, 1.2 + 0.45 * len(found))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, height), layout="constrained")
    for row, one in enumerate(found):
        values, mean = [run.metrics[metric] for run in one.runs], one.metric(metric)
        left.plot(values, [row] * len(values), "o", color=GREY, markersize=4)
        left.errorbar(mean.mean, row, xerr=bars(mean), fmt="D", color=BLUE, markersize=5, capsize=3)
        minutes = one.minutes
        on_line = one in front
        right.errorbar(
            *(minutes.mean, mean.mean, bars(mean), bars(minutes)), fmt="D", color=BLUE if on_line else GREY, capsize=2
        )
        right.annotate(str(row + 1), (minutes.mean, mean.mean), xytext=(5, 5), textcoords="offset points")
    left.set_yticks(range(len(found)), [f"{one.name}   {row + 1}" for row, one in enumerate(found)])
    left.invert_yaxis()
    left.set_xlabel(f"{NAMES.get(metric, metric)}: seeds, mean, 95% interval over seeds")
    line = [(one.minutes.mean, one.metric(metric).mean) for one in front]
    right.plot(*zip(*line, strict=True), "-", color=BLUE, label="Pareto line")
    right.set_xlabel("training, minutes")
    right.set_ylabel(NAMES.get(metric, metric))
    right.margins(x=0.2)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def bars(value: Estimate) -> list[list[float]] | None:
    """Return the lengths of an error bar below and above; None without an interval."""
    return [[value.mean - value.low], [value.high - value.mean]] if math.isfinite(value.low) else None
