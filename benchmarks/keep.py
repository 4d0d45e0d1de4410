"""Keep the result of a run: command, versions, hardware, the log of metrics, seconds of training, the last evaluation.

python -m benchmarks.keep outputs/pusht_laptop/<date_time> benchmarks/results/pusht_laptop-<date>.json
python -m benchmarks.keep outputs/pusht_laptop/sweep_<date_time> benchmarks/results/<what>-<date>.json

Of a sweep it keeps the same of each run but the log of metrics, of which the last line is kept, and the config.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from getiaction.report.sweep import training_seconds
from getiaction.training.metrics import read_metrics


def gather(run: Path) -> dict[str, Any]:
    """Return what a run's folder says."""
    lines = read_metrics(run)
    with (last_evaluation(run).parent / "episodes.csv").open() as rows:
        episodes = rows.read().splitlines()
    return {
        **summarise(run, lines),
        "episodes": episodes,
        "metrics": lines,
        "config": yaml.safe_load((run / "config.yaml").read_text()),
    }


def summarise(run: Path, lines: list[dict[str, float]]) -> dict[str, Any]:
    """Return how a run was made, how long it took, and how its policy acts."""
    result = json.loads(last_evaluation(run).read_text())
    return {
        **json.loads((run / "run.json").read_text()),
        "training_seconds": round(training_seconds(lines), 1),
        "wall_seconds": round(lines[-1]["time"] - lines[0]["time"], 1),
        "evaluation": {key: result[key] for key in ("episodes", "score", "success", "length", "largest", "final")},
    }


def last_evaluation(run: Path) -> Path:
    """Return the file of a run's last evaluation."""
    if not (found := sorted((run / "evaluation").glob("*/evaluation.json"))):
        raise SystemExit(f"{run} has no evaluation: has it ended?")
    return found[-1]


def gather_sweep(sweep: Path) -> list[dict[str, Any]]:
    """Return what the folders of a sweep's runs say, in the order of the runs."""
    runs = sorted((path for path in sweep.iterdir() if path.name.isdigit()), key=lambda run: int(run.name))
    return [
        {"run": run.name} | summarise(run, lines := read_metrics(run)) | {"last_metrics": lines[-1]} for run in runs
    ]


def say(name: str, kept: dict[str, Any]) -> None:
    """Print a run's result in a line."""
    score, success = (
        f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        for one in (kept["evaluation"][key] for key in ("score", "success"))
    )
    episodes, seconds = kept["evaluation"]["episodes"], kept["training_seconds"]
    print(f"{name}: score A {score}, success B {success}, {episodes} episodes, {seconds:.0f} s of training")


def main() -> None:
    """Gather, say and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, or of a sweep")
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    if (arguments.run / "multirun.yaml").exists():
        kept: Any = gather_sweep(arguments.run)
        for one in kept:
            say(f"run {one['run']}", one)
    else:
        kept = gather(arguments.run)
        say(arguments.run.name, kept)
    arguments.result.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
