"""Measure how fast each preset trains on this machine: `python -m benchmarks.presets --root ../shared/data/pusht`.

Each preset runs for a few steps as users run it (a process of its own, its loader and its loop). Recorded are the
median rate after warm-up, the share of the time spent waiting for data, and the most memory that the run held.
`pusht_cpu` runs whole. Results go to benchmarks/results/presets-<date>.json; README's table is printed.
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

import numpy as np

from getiaction.data.cache import load_episodes
from getiaction.data.metadata import find_dataset
from getiaction.machine import kept_scheduling

RESULTS = Path(__file__).parent / "results"
STEPS = {"pusht_basic": 12, "pusht_advanced": 8, "pusht_fast": 20, "pusht_cpu": None, "pusht_multigpu": 4, "aloha": 4}
STEPS |= {"pusht_laptop": 200, "pusht_keypoints": 60, "pusht_pictures": 60}
BOXED = {"pusht_laptop": [], "pusht_keypoints": ["dataset=pusht_demo_keypoints"], "pusht_pictures": []}
"""Presets that learn from the demonstrations in the box, and how they are told to."""
OVERRIDES = {
    "pusht_multigpu": ["hardware.num_processes=1", "backbone.weights=null"],
    "aloha": ["backbone.weights=null"],
}


def measure(preset: str, root: Path, folder: Path) -> dict[str, Any]:
    """Train a preset for `STEPS` steps and return what its metrics say."""
    steps = STEPS[preset]
    short = [f"training.max_steps={steps}", "training.log_every=1", "training.save_every=null", "validation.every=null"]
    short += ["validation.max_samples=1", "validation.max_sampled=0", "lr_scheduler.num_warmup_steps=0"]
    short += ["evaluation.every=null", "evaluation.final_episodes=null"]
    data = BOXED.get(preset, [f"dataset.root={root}"])
    command = [sys.executable, "-m", "getiaction.train", f"+preset={preset}", *data]
    command += [f"output_dir={folder}", *OVERRIDES.get(preset, []), *(short if steps else [])]
    begin = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begin
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "samples_per_s" in line]
    warm = training[len(training) // 4 :]
    run = json.loads((folder / "run.json").read_text())
    return {
        "preset": preset,
        "command": command[1:],
        "samples_per_s": round(statistics.median(line["samples_per_s"] for line in warm), 1),
        "samples_per_s_range": [
            min(line["samples_per_s"] for line in warm),
            max(line["samples_per_s"] for line in warm),
        ],
        "data_wait": round(statistics.mean(line["data_wait"] for line in warm), 4),
        "memory_gb": max(line["memory_gb"] for line in training),
        "wall_s": round(seconds, 1),
        "whole_preset_ran": steps is None,
        "validation": [line for line in lines if "val_loss" in line],
        "run": run,
    }


def measure_decoding(root: Path, folder: Path) -> dict[str, float]:
    """Decode all of PushT into a new cache, and open it again; return seconds."""
    metadata = find_dataset("lerobot/pusht", str(root))
    seconds = {}
    for name, resize in (("decode_96", None), ("decode_64", (64, 64)), ("reopen_96", None)):
        begin = time.perf_counter()
        load_episodes(metadata, metadata.episode_indices, ["observation.image"], resize=resize, cache_dir=folder)
        seconds[f"{name}_s"] = round(time.perf_counter() - begin, 2)
    return seconds


@kept_scheduling()
def make_aloha(folder: Path) -> Path:
    """Record a dataset of ALOHA's shapes: 14 joints, two 480x640 cameras, 50 Hz. Content does not matter to speed."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cameras = ("observation.images.top", "observation.images.wrist")
    features: dict[str, Any] = {
        key: {"dtype": "video", "shape": (480, 640, 3), "names": ["height", "width", "channels"]} for key in cameras
    }
    features |= {key: {"dtype": "float32", "shape": (14,), "names": None} for key in ("observation.state", "action")}
    dataset = LeRobotDataset.create("benchmarks/aloha", 50, features, root=folder)
    draw = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(100):
            frame: dict[str, Any] = {key: draw.integers(0, 255, (480, 640, 3), dtype=np.uint8) for key in cameras}
            frame |= {key: draw.normal(size=14).astype(np.float32) for key in ("observation.state", "action")}
            dataset.add_frame(frame | {"task": "transfer the cube"})
        dataset.save_episode()
    dataset.finalize()
    return folder


def main() -> None:
    """Measure the presets that were asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="a LeRobotDataset of PushT")
    parser.add_argument("--presets", nargs="*", default=list(STEPS), help="some of these, or none at all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        decoding = measure_decoding(arguments.root, Path(folder))
    print(decoding)
    results = []
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory() as folder:
            root = make_aloha(Path(folder) / "data") if preset == "aloha" else arguments.root.resolve()
            results.append(measure(preset, root, Path(folder) / "run"))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"presets-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(
        json.dumps({"date": datetime.now(UTC).isoformat(), "decoding": decoding, "results": results}, indent=1) + "\n"
    )
    for result in results:
        low, high = result["samples_per_s_range"]
        rate = f"{result['samples_per_s']} ({low} to {high})"
        print(f"| `{result['preset']}` | {rate} | {result['data_wait']:.1%} | {result['memory_gb']:.1f} GB |")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
