"""Bring a policy to its hardware, and choose how it computes there."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from getiaction.config.schema import HardwareConfig
from getiaction.machine import read_cpu
from getiaction.policy import DiffusionPolicy
from getiaction.policy.fast.convolution import lay_channels_last, use_library, use_taps
from getiaction.policy.fast.kernels import find_kernels
from getiaction.policy.fast.native_layers import use_native
from getiaction.training.batch_norm import synchronise_batch_norm
from getiaction.training.ranks import from_main
from getiaction.training.update import can_replay


def place(policy: DiffusionPolicy, hardware: HardwareConfig, accelerator: Accelerator) -> DiffusionPolicy:
    """Bring the policy to its device, its norms and memory order as the hardware wants them."""
    if hardware.sync_batch_norm and accelerator.num_processes > 1:
        synchronise_batch_norm(policy)
    policy = policy.to(accelerator.device)
    if hardware.channels_last:
        for encoder in policy.encoders:
            encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if hardware.convolutions == "library":
        use_library(policy)
    if from_main(copies_lines(hardware, accelerator)):  # processes must agree on how weights lie
        lay_channels_last(policy.diffusion.unet)
    policy.cuda_graphs = hardware.cuda_graphs
    if from_main(learns_by_taps(hardware, accelerator)):
        use_taps(policy)
        use_native(policy)
    return policy


def copies_lines(hardware: HardwareConfig, accelerator: Accelerator) -> bool:
    """Tell whether the U-Net's convolutions are `fused.py`'s, on a GPU: they copy lines of channels that lie so."""
    ours = accelerator.device.type == "cuda" and hardware.convolutions != "library" and not hardware.compile
    return hardware.channels_last and ours and find_kernels() is not None


def learns_by_taps(hardware: HardwareConfig, accelerator: Accelerator) -> bool:
    """Tell whether convolutions learn by taps, tiles and C: where they can, on CPUs known to be faster so."""
    can = (accelerator.device.type, accelerator.mixed_precision, hardware.compile) == ("cpu", "no", False)
    known = read_cpu("vendor_id") in ("GenuineIntel", "AuthenticAMD")  # benchmarks/NOTES.md
    return can and (hardware.convolutions == "taps" or (hardware.convolutions == "auto" and known))


def replays_steps(hardware: HardwareConfig, accelerator: Accelerator) -> bool:
    """Tell whether steps are replayed as CUDA graphs: where they can, and torch.compile makes none itself."""
    makes_its_own = hardware.compile and hardware.compile_mode != "default"
    return hardware.cuda_graphs and not makes_its_own and can_replay(accelerator)
