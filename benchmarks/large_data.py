"""Train on data larger than memory: `python -m benchmarks.large_data --root ../shared/data/pusht --folder /some/disk`.

Makes 100 copies of PushT at 64x64, each a little different (31 GB, as a frame cache; `--copies` makes fewer), and
trains one network on them memory-mapped and on PushT itself held in memory, a few steps each, turn by turn in one
process. Reported: the ratio of the rates with its interval over the turns, what is read from the disk being read for
the first time; the memory that a run as users start it held (anonymous: what cannot be given back; file: the cache's
pages, which can); and how fast the data path alone makes batches.
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

from getiaction.config.compose import compose
from getiaction.config.record import describe_machine
from getiaction.config.run import build_trainer, start_accelerator
from getiaction.config.sources import find_data
from getiaction.data import cache
from getiaction.data.batches import Share, TrainingBatches
from getiaction.data.episodes import Episodes
from getiaction.data.gather import Gatherer
from getiaction.data.metadata import find_dataset
from getiaction.data.order import Order
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
    cache.write_description(
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


def overrides(root: Path, placement: str, preset: str, steps: int, folder: Path) -> list[str]:
    """Return what trains a preset on all of `root`, and does nothing else."""
    return [
        *(f"+preset={preset}", f"dataset.root={root}", "dataset.episodes=null", f"output_dir={folder}"),
        *(f"hardware.data_placement={placement}", f"training.max_steps={steps}", "training.max_epochs=null"),
        *("training.log_every=1", "training.save_every=null", "evaluation.every=null"),
        *("evaluation.final_episodes=null", "validation.every=null", "validation.max_samples=8"),
        *("validation.max_sampled=0", "lr_scheduler.num_warmup_steps=0"),
    ]


def measure_turns(small: Path, large: Path, preset: str, steps: int, turns: int) -> dict[str, Any]:
    """Train one network on both, `steps` at a time; return the seconds of each turn and the ratio of the rates."""
    seconds: dict[str, list[float]] = {"resident": [], "mapped": []}
    with tempfile.TemporaryDirectory() as folder:
        streams = {}
        for name, root, placement in (("resident", small, "device"), ("mapped", large, "host")):
            config = compose(overrides(root, placement, preset, 10**6, Path(folder)))
            trainer = build_trainer(config, find_data(config), start_accelerator(config, Path(folder)), Path(folder))
            streams[name] = trainer.batches.iterate(0, 10**6)
        for turn in range(turns + 1):
            for name in ("resident", "mapped") if turn % 2 else ("mapped", "resident"):
                forget(large)
                begin = time.perf_counter()
                for _ in range(steps):
                    trainer._optimise(next(streams[name]))
                seconds[name].append(time.perf_counter() - begin)
        samples = steps * trainer.batches.share.global_batch_size
    resident, mapped = (np.array(values[1:]) for values in seconds.values())  # the first turn is for warming up
    draws = np.random.default_rng(0).integers(turns, size=(10_000, turns))
    ratios = np.median(resident[draws], axis=1) / np.median(mapped[draws], axis=1)
    return {
        "preset": preset,
        "seconds": {name: [round(value, 3) for value in values[1:]] for name, values in seconds.items()},
        "samples_per_s": {name: samples / statistics.median(values[1:]) for name, values in seconds.items()},
        "ratio": float(np.median(resident) / np.median(mapped)),
        "ratio_interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
    }


def measure_memory(large: Path, preset: str, steps: int) -> list[dict[str, float]]:
    """Train on the large data as users do; return the memory that the process held, each two seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "getiaction.train", *overrides(large, "host", preset, steps, run)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        memory = watch_memory(process, run / "metrics.jsonl")
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{process.stderr.read() if process.stderr else ''}")
    return memory


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
        if not held.rss:  # it has ended, and nobody has waited for it yet
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
    parser.add_argument("--presets", nargs="*", default=["pusht_fast", "pusht_cpu"])
    parser.add_argument("--steps", type=int, default=3, help="of each turn")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--memory-steps", type=int, default=60, help="of the run whose memory is watched")
    arguments = parser.parse_args()
    large = arguments.folder / f"pusht_x{arguments.copies}"
    if not large.exists():
        make_copies(arguments.root, large, arguments.copies)
    metadata = find_dataset("large", str(large))
    small = load_pusht(arguments.root).in_memory()
    big = cache.load_episodes(metadata, metadata.episode_indices, [CAMERA], resize=SIZE)
    alone: dict[str, list[float]] = {"resident": [], "mapped, nothing cached": [], "mapped": []}
    for seed in range(3):
        alone["resident"].append(measure_batches(small, True, 400, seed))
        forget(large)
        alone["mapped, nothing cached"].append(measure_batches(big, False, 400, seed))
        alone["mapped"].append(measure_batches(big, False, 400, seed))
    print(alone)
    training = []
    for preset in arguments.presets:
        training.append(measure_turns(arguments.root.resolve(), large, preset, arguments.steps, arguments.turns))
        print(f"{preset}: mapped / resident = {training[-1]['ratio']:.3f} {training[-1]['ratio_interval']}", flush=True)
    memory = measure_memory(large, arguments.presets[-1], arguments.memory_steps)
    print("memory, GB: first", memory[0], "last", memory[-1])
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"large_data-{datetime.now(UTC):%Y-%m-%d}.json"
    result = {
        "command": sys.argv,
        "bytes": big.nbytes,
        "frames": big.num_frames,
        "memory_bytes": psutil.virtual_memory().total,
        **describe_machine(torch.device("cpu")),
        "batches_alone_samples_per_s": alone,
        "training": training,
        "memory": memory,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
