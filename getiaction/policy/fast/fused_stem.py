# mypy: allow-untyped-defs, allow-incomplete-defs
"""A ResNet's first convolution on a CUDA GPU: of pictures, at every second place.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from getiaction.policy.fast.convolution import Conv2d, is_plain
from getiaction.policy.fast.kernels import multiplied_in

BLOCK = 1024  # numbers that a program copies
MOST_COLOURS = 4  # of pictures, of which 2x2 places are looked at as one
LAST = torch.channels_last


def convolve_first(layer: nn.Conv2d, pictures: Tensor) -> Tensor:
    """Do what a ResNet's first convolution does to pictures: (B, C, H, W) to (B, C', H', W')."""
    side, padding = layer.kernel_size[0], layer.padding[0]
    fits = (layer.kernel_size, layer.stride, layer.padding) == ((side, side), (2, 2), (padding, padding))
    learns = torch.is_grad_enabled() and layer.weight.requires_grad and not pictures.requires_grad
    small = layer.in_channels <= MOST_COLOURS and 0 < 8 * pictures.numel() < 2**31
    plain = type(layer) in (nn.Conv2d, Conv2d) and is_plain(layer) and layer.bias is None and isinstance(padding, int)
    if not (fits and learns and small and plain):
        return layer(pictures)
    return _Stem.apply(pictures, layer.weight, padding)


@triton.jit
def space_to_depth_kernel(
    x, out, numbers, lines, columns, out_lines, out_columns, x_row, x_channel, x_line, x_column,
    COLOURS: tl.constexpr, DEPTH: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bring the colours of 2x2 places side by side, with zeros around the picture, and after them up to DEPTH."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of (B, H', W', DEPTH)
    depth, place = number % DEPTH, number // DEPTH
    colour, right, down = depth % COLOURS, (depth // COLOURS) % 2, depth // (2 * COLOURS)
    line = 2 * ((place // out_columns) % out_lines) + down - PADDING
    column = 2 * (place % out_columns) + right - PADDING
    row = (place // (out_lines * out_columns)).to(tl.int64)
    known = (number < numbers) & (down < 2) & (line >= 0) & (line < lines) & (column >= 0) & (column < columns)
    source = x + row * x_row + colour * x_channel + line * x_line + column * x_column
    value = tl.load(source, mask=known, other=0.0)
    tl.store(out + number, value.to(out.dtype.element_ty), mask=number < numbers)


class _Stem(torch.autograd.Function):
    """Convolve pictures x (B, C, H, W) at every second place, as at every place of pictures of four times the colours.

    The colours of 2x2 places come side by side. cuDNN is slow with three channels; here it sees 12, or 16 in bf16, half
    as many taps each way, and the same products with zeros between them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        dtype = multiplied_in(x, weight)
        folded, turned = fold_pictures(x, weight.shape[2], padding, dtype), fold_weights(weight, dtype)
        ctx.save_for_backward(folded, turned)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return torch.convolution(folded, turned, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        folded, turned = ctx.saved_tensors
        needed, sizes = (False, True, False), ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
        found = torch.ops.aten.convolution_backward(gradients[0], folded, turned, None, *sizes, needed)[1]
        colours, side = ctx.shape[1:3]
        found = rearrange(found[:, : 4 * colours], "o (p q c) y x -> o c (y p) (x q)", p=2, q=2)[:, :, :side, :side]
        return None, found.to(ctx.dtype, memory_format=LAST, copy=True), None


def fold_pictures(x: Tensor, side: int, padding: int, dtype: torch.dtype) -> Tensor:
    """Bring the colours of 2x2 places side by side, (B, C, H, W) to (B, 4C and more, H', W'), channels last."""
    rows, colours, *sides = x.shape
    taps, depth = -(-side // 2), deep(colours, dtype)
    lines, columns = ((length + 2 * padding - side) // 2 + taps for length in sides)
    out = torch.empty((rows, lines, columns, depth), dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        space_to_depth_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            x, out, out.numel(), *sides, lines, columns, *x.stride(),
            COLOURS=colours, DEPTH=depth, PADDING=padding, BLOCK=BLOCK,
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
