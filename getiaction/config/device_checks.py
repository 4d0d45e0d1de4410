"""Check that the devices and tools asked for are there, and can do what is asked of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import torch

from getiaction.config.problems import Problem
from getiaction.config.schema import Config
from getiaction.half import is_faster_in_bf16


def check_devices(config: Config) -> Iterator[Problem]:
    """Check the device, what computes on it, the processes and the tracker."""
    hardware = config.hardware
    gpus = torch.cuda.device_count()
    yield from check_convolutions(config, gpus)
    if hardware.device == "cuda" and gpus == 0:
        yield Problem("hardware.device=cuda, but torch sees no CUDA GPU here: use hardware=auto or hardware=cpu")
    if hardware.device == "mps" and not torch.backends.mps.is_available():
        yield Problem("hardware.device=mps, but torch sees no Apple GPU here: use hardware=auto or hardware=cpu")
    if config.tracker.name == "tensorboard" and find_spec("tensorboard") is None:
        yield Problem("tracker=tensorboard needs its package: pip install tensorboard, or tracker=local")
    if hardware.compile:
        yield from check_compilation(config)
    yield from check_processes(config, gpus)


def check_convolutions(config: Config, gpus: int) -> Iterator[Problem]:
    """Check that convolutions by taps, where they are asked for, are computed."""
    hardware = config.hardware
    on_gpu = hardware.device in ("cuda", "mps") or (hardware.device == "auto" and gpus > 0)
    in_bf16 = hardware.mixed_precision == "bf16" or (hardware.mixed_precision == "auto" and is_faster_in_bf16("cpu"))
    if hardware.convolutions == "taps" and (on_gpu or in_bf16 or hardware.compile):
        yield Problem(
            "hardware.convolutions=taps is for float32 on a CPU, and does nothing with "
            f"hardware.device={hardware.device}, hardware.mixed_precision={hardware.mixed_precision}, "
            f"hardware.compile={str(hardware.compile).lower()}: use hardware.convolutions=auto",
            is_error=False,
        )


def check_compilation(config: Config) -> Iterator[Problem]:
    """Check that `torch.compile` has a compiler, and a mode that can do what the run does."""
    hardware, accumulation = config.hardware, config.training.gradient_accumulation_steps
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        yield Problem(
            "hardware.compile=true needs a C++ compiler (g++), and none is here: install one, or leave it out"
        )
    if hardware.compile_mode != "default" and accumulation > 1:  # pytorch issue 169545
        yield Problem(
            f"hardware.compile_mode={hardware.compile_mode} records CUDA graphs, whose gradients the next micro-batch "
            f"overwrites, and training.gradient_accumulation_steps={accumulation} adds them up: use "
            "hardware.compile_mode=default or training.gradient_accumulation_steps=1"
        )


def check_processes(config: Config, gpus: int) -> Iterator[Problem]:
    """Check that several processes have a GPU each, and several machines a place to meet."""
    hardware, launched = config.hardware, "WORLD_SIZE" in os.environ
    if hardware.num_nodes > 1 and not (hardware.rendezvous or launched):
        yield Problem(
            f"hardware.num_nodes={hardware.num_nodes} needs a place where they meet: hardware.rendezvous=<host>:29500, "
            "the same on each, and output_dir=<folder> that each of them sees"
        )
    if launched:
        return  # several machines may share the processes
    if hardware.num_processes > 1 and hardware.device != "cpu" and gpus < hardware.num_processes:
        yield Problem(
            f"hardware.num_processes={hardware.num_processes} needs as many GPUs, torch sees {gpus}: use "
            f"hardware.num_processes={max(gpus, 1)}, or hardware.device=cpu to try it on the CPU"
        )
