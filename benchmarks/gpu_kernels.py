"""Say what a device does in a step, and in a chunk, kernel by kernel: sections of `benchmarks.gpu`."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_bench import QUIET, Bench
from getiaction.config.compose import compose

STEPS = (
    ("pusht_basic", 64, "bf16"),
    ("pusht_basic", 256, "bf16"),
    ("pusht_basic", 64, "no"),
    ("pusht_advanced", 64, "bf16"),
    ("pusht_pictures", 48, "bf16"),
    ("pusht_pictures", 48, "no"),
)
TOP = 45
PROFILED = 3  # steps, or chunks
SAMPLES = 3  # of what the driver says
MANY = 10**6  # batches, more than are asked for


def busy(bench: Bench) -> dict[str, Any]:
    """Measure which share of a training step the GPU computes, and what: the kernels' time, of that between steps."""
    for preset, batch, precision in STEPS[-1:] if bench.small else STEPS:
        if not bench.wants(case := f"{preset}, {batch}, {precision}"):
            continue
        trainer = trainer_of(bench, preset, batch, precision)
        coming = trainer.batches.iterate(0, MANY)

        def step(trainer: Any = trainer, coming: Any = coming) -> None:
            trainer._optimise(next(coming))

        bench.found[case] = watch(bench, step, steps=bench.steps(60))
        coming.close()
        del trainer, coming, step
        gc.collect()
    return bench.found


def trainer_of(bench: Bench, preset: str, batch: int, precision: str) -> Any:
    """Build what trains a preset, on four of PushT's episodes, or on the demonstrations in the box."""
    from getiaction.config.run import build_trainer, start_accelerator
    from getiaction.config.sources import find_data

    pictures = [f"dataset.root={bench.pictures}"] if bench.pictures else ["dataset=pusht_demo"]
    data = [] if preset == "pusht_pictures" else [*pictures, "dataset.episodes=[0,1,2,3]"]
    short = [f"+preset={preset}", *data, f"hardware.device={bench.device}", f"training.batch_size={batch}", *QUIET]
    short += [f"hardware.mixed_precision={precision}", "evaluation.final_episodes=null"]
    config, folder = compose(short), Path(tempfile.mkdtemp(dir=bench.folder))
    trainer = build_trainer(config, find_data(config), start_accelerator(config, folder), folder)
    trainer.model.train()
    return trainer


def acting(bench: Bench) -> dict[str, Any]:
    """Measure the same of one chunk of actions, in float32 without TF32 and under autocast to bf16."""
    from benchmarks.inference import draw, features_of, statistics_of
    from getiaction.config.build import build_policy
    from getiaction.interop.lerobot import load_policy, write_policy

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for preset in ("pusht_laptop",) if bench.small else ("pusht_fast", "pusht_basic", "pusht_pictures"):
        config = compose([f"+preset={preset}", "hardware.num_processes=1"])
        features = features_of(config)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "policy"
            write_policy(path, build_policy(config, features, statistics_of(features), fetch_weights=False))
            policy = load_policy(path, device=bench.device)
        seen = draw(features, config.policy.n_obs_steps, bench.device)
        for precision in ("no", "bf16"):

            def act(policy: Any = policy, seen: Any = seen, bf16: bool = precision == "bf16") -> None:
                with torch.autocast(bench.device, torch.bfloat16, enabled=bf16):
                    policy.predict_action_chunk(seen)

            bench.found[f"{preset}, {precision}"] = watch(bench, act, steps=bench.steps(20))
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return bench.found


def watch(bench: Bench, call: Callable[[], None], *, steps: int) -> dict[str, Any]:
    """Return milliseconds of a call, and those of them in which a kernel runs; and how long each kernel runs in one.

    Kernels may run beside each other: `kernels_ms` counts such a moment once, `top_us` for each.
    """
    wait = torch.cuda.synchronize if bench.device == "cuda" else lambda: None

    def take(count: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - begin) * 1e3 / count

    take(8)
    wall = take(steps)
    utilization = []
    for _ in range(SAMPLES if bench.device == "cuda" else 0):
        take(max(1, int(300 / wall)))
        utilization.append(torch.cuda.utilization())  # of the last sixth of a second or more, says NVIDIA
    with profile(activities=[ProfilerActivity.CUDA if bench.device == "cuda" else ProfilerActivity.CPU]) as seen:
        take(PROFILED)
    where = f"self_{'device' if bench.device == 'cuda' else 'cpu'}_time_total"
    found = sorted(
        ((one.key, one.count / PROFILED, getattr(one, where) / PROFILED) for one in seen.key_averages()),
        key=lambda one: -one[2],
    )
    kernels = sum(taken for _, _, taken in found) / 1e3
    if bench.device == "cuda":
        ours = [one.time_range for one in seen.events() if one.device_type == torch.autograd.DeviceType.CUDA]
        kernels = covered([(one.start, one.end) for one in ours]) / PROFILED / 1e3
    return {
        "ms": round(wall, 3),
        "kernels_ms": round(kernels, 3),
        "busy": round(kernels / wall, 3),
        "nvml_utilization": utilization,
        "launches": round(sum(count for _, count, _ in found)),
        "top_us": [[kernel[:90], round(count, 1), round(taken, 1)] for kernel, count, taken in found[:TOP]],
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of what spans cover, some of which may overlap."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
