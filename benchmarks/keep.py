"""Keep the result of a run: command, versions, hardware, the log of metrics, seconds of training, the last evaluation.

python -m benchmarks.keep outputs/pusht_laptop/<date_time> benchmarks/results/pusht_laptop-<date>.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from getiaction.training.metrics import read_metrics


def training_seconds(lines: list[dict[str, float]]) -> float:
    """Return the seconds that training took, without validation, saving and acting."""
    seen, seconds = 0.0, 0.0
    for line in lines:
        if "samples_per_s" in line:
            seconds += (line["samples"] - seen) / line["samples_per_s"]
            seen = line["samples"]
    return round(seconds, 1)


def gather(run: Path) -> dict[str, Any]:
    """Return what a run's folder says."""
    lines = read_metrics(run)
    evaluation = max((run / "evaluation").glob("*/evaluation.json"))
    result = json.loads(evaluation.read_text())
    with (evaluation.parent / "episodes.csv").open() as rows:
        episodes = rows.read().splitlines()
    return {
        **json.loads((run / "run.json").read_text()),
        "training_seconds": training_seconds(lines),
        "wall_seconds": round(lines[-1]["time"] - lines[0]["time"], 1),
        "evaluation": {key: result[key] for key in ("episodes", "score", "success", "length", "largest", "final")},
        "episodes": episodes,
        "metrics": lines,
        "config": yaml.safe_load((run / "config.yaml").read_text()),
    }


def main() -> None:
    """Gather, say and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    kept = gather(arguments.run)
    score, success = kept["evaluation"]["score"], kept["evaluation"]["success"]
    arguments.result.write_text(json.dumps(kept, indent=1) + "\n")
    for name, value in (("score A", score), ("success B", success)):
        print(f"{name} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]", end=", ")
    print(f"{kept['evaluation']['episodes']} episodes, {kept['training_seconds']:.0f} s of training")


if __name__ == "__main__":
    main()
