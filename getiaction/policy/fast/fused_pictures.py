"""A ResNet with group norm on a CUDA GPU: what lies between two convolutions as one kernel, in channels-last order.

PyTorch's group norm takes pictures with the channels first only, so it copies before, and the next convolution after;
the addition and the ReLU are kernels of their own. Here norm, addition and ReLU read their input and write their output
once, as the convolutions leave and take them. Max pooling remembers in a byte, not in eight, which number it took. The
maths is the same, in float32.

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

HELD = 4096  # numbers that a program holds at a time
NUMBERS_A_WARP = 512
POOLED = 1024  # numbers that a program pools
LARGEST_WINDOW = 11  # whose places a byte can tell apart
LAST = torch.channels_last


class _Norm(torch.autograd.Function):
    """Normalise groups of x (B, C, H, W), add `residual`, cut off what is negative; channels last."""

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
    ) -> Tensor:
        rows, channels, height, width = x.shape
        places, size = height * width, channels // groups
        out = torch.empty_like(x, dtype=dtype, memory_format=LAST)
        statistics = torch.empty((rows, groups, 2), dtype=torch.float32, device=x.device)
        around = None if residual is None else residual.contiguous(memory_format=LAST)
        with torch.cuda.device_of(x):
            norm_kernel[rows, groups](
                x, weight, bias, x if around is None else around, out, statistics, places, size, eps,
                ADDS=around is not None, RECTIFIES=rectify, **tile(places, size),
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, None if residual is None else out, statistics)
        ctx.groups, ctx.rectify, ctx.residual = groups, rectify, None if residual is None else residual.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, out, statistics = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=LAST)
        rows, channels, height, width = x.shape
        places, size = height * width, channels // ctx.groups
        by_x = torch.empty_like(x, memory_format=LAST)
        by_residual = None if ctx.residual is None else torch.empty_like(x, dtype=ctx.residual, memory_format=LAST)
        by_affine = torch.empty((2, rows, channels), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            norm_backward_kernel[rows, ctx.groups](
                x, weight, bias, x if out is None else out, statistics, gradient, by_x,
                by_x if by_residual is None else by_residual, by_affine, places, size,
                ADDS=by_residual is not None, RECTIFIES=ctx.rectify, **tile(places, size),
            )  # fmt: skip
        by_weight, by_bias = add_rows(by_affine, weight.dtype)
        return by_x, by_weight, by_bias, by_residual, None, None, None, None


class _Pool(torch.autograd.Function):
    """Keep the largest number of each window of x (B, C, H, W): (B, C, H', W'); channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        rows, channels, *sides = x.shape
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in sides)
        out = torch.empty((rows, channels, height, width), dtype=x.dtype, device=x.device, memory_format=LAST)
        taken = torch.empty((rows, height, width, channels), dtype=torch.int8, device=x.device)
        ctx.sizes = channels, *sides, height, width
        ctx.window = {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding, "BLOCK": POOLED}
        with torch.cuda.device_of(x):
            pool_kernel[(triton.cdiv(out.numel(), POOLED),)](x, out, taken, out.numel(), *ctx.sizes, **ctx.window)
        ctx.save_for_backward(taken)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (taken,), gradient = ctx.saved_tensors, gradients[0].contiguous(memory_format=LAST)
        channels, height, width, *_ = ctx.sizes
        shape = (len(gradient), channels, height, width)
        by_x = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=LAST)
        with torch.cuda.device_of(gradient):
            pool_backward_kernel[(triton.cdiv(by_x.numel(), POOLED),)](
                gradient, taken, by_x, by_x.numel(), *ctx.sizes, **ctx.window
            )
        return by_x, None, None, None


def tile(places: int, size: int) -> dict[str, int]:
    """Return how much of a group a program holds at a time, and how many warps share the work."""
    channels = triton.next_power_of_2(size)
    held = min(triton.next_power_of_2(places), max(HELD // channels, 1))
    return {"PLACES": held, "CHANNELS": channels, "num_warps": max(1, min(8, held * channels // NUMBERS_A_WARP))}


def normalise(
    norm: nn.GroupNorm,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    rectify: bool = False,
    only_convolved: bool = False,
) -> Tensor:
    """Normalise x (B, C, H, W), add `residual` (B, C, H, W), ReLU; by PyTorch's kernels if channels do not lie last.

    Under autocast the result is float32, as PyTorch's; or x's type, where a convolution alone reads it, which would
    round it so.
    """
    if x.is_contiguous(memory_format=LAST) and len(x):
        widens = torch.is_autocast_enabled(x.device.type) and not only_convolved
        dtype = torch.float32 if widens else x.dtype
        return _Norm.apply(x, norm.weight, norm.bias, residual, norm.num_groups, norm.eps, rectify, dtype)
    y = norm(x)
    y = y if residual is None else y + residual
    return functional.relu(y) if rectify else y


def pool(layer: nn.MaxPool2d, x: Tensor) -> Tensor:
    """Do what a max pooling does, (B, C, H, W) to (B, C, H', W'); by PyTorch's kernel if channels do not lie last."""
    window = layer.kernel_size, layer.stride, layer.padding
    plain = (layer.dilation, layer.ceil_mode, layer.return_indices) == (1, False, False)
    squares = [side for side in window if isinstance(side, int)]
    if not plain or len(squares) < len(window) or squares[0] > LARGEST_WINDOW:
        return layer(x)
    if not 0 < x.numel() < 2**31 or not x.is_contiguous(memory_format=LAST):
        return layer(x)
    return _Pool.apply(x, *squares)


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
    x = pool(pooling, normalise(norm, convolution(pictures), rectify=True))
    for stage in stages:
        for block in stage:
            x = run_block(block, x)
    return x


def run_block(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    """Do what a residual block does."""
    way = cast(Any, block.downsample)
    residual = x if way is None else normalise(way[1], way[0](x))
    *firsts, (last, last_norm) = pairs_of(block)
    for convolution, norm in firsts:
        x = normalise(norm, convolution(x), rectify=True, only_convolved=True)
    return normalise(last_norm, last(x), residual=residual, rectify=True)


def pairs_of(block: nn.Module) -> list[tuple[Any, Any]]:
    """Return a block's convolutions, each with its norm, in order."""
    names = [(f"conv{number}", f"bn{number}") for number in (1, 2, 3)]
    return [(getattr(block, one), getattr(block, other)) for one, other in names if hasattr(block, one)]
