"""Measure how fast a device trains and acts: sections of `benchmarks.gpu`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import QUIET, Bench
from getiaction.config.compose import compose
from getiaction.training.metrics import read_metrics

PICTURE_PRESETS = ("pusht_basic", "pusht_advanced", "pusht_fast", "pusht_multigpu")
WAYS: dict[str, tuple[str, ...]] = {
    "as_it_is": (),
    "channels_first": ("hardware.channels_last=false",),
    "compiled": ("hardware.compile=true",),
    "compiled_channels_first": ("hardware.compile=true", "hardware.channels_last=false"),
    "plain_launches": ("hardware.cuda_graphs=false",),
    "library": ("hardware.convolutions=library",),
}


def precisions(bench: Bench) -> dict[str, Any]:
    """Train `pusht_laptop` in each precision (fp16 with its gradient scaler): rate and last loss."""
    steps = bench.steps(600)
    for precision in ("no", "bf16", *(["fp16"] if bench.device == "cuda" else [])):
        short = [f"training.max_steps={steps}", f"training.log_every={max(steps // 12, 1)}", *QUIET]
        bench.train(
            precision,
            *(
                "+preset=pusht_laptop",
                f"hardware.mixed_precision={precision}",
                "evaluation.final_episodes=null",
                *short,
            ),
        )
        bench.found[precision] = bench.rate(precision)
    return bench.found


def presets(bench: Bench) -> dict[str, Any]:
    """Measure each preset for pictures as it stands, and compiled."""
    modes = {"": (), "_compiled": ("hardware.compile=true",)}
    for mode, more in modes.items():
        for preset in () if mode and bench.small else PICTURE_PRESETS:
            bench.found[f"{preset}{mode}"] = rate_of(bench, f"{preset}{mode}", preset, *more)
    return bench.found


def ways(bench: Bench) -> dict[str, Any]:
    """Measure other ways to train `pusht_basic`, in bf16: memory order with group norm, CUDA graphs."""
    for name, more in WAYS.items():
        if not (bench.small and any("compile" in one for one in more)):
            bench.found[name] = rate_of(bench, name, "pusht_basic", "hardware.mixed_precision=bf16", *more)
    return bench.found


def rate_of(bench: Bench, name: str, preset: str, *more: str) -> dict[str, Any]:
    """Train a preset from pictures for a few steps; return its rate."""
    data = [f"dataset.root={bench.pictures}"] if bench.pictures else ["dataset=pusht_demo"]
    episodes = [] if bench.pictures else ["dataset.episodes=[0,1,2,3]"]
    small = ["training.batch_size=2"] if bench.small else []
    short = (f"training.max_steps={bench.steps(60)}", "training.log_every=2", *small, *QUIET)
    alone = ("hardware.num_processes=1", "backbone.weights=null")
    bench.train(name, f"+preset={preset}", *data, *episodes, *short, *alone, *more)
    return bench.rate(name)


def evaluation(bench: Bench) -> dict[str, Any]:
    """Time 500 episodes of the policy that `precisions` trained."""
    episodes, out = 4 if bench.small else 500, bench.folder / "evaluate"
    command = [sys.executable, "-m", "getiaction.evaluate", f"checkpoint={bench.folder / 'no'}", f"episodes={episodes}"]
    command += [f"output_dir={out}", f"device={bench.device}"]
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    return {"episodes": episodes, "seconds": round(seconds, 1), "episodes_per_min": round(60 * episodes / seconds, 1)}


def compute(bench: Bench) -> dict[str, Any]:
    """Compare a step without its data with LeRobot's: `benchmarks.compute`."""
    from benchmarks.compute import measure

    data = [f"dataset.root={bench.pictures}"] if bench.pictures else ["dataset=pusht_demo", "dataset.episodes=[0,1]"]
    wanted = (
        [("pusht_fast", 2)] if bench.small else [(p, b) for p in ("pusht_basic", "pusht_advanced") for b in (64, 256)]
    )
    rounds, steps = (2, 1) if bench.small else (5, 10)
    more: dict[str, Any] = {"data": data, "device": bench.device, "rounds": rounds, "steps": steps, "compiled": False}
    for preset, batch in wanted:
        bench.found[f"{preset}, {batch}"] = measure(preset, batch, **more)
    return bench.found


def encoder(bench: Bench) -> dict[str, Any]:
    """Time the ResNet of `pusht_basic`, 128 pictures, by our kernels and by PyTorch's: `benchmarks.encoder`."""
    from benchmarks.encoder import measure

    return measure(bench.device, batch=2 if bench.small else 128, steps=bench.steps(10))


def saving(bench: Bench) -> dict[str, Any]:
    """Time how long training stands still for a checkpoint: `benchmarks.saving`."""
    from benchmarks.saving import PRESETS, measure

    for preset in PRESETS[:1] if bench.small else PRESETS:
        bench.found[preset] = measure(preset, bench.device, bench.folder, rounds=4)
    return bench.found


def chunks(bench: Bench) -> dict[str, Any]:
    """Compare one action chunk with LeRobot's, in float32 without TF32: `benchmarks.inference`."""
    from benchmarks.inference import PRESETS, measure

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # training, above, lets it
    rounds = 2 if bench.small else 20
    wanted = PRESETS[:1] if bench.small else PRESETS
    for preset in wanted:
        bench.found[preset] = measure(preset, bench.device, rounds, 0.0 if bench.device == "cuda" else 0.05)
    return bench.found


def end_to_end(bench: Bench) -> dict[str, Any]:
    """Train beside `lerobot-train`, both in bf16, each with its own loader: `benchmarks.end_to_end`."""
    from benchmarks.end_to_end import compare

    if not bench.pictures:
        return {"skipped": "name PushT's dataset with --pictures"}
    wanted = [
        ("pusht_basic", 64, 30),
        ("pusht_basic", 256, 12),
        ("pusht_advanced", 64, 20),
        ("pusht_advanced", 256, 12),
    ]
    wanted = [case for case in wanted if bench.wants(f"{case[0]}, {case[1]}")]
    cases = [("pusht_cpu", 2, 6)] if bench.small else wanted
    compare(cases, Path(bench.pictures).resolve(), bench.found, bench.folder, "bf16")
    return bench.found


def record(bench: Bench) -> dict[str, Any]:
    """Train the time-to-quality record's recipe; its policy stays in the folder of `--keep`: `benchmarks.record`."""
    from benchmarks.record import RECIPE, SMALL, compile_seconds
    from getiaction.report.sweep import training_seconds
    from getiaction.train import train

    folder = (bench.keep or bench.folder) / "record"
    folder.mkdir(parents=True)
    more = [*(SMALL if bench.small else []), f"hardware.device={bench.device}"]
    begin = time.perf_counter()
    train(compose([*RECIPE, *more, f"output_dir={folder}"]), folder)
    wall, lines = time.perf_counter() - begin, read_metrics(folder)
    seconds = round(training_seconds(lines), 1)
    compiling = compile_seconds(lines, seconds)
    return {"training_seconds": seconds, "of_which_compiling": compiling, "wall_seconds": wall, "metrics": lines}
