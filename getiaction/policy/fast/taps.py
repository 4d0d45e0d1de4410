"""Convolve with matrix products for each tap of the kernel, over the places that this tap sees.

Deep in a network hundreds of channels meet a handful of places: 2x2 pixels, 4 moments. There most of what a kernel
covers is padding (a 3x3 kernel multiplies 2x2 pixels 16 times of 36), and oneDNN spends its time on bringing the
weights into another order and back. Here nothing is multiplied by padding, and the weights stay as they lie.
benchmarks/NOTES.md says where this is faster, and by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = tuple[int, int]


class Tap(NamedTuple):
    """A tap of a kernel, and what it brings to what.

    Args:
        number: which tap, counted along the rows of the kernel.
        phase: where the places start that its stride reaches; inputs are counted among them.
        runs: rows of outputs that lie side by side, and the rows of inputs, side by side as well, that they see. Each
            place has a row for each sample.
    """

    number: int
    phase: Pair
    runs: tuple[tuple[slice, slice], ...]


def convolve_by_taps(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    """Do what `torch.nn.functional.conv2d` does, forward and backward; it cannot be differentiated twice.

    Args:
        x: (B, C, h, w), in any memory order.
        weight: (C', C, kh, kw); fast with the channels last in memory, right in any order.
        bias: (C',), or None.

    Returns:
        (B, C', h', w'), with the channels last in memory and the samples just before them.
    """
    by_place = x.permute(2, 3, 0, 1)  # (h, w, B, C): places side by side are the rows of one matrix
    found = _TapConvolution.apply(by_place, weight.permute(2, 3, 0, 1), bias, stride, padding)  # (places' x B, C')
    sides = [count_outputs(*side) for side in zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)]
    return found.view(*sides, len(x), len(weight)).permute(2, 3, 0, 1)


class _TapConvolution(torch.autograd.Function):
    """Convolve x (h, w, B, C) with weights (kh, kw, C', C) into (h' w' B, C')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
        (height, width, batch, channels), kernel = x.shape, cast(Pair, tuple(weight.shape[:2]))
        taps = find_taps((height, width), kernel, stride, padding, batch)
        phases = {tap.phase: phase(x, tap.phase, stride).reshape(-1, channels) for tap in taps}  # (places x B, C)
        sides = [count_outputs(*side) for side in zip((height, width), kernel, stride, padding, strict=True)]
        out = x.new_zeros(sides[0] * sides[1] * batch, weight.shape[2])
        if bias is not None:
            out += bias
        matrices = each_tap(weight.transpose(2, 3))  # (C, C')
        for tap in taps:
            seen, matrix = phases[tap.phase], matrices[tap.number]
            for outputs, inputs in tap.runs:
                out[outputs].addmm_(seen[inputs], matrix)
        ctx.save_for_backward(weight, *phases.values())
        ctx.taps, ctx.phases, ctx.shape, ctx.stride = taps, list(phases), x.shape, stride
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *phases = ctx.saved_tensors
        seen = dict(zip(ctx.phases, phases, strict=True))
        gradient = gradients[0].contiguous()  # (places' x B, C')
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_phase = {name: torch.zeros_like(rows) for name, rows in seen.items()}
            matrices = each_tap(weight)  # (C', C)
            for tap in ctx.taps:
                found, matrix = by_phase[tap.phase], matrices[tap.number]
                for outputs, inputs in tap.runs:
                    found[inputs].addmm_(gradient[outputs], matrix)
            by_x = join_phases(by_phase, gradient, ctx.shape, ctx.stride)
        if ctx.needs_input_grad[1]:
            all_see = len(ctx.taps) == weight.shape[0] * weight.shape[1]
            by_weight = torch.empty_like(weight) if all_see else torch.zeros_like(weight)
            matrices, turned = each_tap(by_weight), gradient.t()
            for tap in ctx.taps:
                rows, matrix = seen[tap.phase], matrices[tap.number]
                for number, (outputs, inputs) in enumerate(tap.runs):
                    matrix.addmm_(turned[:, outputs], rows[inputs], beta=min(number, 1))  # the first replaces
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum(dim=0)
        return by_x, by_weight, by_bias, None, None


def each_tap(weight: Tensor) -> list[Tensor]:
    """View the matrix of each tap of (kh, kw, ...), along the rows of the kernel."""
    return [matrix for row in weight.unbind() for matrix in row.unbind()]


def phase(x: Tensor, start: Pair, stride: Pair) -> Tensor:
    """Return the places of x (h, w, ...) that a stride reaches from a start."""
    return x[start[0] :: stride[0], start[1] :: stride[1]]


def join_phases(phases: dict[Pair, Tensor], like: Tensor, shape: torch.Size, stride: Pair) -> Tensor:
    """Return the whole, (h, w, B, C), of which these are the phases, (places x B, C); zeros where there is none."""
    if stride == (1, 1) and phases:
        return phases[0, 0].view(shape)
    whole = like.new_zeros(shape)
    for start, rows in phases.items():
        part = phase(whole, start, stride)
        part.copy_(rows.view_as(part))
    return whole


@lru_cache(maxsize=256)
def find_taps(sides: Pair, kernel: Pair, stride: Pair, padding: Pair, batch: int) -> tuple[Tap, ...]:
    """Find the taps of a kernel that see anything but padding, in maps of these sides, h and w."""
    across = count_outputs(sides[1], kernel[1], stride[1], padding[1])  # outputs of a row
    taps = []
    for vertical, horizontal in product(*map(find_taps_along, sides, kernel, stride, padding)):
        (i, from_row, to_rows, row), (j, from_column, to_columns, column) = vertical, horizontal
        seen = -(-(sides[1] - from_column) // stride[1])  # inputs of a row, in this phase
        if len(to_columns) == across == seen:  # rows of the map lie side by side
            starts, length = [(to_rows[0] * across, row * seen)], len(to_rows) * across * batch
        else:
            starts = [(to * across + to_columns[0], (row + n) * seen + column) for n, to in enumerate(to_rows)]
            length = len(to_columns) * batch
        runs = tuple(
            (slice(output * batch, output * batch + length), slice(input * batch, input * batch + length))
            for output, input in starts
        )
        taps.append(Tap(i * kernel[1] + j, (from_row, from_column), runs))
    return tuple(taps)


def find_taps_along(size: int, kernel: int, stride: int, padding: int) -> Iterator[tuple[int, int, range, int]]:
    """Find, along a side of `size` places, the taps that see any of them.

    Returns:
        Each tap, the phase of the stride that it sees, the outputs that it adds to, and the first input, counted within
        the phase, that it brings to them.
    """
    for tap in range(kernel):
        shift = tap - padding  # output i sees input i * stride + shift
        first = max(0, -(shift // stride))
        last = min(count_outputs(size, kernel, stride, padding) - 1, (size - 1 - shift) // stride)
        if first <= last:
            yield tap, shift % stride, range(first, last + 1), first + shift // stride


def count_outputs(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return how many outputs a side of `size` places has."""
    return (size + 2 * padding - kernel) // stride + 1
