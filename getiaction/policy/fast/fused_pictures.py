"""A ResNet with group norm on a CUDA GPU: what lies between two convolutions as one kernel, in channels-last order.

PyTorch's group norm takes pictures with the channels first only, so it copies before, and the next convolution after;
the addition and the ReLU are kernels of their own. Here norm, addition and ReLU read their input and write their output
once, as the convolutions leave and take them, and so does norm, ReLU and max pooling, which remembers in a byte, not in
eight, which number it took. A block's result comes twice, for the addition and, rounded as autocast would, for the next
convolution; the two gradients meet in the kernel that takes them. The maths is the same, in float32.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

from getiaction.policy.fast.fused_picture_kernels import (
    norm_backward_kernel,
    norm_kernel,
    pool_backward_kernel,
    pool_kernel,
)
from getiaction.policy.fast.sums import add_rows

HELD = 8192  # numbers that a program holds at a time
NUMBERS_A_WARP = 512
POOLED = 2048  # the same of one that pools, which holds nine windows' numbers
LARGEST_WINDOW = 11  # whose places a byte can tell apart
LAST = torch.channels_last


class _Norm(torch.autograd.Function):
    """Normalise groups of x (B, C, H, W), add `residual`, cut off what is negative; channels last.

    With `branches` the result comes twice: for what is added later, and, in x's type, for a convolution. The two
    gradients meet in one kernel.
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
        with torch.cuda.device_of(x):
            norm_kernel[rows, groups](
                x, weight, bias, x if around is None else around, out, out if narrow is None else narrow, statistics,
                places, size, eps,
                ADDS=around is not None, RECTIFIES=rectify, BRANCHES=narrow is not None, **tile(places, size, HELD),
            )  # fmt: skip
        seen = None if residual is None else out if narrow is None else narrow  # what the ReLU let through
        ctx.save_for_backward(x, weight, bias, seen, statistics)
        ctx.groups, ctx.rectify, ctx.residual = groups, rectify, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return out, (twin(out) if narrow is None else narrow) if branches else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, seen, statistics = ctx.saved_tensors
        gradient, beside = lay(gradients)
        rows, channels, height, width = x.shape
        places, size = height * width, channels // ctx.groups
        by_x = torch.empty_like(x, memory_format=LAST)
        by_residual = None if ctx.residual is None else torch.empty_like(x, dtype=ctx.residual, memory_format=LAST)
        by_affine = torch.empty((2, rows, channels), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            norm_backward_kernel[rows, ctx.groups](
                x, weight, bias, x if seen is None else seen, statistics, gradient,
                gradient if beside is None else beside, by_x, by_x if by_residual is None else by_residual, by_affine,
                places, size,
                ADDS=by_residual is not None, RECTIFIES=ctx.rectify, JOINS=beside is not None,
                **tile(places, size, HELD),
            )  # fmt: skip
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
        taken = torch.empty_like(out, dtype=torch.int8)
        statistics = torch.empty((rows, groups, 2), dtype=torch.float32, device=x.device)
        ctx.sizes = *sides, *pooled, channels // groups
        ctx.window = {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding}
        ctx.tile = tile(sides[0] * sides[1], channels // groups, POOLED)
        del ctx.tile["WHOLE"]
        with torch.cuda.device_of(x):
            pool_kernel[rows, groups](
                x, weight, bias, out, out if narrow is None else narrow, taken, statistics, *ctx.sizes, eps,
                BRANCHES=narrow is not None, **ctx.window, **ctx.tile,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, taken, statistics)
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        return out, twin(out) if narrow is None else narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, taken, statistics = ctx.saved_tensors
        gradient, beside = lay(gradients)
        by_x = torch.empty_like(x, memory_format=LAST)
        by_affine = torch.empty((2, len(x), x.shape[1]), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            pool_backward_kernel[len(x), ctx.groups](
                x, weight, bias, taken, statistics, gradient, gradient if beside is None else beside, by_x, by_affine,
                *ctx.sizes, JOINS=beside is not None, **ctx.window, **ctx.tile,
            )  # fmt: skip
        by_weight, by_bias = add_rows(by_affine, weight.dtype)
        return by_x, by_weight, by_bias, None, None, None, None


def twin(x: Tensor) -> Tensor:
    """Return the same numbers, in the same place, as another result for autograd: whose gradient comes on its own."""
    same = torch.empty(0, dtype=x.dtype, device=x.device)
    return same.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def lay(gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Return the gradients of a result that went one way or two, channels last, those that are there first."""
    there: list[Tensor | None] = [one.contiguous(memory_format=LAST) for one in gradients if one is not None]
    return [*there, None][:2]


def tile(places: int, size: int, held: int) -> dict[str, Any]:
    """Return how much of a group a program holds at a time, whether that is all, and how many warps share the work."""
    channels, all_places = triton.next_power_of_2(size), triton.next_power_of_2(places)
    some = min(all_places, max(held // channels, 1))
    warps = max(1, min(8, some * channels // NUMBERS_A_WARP))
    return {"WHOLE": some == all_places, "PLACES": some, "CHANNELS": channels, "num_warps": warps}


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


def branch(norm: nn.GroupNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise x (B, C, H, W), add `residual` (B, C, H, W), ReLU; return it for an addition, and for a convolution."""
    if lies_last(x):
        return _Norm.apply(x, *numbers_of(norm, residual), True, widened(x), True)
    y = normalise(norm, x, residual=residual, rectify=True)
    return y, y


def normalise_and_pool(norm: nn.GroupNorm, pooling: nn.MaxPool2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise x (B, C, H, W), ReLU, keep each window's largest; return it as `branch` does, (B, C, H', W')."""
    window = pooling.kernel_size, pooling.stride, pooling.padding
    squares = tuple(side for side in window if isinstance(side, int))
    plain = (pooling.dilation, pooling.ceil_mode, pooling.return_indices) == (1, False, False)
    if lies_last(x) and plain and len(squares) == len(window) and squares[0] <= LARGEST_WINDOW:
        return _NormAndPool.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, squares, widened(x))
    y = pooling(normalise(norm, x, rectify=True))
    return y, y


def lies_last(x: Tensor) -> bool:
    """Tell whether the kernels take x (B, C, H, W)."""
    return x.is_contiguous(memory_format=LAST) and x.numel() > 0


def widened(x: Tensor) -> torch.dtype:
    """Return the type of norms: float32 under autocast, as PyTorch's are."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def numbers_of(norm: nn.GroupNorm, residual: Tensor | None) -> tuple[Any, ...]:
    """Return what `_Norm` takes of a norm."""
    return norm.weight, norm.bias, residual, norm.num_groups, norm.eps


def takes(backbone: nn.Sequential) -> bool:
    """Tell whether `run` can do what a network does: a torchvision ResNet without its head, with group norm."""
    layers: list[Any] = list(backbone)
    if [type(layer) for layer in layers[1:4]] != [nn.GroupNorm, nn.ReLU, nn.MaxPool2d]:
        return False
    if any(type(stage) is not nn.Sequential for stage in layers[4:]):
        return False
    blocks = [block for stage in layers[4:] for block in stage]
    if any(type(block) not in (BasicBlock, Bottleneck) or type(block.relu) is not nn.ReLU for block in blocks):
        return False
    ways = [block.downsample for block in blocks if block.downsample is not None]
    if any(len(way) != 2 for way in ways):
        return False
    norms = [layers[1], *(norm for block in blocks for _, norm in pairs_of(block)), *(way[1] for way in ways)]
    return all(type(norm) is nn.GroupNorm and norm.affine for norm in norms)


def run(backbone: nn.Sequential, pictures: Tensor) -> Tensor:
    """Do what such a network does: (B, C, H, W) to (B, C', h, w)."""
    layers: list[Any] = list(backbone)
    convolution, norm, _, pooling, *stages = layers
    kept, seen = normalise_and_pool(norm, pooling, convolution(pictures))
    for stage in stages:
        for block in stage:
            kept, seen = run_block(block, kept, seen)
    return kept


def run_block(block: BasicBlock | Bottleneck, kept: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Do what a residual block does.

    Args:
        kept: its input, (B, C, H, W), for the addition.
        seen: the same for its first convolution.
    """
    way = cast(Any, block.downsample)
    residual = kept if way is None else normalise(way[1], way[0](kept))
    *firsts, (last, last_norm) = pairs_of(block)
    for convolution, norm in firsts:
        seen = normalise_between(norm, convolution(seen))
    return branch(last_norm, last(seen), residual)


def pairs_of(block: nn.Module) -> list[tuple[Any, Any]]:
    """Return a block's convolutions, each with its norm, in order."""
    names = [(f"conv{number}", f"bn{number}") for number in (1, 2, 3)]
    return [(getattr(block, one), getattr(block, other)) for one, other in names if hasattr(block, one)]
