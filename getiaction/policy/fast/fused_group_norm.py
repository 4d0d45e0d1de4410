"""Group norm and what surrounds it in a ResNet, on a CUDA GPU: one kernel forwards and one backwards, channels last.

PyTorch's group norm takes pictures with the channels first only, so it copies before, and the next convolution after;
the addition and the ReLU are kernels of their own. Here norm, addition and ReLU read their input and write their output
once, as the convolutions leave and take them, and so does norm, ReLU and max pooling, which remembers the numbers that
it took, and in a byte, not in eight, where each was. The maths is the same, in float32.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from getiaction.policy.fast.beside import are_leaves, beside
from getiaction.policy.fast.fused_group_norm_kernels import norm_backward_kernel, norm_kernel
from getiaction.policy.fast.fused_pooling_kernels import pool_backward_kernel, pool_kernel
from getiaction.policy.fast.sums import add_rows
from getiaction.policy.fast.twin import lay, lies_last, twin

# What a program holds at a time, and how much of it a warp does, as measured: benchmarks/NOTES.md.
HELD, NUMBERS_A_WARP = 8192, 1024
# Of small groups it holds several, up to so many numbers; with 0 always one.
TOGETHER = 1024
POOLED, POOLED_BACKWARDS, POOLED_A_WARP = 2048, 2048, 256
# Of windows of 3x3 at every second place a program holds this many times four numbers backwards.
POOLED_SQUARES = 1024
LARGEST_WINDOW = 11  # whose places a byte can tell apart
LAST = torch.channels_last


class _Norm(torch.autograd.Function):
    """Normalise groups of x (B, C, H, W), add `residual`, cut off what is negative; channels last.

    With `branches` the result comes twice: in `dtype` for what is added later, and in x's type for a convolution. The
    two gradients meet in one kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        groups: int,
        eps: float,
        rectify: bool,
        dtype: torch.dtype,
        branches: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows, channels, height, width = x.shape
        places, size = height * width, channels // groups
        out = torch.empty_like(x, dtype=dtype, memory_format=LAST)
        narrow = torch.empty_like(x, memory_format=LAST) if branches and dtype != x.dtype else None
        statistics = torch.empty((rows, groups, 2), dtype=torch.float32, device=x.device)
        around = None if residual is None else residual.contiguous(memory_format=LAST)
        held = tile(places, size, groups)
        with torch.cuda.device_of(x):
            norm_kernel[(rows * groups // held["GROUPS"],)](
                x, weight, bias, x if around is None else around, out, out if narrow is None else narrow, statistics,
                places, groups, size, eps,
                ADDS=around is not None, RECTIFIES=rectify, BRANCHES=narrow is not None, **held,
            )  # fmt: skip
        seen = None if residual is None else out if narrow is None else narrow  # what the ReLU let through
        ctx.save_for_backward(x, weight, bias, seen, statistics)
        ctx.groups, ctx.rectify, ctx.residual = groups, rectify, None if residual is None else residual.dtype
        ctx.leaves = are_leaves(weight, bias)
        ctx.set_materialize_grads(False)
        return out, (twin(out) if narrow is None else narrow) if branches else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, seen, statistics = ctx.saved_tensors
        gradient, other = lay(gradients)
        rows, channels, height, width = x.shape
        places, size = height * width, channels // ctx.groups
        by_x = torch.empty_like(x, memory_format=LAST)
        by_residual = None if ctx.residual is None else torch.empty_like(x, dtype=ctx.residual, memory_format=LAST)
        by_affine = torch.empty((2, rows, channels), dtype=torch.float32, device=x.device)
        held = tile(places, size, ctx.groups)
        with torch.cuda.device_of(x):
            norm_backward_kernel[(rows * ctx.groups // held["GROUPS"],)](
                x, weight, bias, x if seen is None else seen, statistics, gradient,
                gradient if other is None else other, by_x, by_x if by_residual is None else by_residual, by_affine,
                places, ctx.groups, size,
                ADDS=by_residual is not None, RECTIFIES=ctx.rectify, JOINS=other is not None, **held,
            )  # fmt: skip
        with beside(ctx.leaves, by_affine):
            by_weight, by_bias = add_rows(by_affine, weight.dtype)
        return by_x, by_weight, by_bias, by_residual, None, None, None, None, None


class _NormAndPool(torch.autograd.Function):
    """Normalise groups of x (B, C, H, W), cut off what is negative, keep each window's largest: (B, C, H', W'), twice.

    What was normalised is never written: forwards and backwards each make it again from x. Channels last.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        window: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        rows, channels, *sides = x.shape
        kernel, stride, padding = window
        pooled = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        out = torch.empty((rows, channels, *pooled), dtype=dtype, device=x.device, memory_format=LAST)
        narrow = torch.empty_like(out, dtype=x.dtype) if dtype != x.dtype else None
        taken, won = torch.empty_like(out, dtype=torch.int8), torch.empty_like(out, dtype=x.dtype)
        statistics = torch.empty((rows, groups, 2), dtype=torch.float32, device=x.device)
        ctx.sizes = *sides, *pooled, groups, channels // groups
        ctx.window = {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding}
        with torch.cuda.device_of(x):
            pool_kernel[(rows * groups,)](
                x, weight, bias, out, out if narrow is None else narrow, taken, won, statistics, *ctx.sizes, eps,
                BRANCHES=narrow is not None, **ctx.window, **tile_of_windows(channels // groups, POOLED),
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, taken, won, statistics)
        ctx.groups, ctx.leaves = groups, are_leaves(weight, bias)
        ctx.set_materialize_grads(False)
        return out, twin(out) if narrow is None else narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, taken, won, statistics = ctx.saved_tensors
        gradient, other = lay(gradients)
        by_x = torch.empty_like(x, memory_format=LAST)
        by_affine = torch.empty((2, len(x), x.shape[1]), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            pool_backward_kernel[(len(x) * ctx.groups,)](
                x, weight, bias, taken, won, statistics, gradient, gradient if other is None else other, by_x,
                by_affine, *ctx.sizes, JOINS=other is not None, **ctx.window,
                SQUARES=tile_of_windows(ctx.sizes[-1], POOLED_SQUARES)["PLACES"],
                **tile_of_windows(ctx.sizes[-1], POOLED_BACKWARDS),
            )  # fmt: skip
        with beside(ctx.leaves, by_affine):
            by_weight, by_bias = add_rows(by_affine, weight.dtype)
        return by_x, by_weight, by_bias, None, None, None, None


def tile(places: int, size: int, groups: int) -> dict[str, Any]:
    """Return how much of a group a program holds at a time, whether that is all, of how many groups, by how many warps.

    It has several groups, a number that divides `groups`, where each is small.
    """
    channels, all_places, together = triton.next_power_of_2(size), triton.next_power_of_2(places), 1
    held = min(all_places, max(HELD // channels, 1))
    whole = held == all_places
    while whole and groups % (2 * together) == 0 and 2 * together * held * channels <= TOGETHER:
        together *= 2
    warps = max(1, min(8, together * held * channels // NUMBERS_A_WARP))
    return {"WHOLE": whole, "GROUPS": together, "PLACES": held, "CHANNELS": channels, "num_warps": warps}


def tile_of_windows(size: int, numbers: int) -> dict[str, int]:
    """Return the same of a program that pools: so many numbers of a group at a time."""
    channels = triton.next_power_of_2(size)
    warps = max(1, min(8, numbers // POOLED_A_WARP))
    return {"PLACES": max(numbers // channels, 1), "CHANNELS": channels, "num_warps": warps}


def normalise(norm: nn.GroupNorm, x: Tensor, *, residual: Tensor | None = None, rectify: bool = False) -> Tensor:
    """Normalise x (B, C, H, W), add `residual` (B, C, H, W), ReLU; by PyTorch's kernels if channels do not lie last.

    Under autocast the result is float32, as PyTorch's.
    """
    if lies_last(x):
        return _Norm.apply(x, *numbers_of(norm, residual), rectify, widened(x), False)[0]
    y = norm(x)
    y = y if residual is None else y + residual
    return functional.relu(y) if rectify else y


def normalise_between(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalise x (B, C, H, W), ReLU, for a convolution alone, which under autocast would round it to x's type."""
    if lies_last(x):
        return _Norm.apply(x, *numbers_of(norm, None), True, x.dtype, False)[0]
    return normalise(norm, x, rectify=True)


def branch(norm: nn.GroupNorm, x: Tensor, residual: Tensor, *, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """Normalise x (B, C, H, W), add `residual` (B, C, H, W), ReLU; return it for an addition, and for a convolution.

    With `narrow` it is for two convolutions, which under autocast would both round it to x's type, and nothing else is
    written.
    """
    if lies_last(x):
        return _Norm.apply(x, *numbers_of(norm, residual), True, x.dtype if narrow else widened(x), True)
    y = normalise(norm, x, residual=residual, rectify=True)
    return (y.to(x.dtype), y.to(x.dtype)) if narrow else (y, y)


def normalise_and_pool(norm: nn.GroupNorm, pooling: nn.MaxPool2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise x (B, C, H, W), ReLU, keep each window's largest; return it as `branch` does, (B, C, H', W')."""
    window = pooling.kernel_size, pooling.stride, pooling.padding
    squares = tuple(side for side in window if isinstance(side, int))
    plain = (pooling.dilation, pooling.ceil_mode, pooling.return_indices) == (1, False, False)
    if lies_last(x) and plain and len(squares) == len(window) and squares[0] <= LARGEST_WINDOW:
        return _NormAndPool.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, squares, widened(x))
    y = pooling(normalise(norm, x, rectify=True))
    return y, y


def widened(x: Tensor) -> torch.dtype:
    """Return the type of norms: float32 under autocast, as PyTorch's are."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def numbers_of(norm: nn.GroupNorm, residual: Tensor | None) -> tuple[Any, ...]:
    """Return what `_Norm` takes of a norm."""
    return norm.weight, norm.bias, residual, norm.num_groups, norm.eps
