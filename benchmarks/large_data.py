"""Train on data larger than memory: `python -m benchmarks.large_data --root ../shared/data/pusht --folder /some/disk`.

Makes 100 copies of PushT at 64x64, each a little different (31 GB, as a frame cache; `--copies` makes fewer), and
trains on them memory-mapped and on PushT itself held in memory, turn by turn, as users run it. Reported: the ratio of
the rates, the memory that each run held (anonymous: what cannot be given back; file: the cache's pages, which can), and
how fast the data path alone makes batches, from a disk of which nothing is cached.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

from getiaction.config.record import describe_machine
from getiaction.data import cache
from getiaction.data.batches import Gatherer, Order, Share, TrainingBatches
from getiaction.data.episodes import Episodes
from getiaction.data.metadata import find_dataset
from getiaction.data.windows import Windows

RESULTS = Path(__file__).parent / "results"
CAMERA, SIZE = "observation.image", (64, 64)


def load_pusht(root: Path) -> Episodes:
    """Load all of PushT at 64x64."""
    metadata = find_dataset("lerobot/pusht", str(root))
    return cache.load_episodes(metadata, metadata.episode_indices, [CAMERA], resize=SIZE)


def make_copies(root: Path, folder: Path, copies: int) -> None:
    """Write a frame cache of PushT `copies` times over: states and actions jittered, each copy in another light."""
    pusht, draw = load_pusht(root), np.random.default_rng(0)
    folder.mkdir(parents=True)
    pictures = np.array(pusht.frames[CAMERA])
    with (folder / f"{CAMERA}.frames").open("wb") as file:
        for copy in tqdm(range(copies), desc="making", unit=" copies"):
            light = np.clip(np.arange(256) + copy % 40 - 20, 0, 255).astype(np.uint8)
            file.write(light[pictures].data)
    vectors = {
        key: (np.tile(values, (copies, 1)) + draw.normal(scale=0.5, size=(copies * len(values), values.shape[1])))
        for key, values in pusht.vectors.items()
    }
    save_file({key: values.astype(np.float32) for key, values in vectors.items()}, folder / cache.VECTORS)
    lengths = np.tile(pusht.lengths, copies).tolist()
    cache.describe(
        folder,
        repo_id="benchmarks/large",
        info=find_dataset("lerobot/pusht", str(root)).info,
        rows=[{"episode_index": index, "length": length} for index, length in enumerate(lengths)],
        shapes={CAMERA: (sum(lengths), *SIZE, 3)},
    )


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_training(root: Path, placement: str, preset: str, steps: int) -> dict[str, Any]:
    """Train as users do; return the median rate, the share of waiting, and the memory held at each tenth."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "getiaction.train", f"+preset={preset}", f"dataset.root={root}"]
        command += [f"hardware.data_placement={placement}", f"training.max_steps={steps}", "training.log_every=1"]
        command += ["training.max_epochs=null", "training.save_every=null", "validation.every=null"]
        command += ["dataset.episodes=null", "validation.max_samples=8", "validation.max_sampled=0"]
        command += ["evaluation.every=null", "evaluation.final_episodes=null", f"output_dir={folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        memory = watch_memory(process, Path(folder) / "run" / "metrics.jsonl")
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{process.stderr.read() if process.stderr else ''}")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    warm = [line for line in lines if "samples_per_s" in line][steps // 4 :]
    return {
        "command": command[1:],
        "placement": placement,
        "samples_per_s": statistics.median(line["samples_per_s"] for line in warm),
        "data_wait": statistics.mean(line["data_wait"] for line in warm),
        "memory": memory,
    }


def watch_memory(process: subprocess.Popen[str], metrics: Path) -> list[dict[str, float]]:
    """Return the memory (GB) that a run held once it trained, each two seconds, until it ends."""
    memory = []
    while process.poll() is None:
        time.sleep(2)
        if not metrics.exists():
            continue
        try:
            held = psutil.Process(process.pid).memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            break
        memory.append({"anonymous_gb": (held.rss - held.shared) / 1e9, "file_gb": held.shared / 1e9})
    process.wait()
    return memory


def measure_batches(episodes: Episodes, resident: bool, steps: int, seed: int) -> float:
    """Return how many samples a second the data path makes on its own: batches of 64, cropped at random."""
    windows = Windows(episodes, n_obs_steps=2, horizon=16, drop_n_last_frames=7)
    keys = ("observation.state", CAMERA)
    cpu = torch.device("cpu")
    gatherer = Gatherer(episodes, windows, device=cpu, resident=resident, observations=keys, crop_shape=(56, 56))
    order = Order(len(windows), 64, seed)
    batches = TrainingBatches(gatherer, order, Share(64), crop_is_random=True, prefetch=not resident)
    stream = batches.iterate(0, steps + 1)
    next(stream)
    begin = time.perf_counter()
    for _ in stream:
        pass
    return steps * 64 / (time.perf_counter() - begin)


def main() -> None:
    """Make the data if they are not there, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="a LeRobotDataset of PushT")
    parser.add_argument("--folder", type=Path, required=True, help="where the large data lie, or shall lie")
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--presets", nargs="*", default=["pusht_fast"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    large = arguments.folder / f"pusht_x{arguments.copies}"
    if not large.exists():
        make_copies(arguments.root, large, arguments.copies)
    metadata = find_dataset("large", str(large))
    small = load_pusht(arguments.root).in_memory()
    big = cache.load_episodes(metadata, metadata.episode_indices, [CAMERA], resize=SIZE)
    alone: dict[str, list[float]] = {"resident": [], "mapped, nothing cached": [], "mapped": []}
    for seed in range(arguments.rounds):
        alone["resident"].append(measure_batches(small, True, 400, seed))
        forget(large)
        alone["mapped, nothing cached"].append(measure_batches(big, False, 400, seed))
        alone["mapped"].append(measure_batches(big, False, 400, seed))
    print(alone)
    results = []
    for preset in arguments.presets:
        for _ in range(arguments.rounds):
            forget(large)
            for root, placement in ((arguments.root.resolve(), "device"), (large, "host")):
                measured = measure_training(root, placement, preset, arguments.steps)
                results.append({"preset": preset, **measured})
                print({key: value for key, value in measured.items() if key not in ("command", "memory")}, flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"large_data-{datetime.now(UTC):%Y-%m-%d}.json"
    result = {
        "command": sys.argv,
        "bytes": big.nbytes,
        "frames": big.num_frames,
        "memory_bytes": psutil.virtual_memory().total,
        **describe_machine(torch.device("cpu")),
        "batches_alone_samples_per_s": alone,
        "training": results,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    for preset in arguments.presets:
        resident, mapped = (
            statistics.median(r["samples_per_s"] for r in results if (r["preset"], r["placement"]) == (preset, place))
            for place in ("device", "host")
        )
        print(f"{preset}: {mapped:.1f} / {resident:.1f} samples/s mapped / resident = {mapped / resident:.3f}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
