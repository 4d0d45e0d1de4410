"""Check, measure and record everything about one accelerator in one call; a section that fails is recorded as such.

python -m benchmarks.gpu --result benchmarks/results/gpu-<date>.json                 # one CUDA GPU
python -m benchmarks.gpu --device cpu --small --result /tmp/gpu.json                  # a rehearsal without one

Keypoints come from the demonstrations in the box. Pictures do, too, where PyAV decodes them; else `--pictures` names a
frame cache that was made elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
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

PICTURE_PRESETS = ("pusht_basic", "pusht_advanced", "pusht_fast", "pusht_multigpu")
WAYS: dict[str, tuple[str, ...]] = {
    "as_it_is": (),
    "channels_first": ("hardware.channels_last=false",),
    "compiled": ("hardware.compile=true",),
    "compiled_channels_first": ("hardware.compile=true", "hardware.channels_last=false"),
    "compiled_cuda_graphs": ("hardware.compile=true", "hardware.compile_mode=reduce-overhead"),
}
WARM = 0.3  # share of the steps that are left out of a rate
QUIET = ["validation.every=null", "validation.max_samples=1", "validation.max_sampled=0", "training.save_every=null"]


@dataclass
class Bench:
    """Hold what all sections share."""

    device: str
    small: bool
    pictures: str | None
    folder: Path

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
        loss = policy({key: value.to(device) for key, value in batch.items()}, noise.to(device), timesteps.to(device))
        loss.backward()
        losses.append(loss.item())
        gradients.append([weight.grad.cpu() for weight in policy.parameters() if weight.grad is not None])
    largest = max(float(one.abs().max()) for one in gradients[0])
    gap = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    return {"loss_cpu": losses[0], "loss_gap": abs(losses[0] - losses[1]), "gradient_gap": gap / largest}


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
    rounds, steps = (2, 1) if bench.small else (7, 20)
    more = {"data": data, "device": bench.device, "rounds": rounds, "steps": steps, "compiled": not bench.small}
    return {f"{preset}, {batch}": measure(preset, batch, **more) for preset, batch in wanted}


def chunks(bench: Bench) -> dict[str, Any]:
    """Compare one action chunk with LeRobot's, in float32 without TF32: `benchmarks.inference`."""
    from benchmarks.inference import PRESETS, measure

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # training, above, lets it
    rounds = 2 if bench.small else 20
    wanted = PRESETS[:1] if bench.small else PRESETS
    return {preset: measure(preset, bench.device, rounds, 0.0 if bench.device == "cuda" else 0.05) for preset in wanted}


def graphs(bench: Bench) -> dict[str, Any]:
    """Replay a whole action chunk as one CUDA graph, beside the plain calls: `benchmarks.graphs`."""
    from benchmarks.graphs import PRESETS, measure

    wanted = PRESETS[:1] if bench.small else PRESETS
    return {preset: measure(preset, bench.device, 2 if bench.small else 20) for preset in wanted}


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
    precisions,
    rows,
    resumed,
    evaluation,
    compute,
    chunks,
    graphs,
    presets,
    ways,
    out_of_memory,
)


def main() -> None:
    """Run all sections and write what they found, after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pictures", help="a frame cache of PushT, for a machine that cannot decode videos")
    parser.add_argument("--small", action="store_true", help="a rehearsal: few steps, small batches")
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument(
        "--sections", nargs="*", choices=names, default=names, help="`rows` and `evaluation` use `precisions`"
    )
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine(torch.device(arguments.device)), "small": arguments.small}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.device, arguments.small, arguments.pictures, Path(folder))
        for section in [one for one in SECTIONS if one.__name__ in arguments.sections]:
            begin = time.perf_counter()
            try:
                found = section(bench)
            except subprocess.CalledProcessError as error:
                found = {"failed": error.cmd, "stderr": error.stderr.splitlines()[-12:]}
            except Exception:  # the device is there for minutes: the other sections go on
                found = {"failed": traceback.format_exc().splitlines()[-6:]}
            result[section.__name__] = found | {"section_seconds": round(time.perf_counter() - begin, 1)}
            print(section.__name__, json.dumps(result[section.__name__]), flush=True)
            arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
