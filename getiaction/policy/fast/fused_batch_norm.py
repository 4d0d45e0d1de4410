"""Batch norm and what surrounds it in a ResNet that learns in bf16 on a CUDA GPU, channels last.

cuDNN takes batch norm in float32, with a kernel each way; in bf16 PyTorch's own run, four times as slow, and the ReLU,
the addition and the count of batches are kernels of their own. Here norm, addition and ReLU take three kernels
forwards (measure chunks, join them, normalise) and three backwards. Sums are float32; the results have x's type, as
PyTorch's have.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from getiaction.policy.fast.fused_batch_norm_kernels import (
    finish_kernel,
    gradient_kernel,
    measure_kernel,
    normalise_kernel,
    sum_gradients_kernel,
)
from getiaction.policy.fast.sums import add_rows
from getiaction.policy.fast.twin import lay, lies_last, twin

HELD = 2048  # numbers that a program holds at a time
WIDE = 64  # channels of a program
PROGRAMS = 264  # that measure: two for each processor of an H200
LEAST = 64  # rows of a chunk
JOINED = 16  # channels of a program that joins all chunks
LAST = torch.channels_last


class _BatchNorm(torch.autograd.Function):
    """Normalise the channels of x (B, C, H, W), add `residual`, cut off what is negative; perhaps for two readers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        running: tuple[Tensor, Tensor, Tensor],
        momentum: float,
        eps: float,
        rectify: bool,
        branches: bool,
    ) -> tuple[Tensor, Tensor | None]:
        channels, rows, device = x.shape[1], x.numel() // x.shape[1], x.device
        around = None if residual is None else residual.contiguous(memory_format=LAST)
        out, (chunk, splits) = torch.empty_like(x, memory_format=LAST), chunks(rows, channels)
        means, squares = torch.empty((2, splits, channels), dtype=torch.float32, device=device)
        statistics = torch.empty((2, channels), dtype=torch.float32, device=device)
        tile = tile_of(channels)
        across = triton.cdiv(channels, tile["CHANNELS"])
        with torch.cuda.device_of(x):
            measure_kernel[splits, across](x, means, squares, rows, channels, chunk, **tile)
            finish_kernel[(triton.cdiv(channels, JOINED),)](
                means, squares, statistics, *running, rows, channels, chunk, splits, eps, momentum,
                SPLITS=triton.next_power_of_2(splits), CHANNELS=JOINED, num_warps=8,
            )  # fmt: skip
            normalise_kernel[triton.cdiv(rows, tile["ROWS"]), across](
                x, weight, bias, x if around is None else around, out, statistics, rows, channels,
                ADDS=around is not None, RECTIFIES=rectify, **tile,
            )  # fmt: skip
        torch.autograd.graph.increment_version(running)
        ctx.save_for_backward(x, weight, bias, None if residual is None else out, statistics)
        ctx.rectify, ctx.residual = rectify, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return out, twin(out) if branches else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, out, statistics = ctx.saved_tensors
        gradient, beside = lay(gradients)
        channels, rows = x.shape[1], x.numel() // x.shape[1]
        chunk, splits = chunks(rows, channels)
        by_x = torch.empty_like(x, memory_format=LAST)
        by_residual = None if ctx.residual is None else torch.empty_like(x, dtype=ctx.residual, memory_format=LAST)
        parts = torch.empty((2, splits, channels), dtype=torch.float32, device=x.device)
        tile = tile_of(channels)
        across, numbers = triton.cdiv(channels, tile["CHANNELS"]), (x, weight, bias)
        with torch.cuda.device_of(x):
            sum_gradients_kernel[splits, across](
                *numbers, x if out is None else out, statistics, gradient, gradient if beside is None else beside,
                by_x if by_residual is None else by_residual, parts, rows, channels, chunk,
                ADDS=by_residual is not None, RECTIFIES=ctx.rectify, JOINS=beside is not None, **tile,
            )  # fmt: skip
            sums = add_rows(parts, torch.float32)
            if by_residual is not None:  # has what the ReLU let through of both
                gradient, beside = by_residual, None
            gradient_kernel[triton.cdiv(rows, tile["ROWS"]), across](
                *numbers, statistics, gradient, gradient if beside is None else beside, sums, by_x, rows, channels,
                RECTIFIES=ctx.rectify and by_residual is None, JOINS=beside is not None, **tile,
            )  # fmt: skip
        return by_x, sums[0].to(weight.dtype), sums[1].to(bias.dtype), by_residual, *[None] * 5


def chunks(rows: int, channels: int) -> tuple[int, int]:
    """Return how many rows a program measures, and how many programs share a block of channels."""
    across = triton.cdiv(channels, tile_of(channels)["CHANNELS"])
    chunk = max(triton.cdiv(rows, max(PROGRAMS // across, 1)), LEAST)
    return chunk, triton.cdiv(rows, chunk)


def tile_of(channels: int) -> dict[str, int]:
    """Return what a program holds at a time, and how many warps share the work."""
    wide = min(triton.next_power_of_2(channels), WIDE)
    return {"ROWS": HELD // wide, "CHANNELS": wide, "num_warps": 4}


def takes(norm: nn.Module) -> bool:
    """Tell whether these kernels can do what a norm does: a batch norm that learns, and follows what it sees."""
    if type(norm) is not nn.BatchNorm2d or not norm.training or not norm.affine:
        return False
    return norm.track_running_stats and norm.momentum is not None


def normalise(norm: nn.BatchNorm2d, x: Tensor, *, residual: Tensor | None = None, rectify: bool = False) -> Tensor:
    """Normalise x (B, C, H, W), add `residual` (B, C, H, W), ReLU; by PyTorch's kernels if channels do not lie last."""
    if lies_last(x) and x.numel() > x.shape[1]:  # PyTorch has an error for a single place
        return _BatchNorm.apply(x, *numbers_of(norm, residual), rectify, False)[0]
    y = norm(x)
    y = y if residual is None else y + residual
    return functional.relu(y) if rectify else y


def normalise_between(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Normalise x (B, C, H, W), ReLU, for a convolution."""
    return normalise(norm, x, rectify=True)


def branch(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor, *, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """Normalise x (B, C, H, W), add `residual` (B, C, H, W), ReLU; return it for an addition, and for a convolution.

    With `narrow` it is for two convolutions, and has x's type, which the kernels' results have anyway.
    """
    if lies_last(x) and x.numel() > x.shape[1]:
        return _BatchNorm.apply(x, *numbers_of(norm, residual), True, True)
    y = normalise(norm, x, residual=residual, rectify=True)
    return (y.to(x.dtype), y.to(x.dtype)) if narrow else (y, y)


def normalise_and_pool(norm: nn.BatchNorm2d, pooling: nn.MaxPool2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise x (B, C, H, W), ReLU, keep each window's largest; return it as `branch` does, (B, C, H', W')."""
    y = pooling(normalise(norm, x, rectify=True))
    return y, y


def numbers_of(norm: nn.BatchNorm2d, residual: Tensor | None) -> tuple[Any, ...]:
    """Return what `_BatchNorm` takes of a norm."""
    running = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return norm.weight, norm.bias, residual, running, norm.momentum, norm.eps
