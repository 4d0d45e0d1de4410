"""Time the ResNet of `pusht_basic` with the kernels for pictures and with PyTorch's: a section of `benchmarks.gpu`."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from getiaction.policy import ImageEncoder
from getiaction.policy.fast.convolution import use_library
from getiaction.policy.fast.kernels import picture_kernels_for

PRECISIONS = {"tf32": None, "bf16": torch.bfloat16}

WARM_UP = 3
TOP = 15


def measure(device: str, *, batch: int, steps: int) -> dict[str, Any]:
    """Return milliseconds of the device's work, forward and backward, and how far gradients are apart, relatively.

    Beside each the kernels that take most of it: how often a step calls them, and their microseconds.

    Args:
        batch: pictures of 84x84.
        steps: how many are averaged, after `WARM_UP`.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # as in training
    images = torch.randn(batch, 3, 84, 84, generator=torch.Generator().manual_seed(0)).to(device)
    found: dict[str, Any] = {}
    for precision, dtype in PRECISIONS.items():
        gradients = {}
        for name in ("library", "kernels"):
            torch.manual_seed(0)
            encoder = ImageEncoder((3, 84, 84)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            if name == "library":
                use_library(encoder)
            taken = picture_kernels_for(encoder.backbone, images) is not None

            def step(encoder: ImageEncoder = encoder, dtype: torch.dtype | None = dtype) -> None:
                encoder.zero_grad()
                with torch.autocast(device, dtype, enabled=dtype is not None):
                    encoder(images).square().mean().backward()

            for _ in range(WARM_UP):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as seen:
                for _ in range(steps):
                    step()
            where = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
            times = {one.key: (one.count / steps, getattr(one, where) / steps) for one in seen.key_averages()}
            top = sorted(times.items(), key=lambda one: -one[1][1])[:TOP]
            found[f"{precision}, {name}"] = {
                "ms": round(sum(taking for _, taking in times.values()) / 1e3, 3),
                "kernels": taken,
                "top_us": {kernel[:100]: [count, round(taking, 1)] for kernel, (count, taking) in top},
            }
            gradients[name] = torch.cat([weight.grad.flatten() for weight in encoder.parameters()])
        apart = (gradients["kernels"] - gradients["library"]).norm() / gradients["library"].norm()
        found[f"{precision}, apart"] = float(apart)
    torch.backends.cudnn.benchmark = before
    return found
