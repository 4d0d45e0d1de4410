"""Say what does not fit into memory: before anything is decoded where it never could, with advice where it ran out."""

from __future__ import annotations

import math
from collections.abc import Iterator

import psutil
import torch
from accelerate import Accelerator

from getiaction.config.build import sizes
from getiaction.config.problems import Problem
from getiaction.config.schema import Config
from getiaction.policy import DiffusionPolicy
from getiaction.training.update import can_replay

FLOAT = ROW = 4  # bytes of a number, and at least of the number of a row


def check_memory(config: Config, policy: DiffusionPolicy) -> Iterator[Problem]:
    """Check that what a run must hold at once, counted low, is not more than this machine has.

    Args:
        policy: may be on "meta".
    """
    has = psutil.virtual_memory().total + psutil.swap_memory().total
    training, hardware, chunk = config.training, config.hardware, config.policy
    own = training.batch_size * training.gradient_accumulation_steps
    processes = hardware.num_processes * hardware.num_nodes
    draw = chunk.horizon * policy.features.action_dim * FLOAT
    noise = training.noise_draws * draw  # each process draws that of the global batch
    needed = own * processes * noise + own * sample_bytes(config, policy)
    if needed > has:
        yield Problem(
            f"a step (training.batch_size={training.batch_size} x training.gradient_accumulation_steps="
            f"{training.gradient_accumulation_steps} x {processes} processes, "
            f"training.noise_draws={training.noise_draws}, policy.horizon={chunk.horizon}, "
            f"policy.n_obs_steps={chunk.n_obs_steps}) takes at least {needed / 1e9:.0f} GB of memory, "
            f"this machine has {has / 1e9:.0f} GB: lower one of them; a usual batch is 64, a usual horizon 16"
        )
    weights = sum(weight.numel() for weight in policy.parameters())
    on_gpu = hardware.device in ("auto", "cuda") and torch.cuda.is_available()  # then only built on the host
    needed = weights * FLOAT * (1 if on_gpu else 2 + config.ema.enabled)
    if needed > has:
        yield Problem(
            f"the policy has {weights / 1e6:.0f} M parameters, which take at least {needed / 1e9:.0f} GB of memory, "
            f"this machine has {has / 1e9:.0f} GB: lower {sizes(config)}"
        )


def sample_bytes(config: Config, policy: DiffusionPolicy) -> int:
    """Return the least bytes that a gathered sample takes: states, pictures, actions, and which rows they are."""
    features, sides = policy.features, config.backbone.get("crop_shape") or config.backbone.get("resize_shape")
    pictures = [channels * math.prod(sides or size) for channels, *size in features.cameras.values()]
    seen = sum(features.vectors.values()) * FLOAT + sum(pictures) + ROW
    return config.policy.n_obs_steps * seen + config.policy.horizon * (features.action_dim * FLOAT + ROW)


def ran_out(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: a GPU's, or the host's for torch or NumPy."""
    said = any(words in str(error) for words in ("can't allocate memory", "out of memory"))  # a CPU's, an Apple GPU's
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or said


def memory_advice(config: Config, accelerator: Accelerator) -> str:
    """Return what helps when the device has no memory left, as overrides ready to paste."""
    training, backbone = config.training, config.backbone
    remedies = [
        f"training.batch_size={max(training.batch_size // 2, 1)} "
        f"training.gradient_accumulation_steps={training.gradient_accumulation_steps * 2}   # the same global batch"
    ]
    if dims := config.unet.get("down_dims"):
        remedies.append(f"unet.down_dims='[{','.join(str(dim // 2) for dim in dims)}]'   # a smaller U-Net")
    if side := backbone.get("crop_shape") or backbone.get("resize_shape"):
        smaller = ",".join(str(size * 3 // 4) for size in side)
        remedies.append(f"backbone.resize_shape='[{smaller}]' backbone.crop_shape=null   # smaller pictures")
    if accelerator.device.type == "cuda":
        remedies.append("hardware.data_placement=host   # the data stay in the host's memory")
        if config.hardware.cuda_graphs and can_replay(accelerator):
            remedies.append("hardware.cuda_graphs=false   # a graph keeps a step's memory to itself")
    if accelerator.mixed_precision == "no":
        remedies.append("hardware.mixed_precision=auto   # half the memory for activations")
    lines = "\n  ".join(remedies)
    return f"{accelerator.device} has no memory left; what was saved stays. Any of these helps:\n  {lines}"
