"""A ResNet's first convolution on a CUDA GPU: of pictures, at every second place.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from getiaction.policy.fast.beside import are_leaves, beside, lay_as
from getiaction.policy.fast.casts import multiplied_in
from getiaction.policy.fast.convolution import Conv2d, is_plain
from getiaction.policy.fast.fused_stem_kernels import space_to_depth_kernel, stem_backward_kernel, stem_kernel
from getiaction.policy.fast.kernels import find_products
from getiaction.policy.fast.sums import add_rows
from getiaction.policy.normalizer import Ranges, normalize_by

BLOCK = 1024  # numbers that a program copies
PLACES = 128  # of a picture, that a program multiplies at a time
# programs that share the sum over all places, for each line of taps: two for each multiprocessor of an H200
SPLITS = 264
MOST_COLOURS = 4  # of pictures, of which 2x2 places are looked at as one
LAST = torch.channels_last


def convolve_first(layer: nn.Conv2d, pictures: Tensor, ranges: Ranges | None = None) -> Tensor:
    """Do what a ResNet's first convolution does to pictures: (B, C, H, W) to (B, C', H', W').

    Args:
        pictures: normalised; or uint8, which are normalised on the way.
        ranges: by which those are, (C, 1, 1) each, besides dividing them by 255.
    """
    side, padding = layer.kernel_size[0], layer.padding[0]
    fits = (layer.kernel_size, layer.stride, layer.padding) == ((side, side), (2, 2), (padding, padding))
    learns = torch.is_grad_enabled() and layer.weight.requires_grad and not pictures.requires_grad
    small = layer.in_channels <= MOST_COLOURS and 0 < 8 * pictures.numel() < 2**31
    plain = type(layer) in (nn.Conv2d, Conv2d) and is_plain(layer) and layer.bias is None and isinstance(padding, int)
    ranges = ranges if pictures.dtype == torch.uint8 else None
    each = ranges is None or all(one.numel() in (1, layer.in_channels) for one in ranges)
    if not (fits and learns and small and plain and each):
        return layer(normalize_by(ranges, pictures) if pictures.dtype == torch.uint8 else pictures)
    return _Stem.apply(pictures, layer.weight, padding, ranges)


class _Stem(torch.autograd.Function):
    """Convolve pictures x (B, C, H, W) at every second place, as at every place of pictures of four times the colours.

    The colours of 2x2 places come side by side. cuDNN is slow with three channels; with 12, half as many taps each way,
    and zeros between them, the products are the same. In two bytes there are 16, and the products are ours.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int, ranges: Ranges | None) -> Tensor:
        dtype = multiplied_in(x, weight)
        folded, turned = fold_pictures(x, weight.shape[2], padding, dtype, ranges), fold_weights(weight, dtype)
        ctx.save_for_backward(folded, turned)
        ctx.shape, ctx.dtype, ctx.leaves, ctx.strides = weight.shape, weight.dtype, are_leaves(weight), weight.stride()
        ctx.ours = fits_products(turned) and find_products() is not None
        if ctx.ours:
            return convolve(folded, turned)
        return torch.convolution(folded, turned, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        folded, turned = ctx.saved_tensors
        with beside(ctx.leaves, gradients[0], folded):
            if ctx.ours:
                found = weight_gradient(gradients[0], folded, turned)
            else:
                needed, sizes = (False, True, False), ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
                found = torch.ops.aten.convolution_backward(gradients[0], folded, turned, None, *sizes, needed)[1]
            colours, side = ctx.shape[1:3]
            found = rearrange(found[:, : 4 * colours], "o (p q c) y x -> o c (y p) (x q)", p=2, q=2)[:, :, :side, :side]
            by_weight = lay_as(found.to(ctx.dtype, memory_format=LAST, copy=True), ctx.strides)
        return None, by_weight, None, None


def fits_products(turned: Tensor) -> bool:
    """Tell whether `convolve` can use weights of `fold_weights`: in two bytes, where cuDNN is slow."""
    width, depth, taps, _ = turned.shape
    powers = all(16 <= one == triton.next_power_of_2(one) for one in (width, depth * taps))
    return turned.dtype in (torch.bfloat16, torch.float16) and powers and max(width, depth * taps) <= 128


def convolve(folded: Tensor, turned: Tensor) -> Tensor:
    """Convolve what `fold_pictures` made, (B, D, H, W), with (C', D, t, t) into (B, C', H - t + 1, W - t + 1)."""
    (rows, depth, *sides), (width, _, taps, _) = folded.shape, turned.shape
    lines, columns = (side - taps + 1 for side in sides)
    out = torch.empty((rows, lines, columns, width), dtype=folded.dtype, device=folded.device)
    places = rows * lines * columns
    with torch.cuda.device_of(folded):
        stem_kernel[(triton.cdiv(places, PLACES),)](
            folded, turned, out, places, *sides, lines, columns,
            TAPS=taps, DEPTH=depth, WIDTH=width, PLACES=PLACES, num_warps=4,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def weight_gradient(gradient: Tensor, folded: Tensor, turned: Tensor) -> Tensor:
    """Return the gradient of the weights of `convolve`, (C', D, t, t) in float32, given (B, C', H', W')."""
    (rows, depth, *sides), (width, _, taps, _) = folded.shape, turned.shape
    lines, columns = gradient.shape[2:]
    places = rows * lines * columns
    programs = min(SPLITS, triton.cdiv(places, PLACES))
    each = triton.cdiv(triton.cdiv(places, programs), PLACES) * PLACES
    found = torch.empty((programs, width, taps, taps, depth), dtype=torch.float32, device=folded.device)
    with torch.cuda.device_of(folded):
        stem_backward_kernel[programs * taps,](
            gradient.contiguous(memory_format=LAST), folded, found, places, each, *sides, lines, columns,
            TAPS=taps, DEPTH=depth, WIDTH=width, PLACES=PLACES, num_warps=4,
        )  # fmt: skip
    [total] = found if programs == 1 else add_rows(found.view(1, programs, -1), torch.float32)
    return total.view(width, taps, taps, depth).permute(0, 3, 1, 2)


def fold_pictures(x: Tensor, side: int, padding: int, dtype: torch.dtype, ranges: Ranges | None = None) -> Tensor:
    """Bring the colours of 2x2 places side by side, (B, C, H, W) to (B, 4C and more, H', W'), channels last.

    uint8 is normalised before, as `normalize_by` does it on a GPU.
    """
    rows, colours, *sides = x.shape
    taps, depth = -(-side // 2), deep(colours, dtype)
    lines, columns = ((length + 2 * padding - side) // 2 + taps for length in sides)
    out = torch.empty((rows, lines, columns, depth), dtype=dtype, device=x.device)
    by = [out] * 3 if ranges is None else [one.contiguous() for one in ranges]
    places, held = rows * lines * columns, triton.next_power_of_2(depth)
    with torch.cuda.device_of(x):
        space_to_depth_kernel[(triton.cdiv(places, BLOCK // held),)](
            x, *by, out, places, *sides, lines, columns, *x.stride(), 1 / 255 if x.dtype == torch.uint8 else 1.0,
            RANGED=ranges is not None, PER_COLOUR=ranges is not None and ranges[0].numel() > 1,
            COLOURS=colours, DEPTH=depth, PADDING=padding, PLACES=BLOCK // held, HELD=held,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def fold_weights(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring weights (C', C, k, k) into the order of `fold_pictures`: (C', 4C and more, k / 2, k / 2), channels last."""
    width, colours, side, _ = weight.shape
    taps, depth = -(-side // 2), deep(colours, dtype)
    out = torch.zeros((width, taps, taps, depth), dtype=dtype, device=weight.device)
    whole = functional.pad(weight, (0, 2 * taps - side, 0, 2 * taps - side))
    out[..., : 4 * colours] = rearrange(whole, "o c (y p) (x q) -> o y x (p q c)", p=2, q=2)
    return out.permute(0, 3, 1, 2)


def deep(colours: int, dtype: torch.dtype) -> int:
    """Return how many channels four times the colours take, so that each place begins at a multiple of 16 bytes."""
    whole = 16 // dtype.itemsize
    return -(-4 * colours // whole) * whole
