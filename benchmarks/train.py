"""Measure training against `lerobot-train`, turn by turn: `python -m benchmarks.train --root ../shared/data`.

For each preset a policy of drawn weights is written as a checkpoint; both trainers start from it, on the same episodes,
with the same batch and in float32, each in a process of its own with its own loader, as users run them. They take
turns, `--rounds` times, in changing order. A rate is the median over the steps after warm-up, of what each trainer
itself reports (waiting for data included, start-up not). The presets that `--bf16` names are measured a second time
with our `hardware.mixed_precision=bf16` against LeRobot's float32; with `--lerobot-bf16` against LeRobot's bf16, as
`accelerate launch --mixed_precision=bf16` brings it about. All goes to benchmarks/results/train-<date>.json.

`--profile` measures instead where the time of our own steps goes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference import features_of, statistics_of
from getiaction.config.build import build_policy
from getiaction.config.compose import compose
from getiaction.config.record import describe_machine
from getiaction.interop.lerobot import write_policy

RESULTS = Path(__file__).parent / "results"
STEPS = {"pusht_cpu": 40, "pusht_keypoints": 40, "pusht_basic": 6, "pusht_advanced": 4}
WARM_UP = 0.34  # of the steps
QUIET = ["training.save_every=null", "validation.every=null", "validation.max_samples=1", "validation.max_sampled=0"]


def dataset_of(preset: str, root: Path) -> Path:
    """Return where a preset's data lie below `root`."""
    return root / ("pusht_keypoints" if preset == "pusht_keypoints" else "pusht")


def write_start(preset: str, folder: Path) -> Path:
    """Write a policy of drawn weights for both to start from."""
    config = compose([f"+preset={preset}", "hardware.num_processes=1"])
    torch.manual_seed(0)
    features = features_of(config)
    write_policy(folder, build_policy(config, features, statistics_of(features), fetch_weights=False))
    return folder


def run(command: list[str], threads: int, **more: str) -> tuple[str, float]:
    """Run a trainer; return what it said and the seconds that it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **more}
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr, time.perf_counter() - begin


def commands_of(preset: str, root: Path, start: Path, folder: Path, how: argparse.Namespace) -> dict[str, list[str]]:
    """Return what each trainer is called with: `how` has batch, steps, workers, threads and our precision."""
    config = compose([f"+preset={preset}", "hardware.num_processes=1"])
    ours = [sys.executable, "-m", "getiaction.train", f"+preset={preset}", f"dataset.root={root}", *QUIET]
    ours += [f"training.init_from={start}", f"training.max_steps={how.steps}", "training.log_every=1"]
    ours += [f"hardware.mixed_precision={how.precision}", f"output_dir={folder}", "evaluation.final_episodes=null"]
    ours += ["hardware.num_processes=1", f"hardware.num_threads={how.threads}", "lr_scheduler.num_warmup_steps=0"]
    ours += [f"training.batch_size={how.batch}"]
    theirs = [sys.executable, "-m", "lerobot.scripts.lerobot_train", f"--policy.path={start}", "--wandb.enable=false"]
    theirs += [f"--dataset.root={root}", "--dataset.repo_id=lerobot/pusht", f"--batch_size={how.batch}"]
    theirs += [f"--steps={how.steps}", f"--num_workers={how.workers}", "--log_freq=1", "--env_eval_freq=0"]
    theirs += ["--save_freq=1000000", "--save_checkpoint=false", "--policy.push_to_hub=false"]
    theirs += [f"--output_dir={folder}", f"--policy.device={'cuda' if torch.cuda.is_available() else 'cpu'}"]
    if config.dataset.episodes is not None:
        theirs += [f"--dataset.episodes={list(config.dataset.episodes)}".replace(" ", "")]
    return {"lerobot": theirs, "getiaction": ours}


def train_ours(command: list[str], folder: Path, how: argparse.Namespace) -> tuple[list[float], float]:
    """Return samples/s of every step, and the seconds of the whole command."""
    _, seconds = run(command, how.threads)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["samples_per_s"] for line in lines if "samples_per_s" in line], seconds


def train_lerobot(command: list[str], _: Path, how: argparse.Namespace) -> tuple[list[float], float]:
    """Return samples/s of every step, and the seconds of the whole command."""
    in_bf16 = how.lerobot_bf16 and how.precision == "bf16"
    said, seconds = run(command, how.threads, ACCELERATE_MIXED_PRECISION="bf16" if in_bf16 else "no")
    times = re.findall(r"updt_s:([\d.]+) data_s:([\d.]+)", said)
    return [how.batch / (float(update) + float(data)) for update, data in times], seconds


def median_after_warm_up(rates: list[float]) -> list[float]:
    """Return quartiles of the rates after warm-up, in samples/s."""
    warm = rates[int(len(rates) * WARM_UP) :]
    return [round(quartile, 2) for quartile in statistics.quantiles(warm, n=4)]


def compare(preset: str, root: Path, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of both trainers, round by round, and the ratio of their medians."""
    steps = arguments.steps or STEPS[preset]
    how = argparse.Namespace(**{**vars(arguments), "steps": steps, "precision": precision})
    precisions = {"getiaction": precision, "lerobot": precision if how.lerobot_bf16 else "no"}
    trainers: dict[str, Callable[..., Any]] = {"lerobot": train_lerobot, "getiaction": train_ours}
    rates: dict[str, list[float]] = defaultdict(list)
    how.batch = how.batch or compose([f"+preset={preset}", "hardware.num_processes=1"]).training.batch_size
    result: dict[str, Any] = {"preset": preset, "batch_size": how.batch, "precision": precisions, "rounds": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = write_start(preset, folder / "start")
        for number in range(arguments.rounds):
            for name in list(trainers)[:: 1 if number % 2 == 0 else -1]:
                into = folder / f"{name}{number}"
                command = commands_of(preset, root, start, into, how)[name]
                measured, seconds = trainers[name](command, into, how)
                assert len(measured) == steps, f"{name} reported {len(measured)} of {steps} steps"
                quartiles = median_after_warm_up(measured)
                rates[name] += measured[int(steps * WARM_UP) :]
                entry = {
                    "trainer": name,
                    "samples_per_s": quartiles,
                    "wall_s": round(seconds, 1),
                    "command": command[1:],
                }
                result["rounds"].append(entry)
                print(f"{preset} {precision}: {name} {quartiles[1]:.1f} samples/s, {seconds:.0f} s in all", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        **result,
        "samples_per_s": {name: [round(q, 2) for q in statistics.quantiles(v, n=4)] for name, v in rates.items()},
        "ratio": round(medians["getiaction"] / medians["lerobot"], 2),
    }


def profile(preset: str, root: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Train in this process; return the share of each part in the time of a step, and the seconds of a step."""
    from getiaction.config.run import build_trainer, start_accelerator
    from getiaction.config.sources import find_data

    steps = arguments.steps or STEPS[preset]
    more = [
        f"+preset={preset}",
        f"dataset.root={root}",
        "hardware.num_processes=1",
        "evaluation.final_episodes=null",
        *QUIET,
    ]
    config = compose(
        [*more, f"training.max_steps={steps}", *arguments.more, f"hardware.num_threads={arguments.threads}"]
    )
    spent: dict[str, float] = defaultdict(float)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        wait()
        begin = time.perf_counter()
        yield
        wait()
        spent[name] += time.perf_counter() - begin

    def watch(owner: Any, method: str, name: str) -> None:
        plain = getattr(owner, method)

        def watched(*given: Any, **named: Any) -> Any:
            with timed(name):
                return plain(*given, **named)

        setattr(owner, method, watched)

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, find_data(config), start_accelerator(config, Path(folder)), Path(folder))
        watch(trainer.policy, "encode", "encoder")
        watch(trainer.policy.diffusion.unet, "forward", "U-Net")
        watch(trainer.accelerator, "backward", "backward")
        watch(trainer.accelerator, "clip_grad_norm_", "optimiser")
        watch(trainer.optimizer, "step", "optimiser")
        if trainer.ema is not None:
            watch(trainer.ema, "update", "EMA")
        trainer._optimise(next(trainer.batches.iterate(0, steps)))  # warm-up
        spent.clear()
        with timed("step"):
            coming = trainer.batches.iterate(0, steps)
            for _ in range(steps):
                with timed("data"):
                    batches = next(coming)
                trainer._optimise(batches)
    whole = spent.pop("step")
    spent["the rest"] = whole - sum(spent.values())
    return {**{name: round(seconds / whole, 4) for name, seconds in spent.items()}, "step_s": round(whole / steps, 4)}


def main() -> None:
    """Measure the presets that were asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="a folder with pusht and pusht_keypoints")
    parser.add_argument("--presets", nargs="*", default=["pusht_cpu", "pusht_keypoints", "pusht_basic"], choices=STEPS)
    parser.add_argument("--bf16", nargs="*", choices=STEPS, help="default: those of --presets")
    parser.add_argument("--lerobot-bf16", action="store_true", help="LeRobot in bf16, too, where ours is")
    parser.add_argument("--batch", type=int, help="default: by preset")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of each run; default: by preset")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=4, help="of LeRobot's loader; 4 is its default")
    parser.add_argument("--more", nargs="*", default=[], help="overrides for --profile: hardware.mixed_precision=bf16")
    parser.add_argument("--profile", action="store_true", help="where the time of our own steps goes")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/train-<date>.json")
    arguments = parser.parse_args()
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.profile:
        for preset in arguments.presets:
            print(preset, json.dumps(profile(preset, dataset_of(preset, arguments.root.resolve()), arguments)))
        return
    pairs = [(preset, "no") for preset in arguments.presets]
    pairs += [(preset, "bf16") for preset in (arguments.presets if arguments.bf16 is None else arguments.bf16)]
    results = [compare(name, dataset_of(name, arguments.root.resolve()), how, arguments) for name, how in pairs]
    path = arguments.result or RESULTS / f"train-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps({"date": datetime.now(UTC).isoformat(), **machine, "results": results}, indent=1) + "\n")
    print("| preset | precision here | lerobot-train, samples/s | here, samples/s | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for result in results:
        shown = [
            f"{q[1]:.1f} [{q[0]:.1f}, {q[2]:.1f}]" for q in map(result["samples_per_s"].get, ("lerobot", "getiaction"))
        ]
        precision = {"no": "float32"}.get(result["precision"]["getiaction"], "bf16")
        print(f"| `{result['preset']}` | {precision} | {' | '.join(shown)} | **{result['ratio']}** |")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
