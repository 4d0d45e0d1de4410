# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `fused_stem.py`: pictures by 2x2 places, and the convolution of those."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def space_to_depth_kernel(
    x, shift, scale, offset, out, places, lines, columns, out_lines, out_columns, x_row, x_channel, x_line, x_column,
    factor, RANGED: tl.constexpr, PER_COLOUR: tl.constexpr,
    COLOURS: tl.constexpr, DEPTH: tl.constexpr, PADDING: tl.constexpr, PLACES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Bring the colours of 2x2 places side by side, with zeros around the picture, and after them up to DEPTH.

    HELD is DEPTH, or the next power of two.

    Numbers are multiplied by `factor`, and then, if RANGED, each is `(number - shift) * scale + offset`.
    """
    place, depth = tl.program_id(0) * PLACES + tl.arange(0, PLACES)[:, None], tl.arange(0, HELD)[None, :]
    colour, right, down = depth % COLOURS, (depth // COLOURS) % 2, depth // (2 * COLOURS)
    line = 2 * ((place // out_columns) % out_lines) + down - PADDING
    column = 2 * (place % out_columns) + right - PADDING
    row = (place // (out_lines * out_columns)).to(tl.int64)
    within = (place < places) & (depth < DEPTH)
    known = within & (down < 2) & (line >= 0) & (line < lines) & (column >= 0) & (column < columns)
    source = x + row * x_row + colour * x_channel + line * x_line + column * x_column
    value = tl.load(source, mask=known, other=0).to(tl.float32) * factor
    if RANGED:
        own = colour if PER_COLOUR else colour * 0
        value = (value - tl.load(shift + own)) * tl.load(scale + own) + tl.load(offset + own)
        value = tl.where(known, value, 0.0)
    tl.store(out + place.to(tl.int64) * DEPTH + depth, value.to(out.dtype.element_ty), mask=within)


@triton.jit
def _find_corners(place, lines, columns, out_lines, out_columns, DEPTH: tl.constexpr):
    """Return where in the folded pictures the window of each place begins."""
    row, line = place // (out_lines * out_columns), (place // out_columns) % out_lines
    return ((row * lines + line) * columns + place % out_columns) * DEPTH


@triton.jit
def stem_kernel(
    x, weight, out, places, lines, columns, out_lines, out_columns,
    TAPS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Convolve at some places, as one product for each line of taps, whose numbers lie side by side."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    known = (place < places)[:, None]
    corner = _find_corners(place, lines, columns, out_lines, out_columns, DEPTH)[:, None]
    inner, channel = tl.arange(0, TAPS * DEPTH), tl.arange(0, WIDTH)
    total = tl.zeros((PLACES, WIDTH), tl.float32)
    for tap in tl.static_range(TAPS):
        windows = tl.load(x + corner + tap * columns * DEPTH + inner[None, :], mask=known, other=0.0)
        own = tl.load(weight + channel[:, None] * (TAPS * TAPS * DEPTH) + tap * TAPS * DEPTH + inner[None, :])
        total = tl.dot(windows, tl.trans(own), total)
    there = out + place.to(tl.int64)[:, None] * WIDTH + channel[None, :]
    tl.store(there, total.to(out.dtype.element_ty), mask=known)


@triton.jit
def stem_backward_kernel(
    gradient, x, by_weight, places, each, lines, columns, out_lines, out_columns,
    TAPS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Compute a part of the gradient of one line of taps: a share of the sum over all places.

    Programs of one share run together, since they read the same gradients.
    """
    share, tap = tl.program_id(0) // TAPS, tl.program_id(0) % TAPS
    inner, channel = tl.arange(0, TAPS * DEPTH), tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH, TAPS * DEPTH), tl.float32)
    for first in range(share * each, tl.minimum((share + 1) * each, places), PLACES):
        place = first + tl.arange(0, PLACES)
        known = (place < places)[:, None]
        corner = _find_corners(place, lines, columns, out_lines, out_columns, DEPTH)[:, None]
        windows = tl.load(x + corner + tap * columns * DEPTH + inner[None, :], mask=known, other=0.0)
        source = gradient + place.to(tl.int64)[:, None] * WIDTH + channel[None, :]
        came = tl.load(source, mask=known, other=0.0)
        total = tl.dot(tl.trans(came), windows, total)
    there = (share * WIDTH + channel[:, None]) * (TAPS * TAPS * DEPTH) + tap * TAPS * DEPTH + inner[None, :]
    tl.store(by_weight + there, total)
