"""The time-to-quality record: PushT from pictures to score A >= 0.90 on one GPU, in one command.

python -m benchmarks.record                                     # one CUDA GPU, the demonstrations in the box
python -m benchmarks.record --root ../shared/data/pusht         # the same recipe, people's demonstrations
python -m benchmarks.record --device cpu --small --result /tmp/r.json                      # a rehearsal

Trains `RECIPE` with each seed, lets the last checkpoint act for 500 episodes, and keeps the log. The record is the time
of training: from the first batch to the last step, without validation, saving and acting; what compiling took of it is
shown apart (what the first steps took beyond the median rate).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from getiaction.config.record import describe_machine
from getiaction.report.sweep import training_seconds
from getiaction.training.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
TARGET = 0.90  # of score A
WARM = 0.2  # share of the log that tells no steady rate
RECIPE = [
    "+preset=pusht_pictures",
    "hardware=gpu",
    "hardware.mixed_precision=no",  # TF32: as fast as bf16 here, whose casts take what its products save
    "training.log_every=100",
    "training.save_every=null",
    "validation.every=null",
    "evaluation.final_episodes=null",
]
SMALL = [
    *("training.batch_size=2", "training.max_steps=6", "training.log_every=1", "training.noise_draws=2"),
    *("lr_scheduler.num_warmup_steps=1", "dataset.episodes=[0,1,2,3]"),
]


def run(command: list[str]) -> float:
    """Run a command of ours; return its seconds."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - begin


def compile_seconds(lines: list[dict[str, Any]], seconds: float) -> float:
    """Return what training took beyond its samples at the median rate of the steps after warm-up."""
    logged = [line for line in lines if "samples_per_s" in line]
    rate = statistics.median(line["samples_per_s"] for line in logged[int(len(logged) * WARM) :])
    return round(max(seconds - logged[-1]["samples"] / rate, 0.0), 1)


def attempt(seed: int, data: list[str], episodes: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and evaluate one seed."""
    trained, acted = folder / f"run{seed}", folder / f"evaluation{seed}"
    overrides = [*RECIPE, *data, *(SMALL if arguments.small else []), *arguments.more, f"seed={seed}"]
    train = ["getiaction.train", *overrides, f"hardware.device={arguments.device}"]
    wall = run([*train, f"output_dir={trained}"])
    evaluate = ["getiaction.evaluate", f"checkpoint={trained}", f"episodes={episodes}", "seed=0", "videos=false"]
    evaluate += [f"device={arguments.device}"]
    evaluation_wall = run([*evaluate, f"output_dir={acted}"])
    lines, result = read_metrics(trained), json.loads((acted / "evaluation.json").read_text())
    seconds = round(training_seconds(lines), 1)
    return {
        "seed": seed,
        "training_seconds": seconds,
        "of_which_compiling": compile_seconds(lines, seconds),
        "wall_seconds": round(wall, 1),
        "evaluation_seconds": round(evaluation_wall, 1),
        "evaluation": {key: result[key] for key in ("episodes", "score", "success", "length")},
        "reached": result["score"]["mean"] >= TARGET,
        "commands": [train, evaluate],
        "metrics": lines,
    }


def main() -> None:
    """Try each seed, say how it went, and keep the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="other demonstrations of PushT with pictures: a dataset, or a frame cache")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--more", nargs="*", default=[], help="overrides on top of the recipe")
    parser.add_argument("--small", action="store_true", help="a rehearsal: a few steps and episodes")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/record-<date>.json")
    arguments = parser.parse_args()
    data = ["dataset=pusht", f"dataset.root={arguments.root}"] if arguments.root else []
    episodes = 2 if arguments.small else arguments.episodes
    path = arguments.result or RESULTS / f"record-{datetime.now(UTC):%Y-%m-%d}.json"
    kept: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(),
        **describe_machine(torch.device(arguments.device)),
        "target": TARGET,
        "small": arguments.small,
        "attempts": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            kept["attempts"].append(one := attempt(seed, data, episodes, arguments, Path(folder)))
            path.write_text(json.dumps(kept, indent=1) + "\n")
            score, success = one["evaluation"]["score"], one["evaluation"]["success"]
            print(
                f"seed {seed}: {one['training_seconds']:.0f} s of training, {one['of_which_compiling']:.0f} of them "
                f"compiling; A {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}], B {success['mean']:.1%} "
                f"over {one['evaluation']['episodes']} episodes: {'reached' if one['reached'] else 'missed'} {TARGET}",
                flush=True,
            )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
