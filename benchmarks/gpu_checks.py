"""Say whether a device computes what it should: sections of `benchmarks.gpu`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu_bench import QUIET, Bench
from getiaction.config.build import build_policy
from getiaction.config.compose import compose
from getiaction.interop.lerobot import load_policy
from getiaction.policy import BatchedActor, Features
from getiaction.training.metrics import read_metrics

Gradients = dict[str, list[Tensor]]  # of each part of a policy


def parity(bench: Bench) -> dict[str, float]:
    """Compare loss and gradients with the CPU's, in float32 without TF32; gaps are shares of the largest gradient.

    Rounding alone leaves the U-Net's gradients within 2e-6, but puts the encoder's, below, up to 2e-3 apart where it
    decides which way a ReLU or a maximum goes: `python -m benchmarks.rounding`.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    (loss, wanted), (other, found) = (loss_and_gradients(device) for device in ("cpu", bench.device))
    return {"loss_cpu": loss, "loss_gap": abs(loss - other), **gradient_gaps(wanted, found)}


def loss_and_gradients(
    device: torch.device | str, seed: int = 0, order: torch.memory_format = torch.channels_last
) -> tuple[float, Gradients]:
    """Return what `pusht_basic` makes of four random samples, its first weights always the same.

    Args:
        order: of the encoder's weights and pictures; as in training only `channels_last`, which the kernels take.
    """
    features = Features(action_dim=2, state_dim=2, cameras={"observation.image": (3, 96, 96)})
    draw = torch.Generator().manual_seed(seed)
    batch = {
        "observation.image": torch.randint(0, 256, (4, 2, 3, 84, 84), generator=draw, dtype=torch.uint8),
        "observation.state": torch.randn(4, 2, 2, generator=draw),
        "action": torch.randn(4, 16, 2, generator=draw),
        "action_is_pad": torch.zeros(4, 16, dtype=torch.bool),
    }
    noise, timesteps = torch.randn(4, 16, 2, generator=draw), torch.tensor([0, 20, 60, 99])
    policy = build_policy(compose(["+preset=pusht_basic"]), features, {}).to(device)
    policy.encoders[0].to(memory_format=order)
    loss = policy({key: value.to(device) for key, value in batch.items()}, noise.to(device), timesteps.to(device))
    loss.backward()
    parts = {"encoder": policy.encoders[0], "unet": policy.diffusion.unet}
    return loss.item(), {name: [weight.grad.cpu() for weight in part.parameters()] for name, part in parts.items()}


def gradient_gaps(wanted: Gradients, found: Gradients) -> dict[str, float]:
    """Return the largest difference in each part, as a share of the largest gradient of all."""
    largest = max(float(one.abs().max()) for part in wanted.values() for one in part)
    return {
        f"{name}_gradient_gap": max(float((a - b).abs().max()) for a, b in zip(part, found[name], strict=True))
        / largest
        for name, part in wanted.items()
    }


def updates(bench: Bench) -> dict[str, Any]:
    """Train on keypoints with steps replayed as CUDA graphs, and without: the same losses and weights.

    cuDNN's choice of kernels is fixed, and products are float32's.
    """
    from getiaction.config.run import build_trainer, start_accelerator
    from getiaction.config.sources import find_data

    found: dict[str, Any] = {}
    weights, losses = {}, {}
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
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
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    apart = [float((weights["plain"][key] - value).abs().max()) for key, value in weights["replayed"].items()]
    gaps = [abs(one - other) for one, other in zip(losses["plain"], losses["replayed"], strict=True)]
    return {**found, "largest_loss_gap": max(gaps), "largest_weight_gap": max(apart), "losses": losses["plain"]}


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


def out_of_memory(bench: Bench) -> dict[str, Any]:
    """Ask for far too much, and record what the user is told."""
    if bench.device == "cpu":
        return {"skipped": "a CPU's memory is everybody's"}
    wide = "unet.down_dims=[1024,1024,2048]"
    failed = bench.train("memory", "+preset=pusht_laptop", wide, "training.batch_size=16384", *QUIET, check=False)
    message = failed.stderr.strip().splitlines()[-1:]
    return {"code": failed.returncode, "message": message, "overrides": re.findall(r"[\w.]+=\S+", " ".join(message))}
