"""Check, measure and record everything about one accelerator in one call; a section that fails is recorded as such.

python -m benchmarks.gpu --pictures ../shared/data/pusht                              # one CUDA GPU
python -m benchmarks.gpu --device cpu --small --result /tmp/gpu.json                  # a rehearsal without one

Keypoints come from the demonstrations in the box. Pictures do, too, or from where `--pictures` says: PushT's dataset,
which `end_to_end` needs, or a frame cache that was made elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from getiaction.config.build import build_policy
from getiaction.config.compose import compose
from getiaction.config.record import describe_machine
from getiaction.interop.lerobot import load_policy
from getiaction.policy import BatchedActor, Features
from getiaction.training.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
PICTURE_PRESETS = ("pusht_basic", "pusht_advanced", "pusht_fast", "pusht_multigpu")
WAYS: dict[str, tuple[str, ...]] = {
    "as_it_is": (),
    "channels_first": ("hardware.channels_last=false",),
    "compiled": ("hardware.compile=true",),
    "compiled_channels_first": ("hardware.compile=true", "hardware.channels_last=false"),
    "plain_launches": ("hardware.cuda_graphs=false",),
    "library": ("hardware.convolutions=library",),
}
LIMIT = 120  # seconds of a section: the device is there for minutes
WARM = 0.3  # share of the steps that are left out of a rate
QUIET = ["validation.every=null", "validation.max_samples=1", "validation.max_sampled=0", "training.save_every=null"]


@dataclass
class Bench:
    """Hold what all sections share."""

    device: str
    small: bool
    pictures: str | None
    folder: Path
    keep: Path | None = None

    def steps(self, count: int) -> int:
        """Return how many steps to take: few in a rehearsal."""
        return min(count, 4) if self.small else count

    def train(self, name: str, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Train as users do, in a process of its own, into the folder `name`."""
        command = [sys.executable, "-m", "getiaction.train", f"hardware.device={self.device}", *overrides]
        command += [f"output_dir={self.folder / name}"] if not any("resume" in one for one in overrides) else []
        return subprocess.run(command, check=check, capture_output=True, text=True)

    def rate(self, name: str) -> dict[str, Any]:
        """Return the rate of a run after its first steps, and its last loss."""
        lines = [line for line in read_metrics(self.folder / name) if "samples_per_s" in line]
        warm = lines[int(len(lines) * WARM) :]
        rates = [line["samples_per_s"] for line in warm]
        return {
            "samples_per_s": round(statistics.median(rates), 1),
            "range": [min(rates), max(rates)],
            "data_wait": round(statistics.mean(line["data_wait"] for line in warm), 4),
            "loss": lines[-1]["loss"],
            "precision": json.loads((self.folder / name / "run.json").read_text())["mixed_precision"],
        }


def parity(bench: Bench) -> dict[str, float]:
    """Compare loss and gradients with the CPU's, in float32 without TF32; relative to the largest gradient."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    features = Features(action_dim=2, state_dim=2, cameras={"observation.image": (3, 96, 96)})
    draw = torch.Generator().manual_seed(0)
    batch = {
        "observation.image": torch.randint(0, 256, (4, 2, 3, 84, 84), generator=draw, dtype=torch.uint8),
        "observation.state": torch.randn(4, 2, 2, generator=draw),
        "action": torch.randn(4, 16, 2, generator=draw),
        "action_is_pad": torch.zeros(4, 16, dtype=torch.bool),
    }
    noise, timesteps = torch.randn(4, 16, 2, generator=draw), torch.tensor([0, 20, 60, 99])
    losses, gradients = [], []
    for device in ("cpu", bench.device):
        policy = build_policy(compose(["+preset=pusht_basic"]), features, {}).to(device)
        policy.encoders[0].to(memory_format=torch.channels_last)  # as in training: only so the kernels take pictures
        loss = policy({key: value.to(device) for key, value in batch.items()}, noise.to(device), timesteps.to(device))
        loss.backward()
        losses.append(loss.item())
        gradients.append([weight.grad.cpu() for weight in policy.parameters() if weight.grad is not None])
    largest = max(float(one.abs().max()) for one in gradients[0])
    gap = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    return {"loss_cpu": losses[0], "loss_gap": abs(losses[0] - losses[1]), "gradient_gap": gap / largest}


def updates(bench: Bench) -> dict[str, Any]:
    """Train on keypoints with steps replayed as CUDA graphs, and without: the same losses and weights.

    cuDNN's choice of kernels is fixed, and products are float32's.
    """
    from getiaction.config.run import build_trainer, start_accelerator
    from getiaction.config.sources import find_data

    found: dict[str, Any] = {}
    weights, losses = {}, {}
    for name in ("plain", "replayed"):
        replays = f"hardware.cuda_graphs={str(name == 'replayed').lower()}"
        short = ["+preset=pusht_laptop", f"hardware.device={bench.device}", replays, "hardware.tf32=false", *QUIET]
        short += ["hardware.mixed_precision=no", "training.max_steps=12", "training.log_every=1"]
        config, folder = compose([*short, "evaluation.final_episodes=null"]), bench.folder / f"updates_{name}"
        folder.mkdir()
        trainer = build_trainer(config, find_data(config), start_accelerator(config, folder), folder)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        trainer.fit()
        found[f"{name}_is_a_graph"] = trainer.update.replay is not None and trainer.update.replay.captured
        weights[name] = {key: value.cpu() for key, value in trainer.policy.state_dict().items()}
        losses[name] = [line["loss"] for line in read_metrics(folder) if "loss" in line]
    torch.backends.cudnn.deterministic = False
    apart = [float((weights["plain"][key] - value).abs().max()) for key, value in weights["replayed"].items()]
    gaps = [abs(one - other) for one, other in zip(losses["plain"], losses["replayed"], strict=True)]
    return {**found, "largest_loss_gap": max(gaps), "largest_weight_gap": max(apart), "losses": losses["plain"]}


def precisions(bench: Bench) -> dict[str, Any]:
    """Train `pusht_laptop` in each precision (fp16 with its gradient scaler): rate and last loss."""
    found = {}
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
        found[precision] = bench.rate(precision)
    return found


def resumed(bench: Bench) -> dict[str, float]:
    """Train at one go, and stopped half-way; return the largest difference of the weights."""
    steps = bench.steps(200)
    short = ["+preset=pusht_laptop", "evaluation.final_episodes=null", "lr_scheduler.name=constant"]
    short += [*(one for one in QUIET if "save_every" not in one), f"training.save_every={steps // 2}"]
    bench.train("whole", *short, f"training.max_steps={steps}")
    bench.train("half", *short, f"training.max_steps={steps // 2}")
    bench.train("half", f"training.resume={bench.folder / 'half'}", f"training.max_steps={steps}")
    weights = [
        load_file(bench.folder / name / "checkpoints/last/pretrained_model/model.safetensors")
        for name in ("whole", "half")
    ]
    return {"largest_difference": max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0])}


def presets(bench: Bench) -> dict[str, Any]:
    """Measure each preset for pictures as it stands, and compiled."""
    modes = {"": (), "_compiled": ("hardware.compile=true",)}
    return {
        f"{preset}{mode}": rate_of(bench, f"{preset}{mode}", preset, *more)
        for preset in PICTURE_PRESETS
        for mode, more in modes.items()
        if not (mode and bench.small)
    }


def ways(bench: Bench) -> dict[str, Any]:
    """Measure other ways to train `pusht_basic`, in bf16: memory order with group norm, CUDA graphs."""
    found = {}
    for name, more in WAYS.items():
        if not (bench.small and any("compile" in one for one in more)):
            found[name] = rate_of(bench, name, "pusht_basic", "hardware.mixed_precision=bf16", *more)
    return found


def rate_of(bench: Bench, name: str, preset: str, *more: str) -> dict[str, Any]:
    """Train a preset from pictures for a few steps; return its rate."""
    data = [f"dataset.root={bench.pictures}"] if bench.pictures else ["dataset=pusht_demo"]
    episodes = [] if bench.pictures else ["dataset.episodes=[0,1,2,3]"]
    small = ["training.batch_size=2"] if bench.small else []
    short = (f"training.max_steps={bench.steps(60)}", "training.log_every=2", *small, *QUIET)
    alone = ("hardware.num_processes=1", "backbone.weights=null")
    bench.train(name, f"+preset={preset}", *data, *episodes, *short, *alone, *more)
    return bench.rate(name)


def rows(bench: Bench) -> dict[str, Any]:
    """Say whether a row's actions are the same, bit for bit, alone and among 64."""
    policy = load_policy(str(bench.folder / "no")).to(bench.device)
    draw = np.random.default_rng(0)
    observations = {
        "observation.state": draw.uniform(0, 512, (64, 2, 2)).astype(np.float32),
        "observation.environment_state": draw.uniform(0, 512, (64, 2, 16)).astype(np.float32),
    }
    moments = [(number, 0) for number in range(64)]
    actor = BatchedActor(policy)
    together = actor(observations, moments)
    alone = [actor({k: v[i : i + 1] for k, v in observations.items()}, moments[i : i + 1])[0] for i in range(0, 64, 7)]
    return {"rows": actor.batch_size, "equal": bool((together[::7] == np.stack(alone)).all())}


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
    return {f"{preset}, {batch}": measure(preset, batch, **more) for preset, batch in wanted}


def encoder(bench: Bench) -> dict[str, Any]:
    """Time the ResNet of `pusht_basic`, 128 pictures, by our kernels and by PyTorch's: `benchmarks.encoder`."""
    from benchmarks.encoder import measure

    return measure(bench.device, batch=2 if bench.small else 128, steps=bench.steps(10))


def chunks(bench: Bench) -> dict[str, Any]:
    """Compare one action chunk with LeRobot's, in float32 without TF32: `benchmarks.inference`."""
    from benchmarks.inference import PRESETS, measure

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # training, above, lets it
    rounds = 2 if bench.small else 20
    wanted = PRESETS[:1] if bench.small else PRESETS
    return {preset: measure(preset, bench.device, rounds, 0.0 if bench.device == "cuda" else 0.05) for preset in wanted}


def busy(bench: Bench) -> dict[str, Any]:
    """Measure which share of a training step the GPU computes: the kernels' time, of the time between steps."""
    from torch.profiler import ProfilerActivity, profile

    from getiaction.config.run import build_trainer, start_accelerator
    from getiaction.config.sources import find_data

    wait = torch.cuda.synchronize if bench.device == "cuda" else lambda: None
    pictures = [f"dataset.root={bench.pictures}"] if bench.pictures else ["dataset=pusht_demo"]
    data = {"pusht_pictures": [], "pusht_basic": [*pictures, "dataset.episodes=[0,1,2,3]"]}
    steps, found = bench.steps(60), {}
    for preset, more in list(data.items())[: 1 if bench.small else None]:
        short = [f"+preset={preset}", *more, f"hardware.device={bench.device}", "hardware.mixed_precision=no", *QUIET]
        config, folder = compose([*short, "evaluation.final_episodes=null"]), bench.folder / f"busy_{preset}"
        trainer = build_trainer(config, find_data(config), start_accelerator(config, folder), folder)
        trainer.model.train()
        coming = trainer.batches.iterate(0, steps + 12)

        def take(count: int, trainer: Any = trainer, coming: Any = coming) -> float:
            wait()
            begin = time.perf_counter()
            for _ in range(count):
                trainer._optimise(next(coming))
            wait()
            return (time.perf_counter() - begin) * 1e3 / count

        take(8)
        wall = take(steps)
        with profile(activities=[ProfilerActivity.CUDA if bench.device == "cuda" else ProfilerActivity.CPU]) as seen:
            take(3)
        kernels = sum(one.device_time_total for one in seen.key_averages()) / 3e3
        found[preset] = {"step_ms": round(wall, 3), "kernels_ms": round(kernels, 3), "busy": round(kernels / wall, 3)}
    return found


def end_to_end(bench: Bench) -> dict[str, Any]:
    """Train `pusht_basic` beside `lerobot-train`, each with its own process and loader: `benchmarks.train`."""
    from benchmarks.train import compare

    if not bench.pictures:
        return {"skipped": "name PushT's dataset with --pictures"}
    how = {"steps": 4 if bench.small else 30, "rounds": 1, "workers": 4, "threads": torch.get_num_threads()}
    return compare("pusht_basic", Path(bench.pictures).resolve(), "no", argparse.Namespace(**how))


def record(bench: Bench) -> dict[str, Any]:
    """Train the time-to-quality record's recipe; its policy stays in the folder of `--keep`: `benchmarks.record`."""
    from benchmarks.keep import training_seconds
    from benchmarks.record import RECIPE, SMALL, compile_seconds
    from getiaction.train import train

    folder = (bench.keep or bench.folder) / "record"
    folder.mkdir(parents=True)
    more = [*(SMALL if bench.small else []), f"hardware.device={bench.device}"]
    begin = time.perf_counter()
    train(compose([*RECIPE, *more, f"output_dir={folder}"]), folder)
    wall, lines = time.perf_counter() - begin, read_metrics(folder)
    seconds = training_seconds(lines)
    compiling = compile_seconds(lines, seconds)
    return {"training_seconds": seconds, "of_which_compiling": compiling, "wall_seconds": wall, "metrics": lines}


def out_of_memory(bench: Bench) -> dict[str, Any]:
    """Ask for far too much, and record what the user is told."""
    if bench.device == "cpu":
        return {"skipped": "a CPU's memory is everybody's"}
    wide = "unet.down_dims=[1024,1024,2048]"
    failed = bench.train("memory", "+preset=pusht_laptop", wide, "training.batch_size=16384", *QUIET, check=False)
    message = failed.stderr.strip().splitlines()[-1:]
    return {"code": failed.returncode, "message": message, "overrides": re.findall(r"[\w.]+=\S+", " ".join(message))}


SECTIONS: tuple[Callable[[Bench], dict[str, Any]], ...] = (
    parity,
    updates,
    encoder,
    record,
    chunks,
    end_to_end,
    compute,
    busy,
    precisions,
    rows,
    resumed,
    evaluation,
    presets,
    ways,
    out_of_memory,
)


def give_up(*_: object) -> None:
    """End a section that takes too long."""
    raise TimeoutError("this section took longer than --limit")


def main() -> None:
    """Run all sections and write what they found, after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pictures", help="a frame cache of PushT, for a machine that cannot decode videos")
    parser.add_argument("--keep", type=Path, help="where the record's run stays, to evaluate it elsewhere")
    parser.add_argument("--small", action="store_true", help="a rehearsal: few steps, small batches")
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument(
        "--sections", nargs="*", choices=names, default=names, help="`rows` and `evaluation` use `precisions`"
    )
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds after which a section is given up")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/gpu-<date>.json")
    arguments = parser.parse_args()
    path = arguments.result or RESULTS / f"gpu-{datetime.now(UTC):%Y-%m-%d}.json"
    signal.signal(signal.SIGALRM, give_up)
    result: dict[str, Any] = {"machine": describe_machine(torch.device(arguments.device)), "small": arguments.small}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.device, arguments.small, arguments.pictures, Path(folder), arguments.keep)
        for section in [one for one in SECTIONS if one.__name__ in arguments.sections]:
            begin = time.perf_counter()
            signal.alarm(0 if arguments.small else arguments.limit)
            try:
                found = section(bench)
            except subprocess.CalledProcessError as error:
                found = {"failed": error.cmd, "stderr": error.stderr.splitlines()[-12:]}
            except Exception:  # the other sections go on
                found = {"failed": traceback.format_exc().splitlines()[-6:]}
            signal.alarm(0)
            result[section.__name__] = found | {"section_seconds": round(time.perf_counter() - begin, 1)}
            print(section.__name__, json.dumps(result[section.__name__]), flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
