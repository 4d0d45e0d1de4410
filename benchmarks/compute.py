"""Measure a training step without its data against LeRobot's, turn by turn, in one process.

python -m benchmarks.compute --presets pusht_cpu --batches 16                                  # this CPU
python -m benchmarks.compute --data dataset.root=CACHE_FOLDER --batches 64 256 --compiled        # one CUDA GPU

Ours is a whole step of the trainer on a batch that lies ready: noise, loss, gradients, clipping, AdamW and the average.
LeRobot's is what `lerobot_train.update_policy` does with a batch that is normalised already: loss, gradients, clipping,
Adam, and the two numbers that it reads; it has no average. Both in float32 (on CUDA with TF32, as `hardware.tf32` says)
and under autocast to bf16, ours there also compiled. A time is the median over the rounds of a few steps, the first
one (which compiles) apart. On a CPU LeRobot profits from what our trainer does to the process (`training/heap.py`);
`benchmarks.train` measures both as users run them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as LeRobotPolicy

from benchmarks.train import QUIET, write_start
from getiaction.config.compose import compose
from getiaction.config.record import describe_machine
from getiaction.config.run import build_trainer, start_accelerator
from getiaction.config.schema import Config
from getiaction.config.sources import find_data
from getiaction.half import is_faster_in_bf16
from getiaction.keys import ACTION_IS_PAD

RESULTS = Path(__file__).parent / "results"
CLIP = 10.0  # LeRobot's default
Step = Callable[[], object]


def our_step(config: Config, folder: Path) -> Step:
    """Return what takes one of our steps, again and again on the first batch."""
    trainer = build_trainer(config, find_data(config), start_accelerator(config, folder), folder)
    trainer.model.train()
    batches = trainer.batches.step(0)

    def step() -> None:
        trainer._optimise(batches)
        trainer.unread.clear()

    return step


def lerobot_step(start: Path, config: Config, device: str, *, bf16: bool) -> Step:
    """Return what takes one of LeRobot's steps, again and again on a drawn batch."""
    policy = LeRobotPolicy.from_pretrained(start).to(device).train()
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    size, policy_config = config.training.batch_size, policy.config
    shapes = {key: (policy_config.n_obs_steps, *one.shape) for key, one in policy_config.input_features.items()}
    shapes |= {key: (policy_config.horizon, *one.shape) for key, one in policy_config.output_features.items()}
    batch = {key: torch.rand((size, *shape), device=device) for key, shape in shapes.items()}
    batch[ACTION_IS_PAD] = torch.zeros((size, policy_config.horizon), dtype=torch.bool, device=device)

    def step() -> tuple[float, float]:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, _ = policy.forward(dict(batch))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def measure(
    preset: str, batch_size: int, *, data: list[str], device: str, rounds: int, steps: int, compiled: bool
) -> dict[str, Any]:
    """Return milliseconds of a step of each contestant, and the ratios of LeRobot's to ours."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(step: Step, count: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        return (time.perf_counter() - begin) * 1e3 / count

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = write_start(preset, folder / "start")
        short = [*data, f"training.batch_size={batch_size}", f"training.init_from={start}", *QUIET]
        short += [f"hardware.device={device}", "hardware.num_processes=1", "evaluation.final_episodes=null"]
        short += [f"training.max_grad_norm={CLIP}"]

        def ours(name: str, *more: str) -> Step:
            return our_step(compose([f"+preset={preset}", *short, *more]), folder / name)

        plain = compose([f"+preset={preset}", *short])
        calls = {"lerobot": lerobot_step(start, plain, device, bf16=False)}
        calls["getiaction"] = ours("plain", "hardware.mixed_precision=no")
        if is_faster_in_bf16(device):
            calls["lerobot bf16"] = lerobot_step(start, plain, device, bf16=True)
            calls["getiaction bf16"] = ours("bf16", "hardware.mixed_precision=bf16")
            if compiled:
                more = ("hardware.mixed_precision=bf16", "hardware.compile=true")
                calls["getiaction bf16 compiled"] = ours("compiled", *more)
        first = {name: round(timed(step, 1), 1) for name, step in calls.items()}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name in list(calls)[:: 1 if number % 2 else -1]:
                taken[name].append(timed(calls[name], steps))
    medians = {name: statistics.median(ms) for name, ms in taken.items()}
    calls.clear()
    gc.collect()  # the next one wants the memory
    return {
        "preset": preset,
        "batch_size": batch_size,
        "first_step_ms": first,
        "step_ms": {name: round(ms, 3) for name, ms in medians.items()},
        "range_ms": {name: [round(min(ms), 3), round(max(ms), 3)] for name, ms in taken.items()},
        "samples_per_s": {name: round(1e3 * batch_size / ms, 1) for name, ms in medians.items()},
        "ratio": {
            name: round(medians["lerobot bf16" if "bf16" in name else "lerobot"] / ms, 2)
            for name, ms in medians.items()
            if name.startswith("getiaction")
        },
    }


def main() -> None:
    """Measure what was asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=["pusht_basic", "pusht_advanced"])
    parser.add_argument("--batches", nargs="*", type=int, default=[64])
    parser.add_argument("--data", nargs="*", default=["dataset=pusht_demo", "dataset.episodes=[0,1,2,3]"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each round")
    parser.add_argument("--compiled", action="store_true", help="ours also with hardware.compile=true")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/compute-<date>.json")
    arguments = parser.parse_args()
    results = []
    print("| preset, batch | here | LeRobot, ms a step | here, ms | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for preset in arguments.presets:
        for batch_size in arguments.batches:
            result = measure(
                preset,
                batch_size,
                data=arguments.data,
                device=arguments.device,
                rounds=arguments.rounds,
                steps=arguments.steps,
                compiled=arguments.compiled,
            )
            results.append(result)
            for name, ratio in result["ratio"].items():
                other = "lerobot bf16" if "bf16" in name else "lerobot"
                how = name.removeprefix("getiaction").strip() or "float32"
                taken = result["step_ms"]
                shown = f"{taken[other]:.1f} | {taken[name]:.1f} | **{ratio}**"
                print(f"| `{preset}`, {batch_size} | {how} | {shown} |", flush=True)
    path = arguments.result or RESULTS / f"compute-{datetime.now(UTC):%Y-%m-%d}.json"
    machine = describe_machine(torch.device(arguments.device))
    path.write_text(json.dumps({"date": datetime.now(UTC).isoformat(), **machine, "results": results}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
