# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `fused_group_norm.py`, forwards and backwards: group norm, ReLU and max pooling."""

from __future__ import annotations

import triton
import triton.language as tl

from getiaction.policy.fast.fused_group_norm_kernels import find_group, load_gradient, measure


@triton.jit
def pool_kernel(
    x, weight, bias, out, narrow, taken, won, statistics, lines, columns, out_lines, out_columns, groups, size, eps,
    BRANCHES: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalise one group of one picture, ReLU, and keep the largest number of each window.

    At which of the window's places it was is kept as well, the first of equal ones, or the last that is no number; and
    what it was before, in x's type.
    """
    row, group, channels = find_group(groups, size)
    place, inside = tl.arange(0, PLACES)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    channel, places, out_places = group * size + inside, lines * columns, out_lines * out_columns
    corner = row * places * channels + channel
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    mean, squares = measure(x, corner, places, size, channels, place, known, PLACES, 4)
    rate = 1.0 / tl.sqrt(squares / (places * size) + eps)
    kept = statistics + 2 * (row * groups + group)
    tl.store(kept, mean)
    tl.store(kept + 1, rate)

    # what is normalised keeps its order, or turns it round where the weight is negative: so x's numbers are compared,
    # which is half of the work; where the weight is 0 all are equal
    turn = tl.where(gain < 0.0, -1.0, tl.where(gain > 0.0, 1.0, 0.0))
    for first in range(0, out_places, PLACES):
        window = first + place
        mask, line, column = (window < out_places) & known, window // out_columns, window % out_columns
        best, tap = tl.full((PLACES, CHANNELS), float("nan"), tl.float32), tl.full((PLACES, CHANNELS), -1, tl.int32)
        for down in tl.static_range(KERNEL):
            for along in tl.static_range(KERNEL):
                y, z = line * STRIDE - PADDING + down, column * STRIDE - PADDING + along
                within = mask & (y >= 0) & (y < lines) & (z >= 0) & (z < columns)
                value = tl.load(x + corner + (y * columns + z) * channels, mask=within, other=0.0).to(tl.float32)
                better = within & ~(value * turn <= best * turn)  # nothing is less than what is no number
                best, tap = tl.where(better, value, best), tl.where(better, down * KERNEL + along, tap)
        there = (row * out_places + window) * channels + channel
        value = (best - mean) * rate * gain + offset
        value = tl.where(value < 0.0, 0.0, value)
        tl.store(out + there, value.to(out.dtype.element_ty), mask=mask)
        if BRANCHES:
            tl.store(narrow + there, value.to(narrow.dtype.element_ty), mask=mask)
        tl.store(taken + there, tap.to(tl.int8), mask=mask)
        tl.store(won + there, best.to(won.dtype.element_ty), mask=mask)


@triton.jit
def _load_window(gradient, beside, taken, there, mask, JOINS: tl.constexpr):
    """Read the gradient of windows, and at which of its places each had its largest number."""
    came = tl.load(gradient + there, mask=mask, other=0.0).to(tl.float32)
    if JOINS:
        came += tl.load(beside + there, mask=mask, other=0.0).to(tl.float32)
    return came, tl.load(taken + there, mask=mask, other=-1)


@triton.jit
def _store_gradient(by_x, there, mask, value, total, mean, rate, gain, offset, average, along):
    """Write the gradient of numbers that came in, from the gradient of what the ReLU let through."""
    normal = (value - mean) * rate
    found = tl.where(normal * gain + offset > 0.0, total, 0.0)
    result = rate * (found * gain - average - normal * along)
    tl.store(by_x + there, result.to(by_x.dtype.element_ty), mask=mask)


@triton.jit
def _spread_squares(
    x, taken, gradient, beside, by_x, corner, out_corner, known, mean, rate, gain, offset, average, along,
    lines, columns, out_lines, out_columns, channels, JOINS: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of all numbers, 2x2 at a time, of windows of 3x3 at every second place with padding 1.

    They begin in the middle of a window, which sees them, and so do those to its right and below.
    """
    square, below, out_places = tl.arange(0, SQUARES)[:, None], out_columns * channels, out_lines * out_columns
    for first in range(0, out_places, SQUARES):
        window = first + square
        mask, line, column = (window < out_places) & known, window // out_columns, window % out_columns
        there, lower, right = out_corner + window * channels, line + 1 < out_lines, column + 1 < out_columns
        a, tap_a = _load_window(gradient, beside, taken, there, mask, JOINS)
        b, tap_b = _load_window(gradient, beside, taken, there + channels, mask & right, JOINS)
        c, tap_c = _load_window(gradient, beside, taken, there + below, mask & lower, JOINS)
        d, tap_d = _load_window(gradient, beside, taken, there + below + channels, mask & lower & right, JOINS)
        at = corner + (2 * line * columns + 2 * column) * channels
        lower, right = mask & (2 * line + 1 < lines), mask & (2 * column + 1 < columns)
        at_b, at_c, at_d = at + channels, at + columns * channels, at + (columns + 1) * channels
        one = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        two = tl.load(x + at_b, mask=right, other=0.0).to(tl.float32)
        three = tl.load(x + at_c, mask=lower, other=0.0).to(tl.float32)
        four = tl.load(x + at_d, mask=lower & right, other=0.0).to(tl.float32)
        total = tl.where(tap_a == 4, a, 0.0)
        _store_gradient(by_x, at, mask, one, total, mean, rate, gain, offset, average, along)
        total = tl.where(tap_b == 3, b, 0.0) + tl.where(tap_a == 5, a, 0.0)
        _store_gradient(by_x, at_b, right, two, total, mean, rate, gain, offset, average, along)
        total = tl.where(tap_c == 1, c, 0.0) + tl.where(tap_a == 7, a, 0.0)
        _store_gradient(by_x, at_c, lower, three, total, mean, rate, gain, offset, average, along)
        total = tl.where(tap_d == 0, d, 0.0) + tl.where(tap_c == 2, c, 0.0)
        total = total + tl.where(tap_b == 6, b, 0.0) + tl.where(tap_a == 8, a, 0.0)
        _store_gradient(by_x, at_d, lower & right, four, total, mean, rate, gain, offset, average, along)


@triton.jit
def _spread_numbers(
    x, taken, gradient, beside, by_x, corner, out_corner, known, mean, rate, gain, offset, average, along,
    lines, columns, out_lines, out_columns, channels,
    JOINS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of all numbers, one after the other, of any windows."""
    place, places = tl.arange(0, PLACES)[:, None], lines * columns
    for first in range(0, places, PLACES):
        number = first + place
        mask, line, column = (number < places) & known, number // columns, number % columns
        value = tl.load(x + corner + number * channels, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((PLACES, CHANNELS), tl.float32)
        for up in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            for left in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
                y, z = (line + PADDING) // STRIDE - up, (column + PADDING) // STRIDE - left  # may see it
                down, across = line + PADDING - y * STRIDE, column + PADDING - z * STRIDE
                within = mask & (y >= 0) & (y < out_lines) & (down < KERNEL)
                within = within & (z >= 0) & (z < out_columns) & (across < KERNEL)
                # all channels of it are read, side by side, also where another place was larger
                there = out_corner + (y * out_columns + z) * channels
                came, tap = _load_window(gradient, beside, taken, there, within, JOINS)
                total += tl.where(tap == down * KERNEL + across, came, 0.0)
        there = corner + number * channels
        _store_gradient(by_x, there, mask, value, total, mean, rate, gain, offset, average, along)


@triton.jit
def pool_backward_kernel(
    x, weight, bias, taken, won, statistics, gradient, beside, by_x, by_affine,
    lines, columns, out_lines, out_columns, groups, size,
    JOINS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PLACES: tl.constexpr, SQUARES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `pool_kernel`, for one group of one picture; sums over pictures are left to do.

    SQUARES: how many places of windows a program holds with four numbers each, where it goes by 2x2 numbers.
    """
    row, group, channels = find_group(groups, size)
    place, inside = tl.arange(0, PLACES)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    channel, places, out_places = group * size + inside, lines * columns, out_lines * out_columns
    corner, out_corner = row * places * channels + channel, row * out_places * channels + channel
    kept = statistics + 2 * (row * groups + group)
    mean, rate = tl.load(kept), tl.load(kept + 1)
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    alone = tl.arange(0, CHANNELS)
    each, own = row * channels + group * size + alone, alone < size
    gains = tl.load(weight + group * size + alone, mask=own, other=0.0).to(tl.float32)

    # the sums, window by window: each has one number that its gradient goes to
    offsets, slopes = tl.zeros((PLACES, CHANNELS), tl.float32), tl.zeros((PLACES, CHANNELS), tl.float32)
    for first in range(0, out_places, PLACES):
        mask, there = (first + place < out_places) & known, out_corner + (first + place) * channels
        normal = (tl.load(won + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate
        found = load_gradient(gradient, beside, won, there, mask, normal * gain + offset, False, True, JOINS)
        offsets += found
        slopes += found * normal
    by_offset, by_gain = tl.sum(offsets, 0), tl.sum(slopes, 0)
    tl.store(by_affine + each, by_gain, mask=own)
    tl.store(by_affine + (tl.num_programs(0) // groups) * channels + each, by_offset, mask=own)

    # the gradients, number by number: each may be the largest of several windows
    average = tl.sum(by_offset * gains, 0) / (places * size)
    along = tl.sum(by_gain * gains, 0) / (places * size)
    if KERNEL == 3 and STRIDE == 2 and PADDING == 1:
        _spread_squares(
            x, taken, gradient, beside, by_x, corner, out_corner, known, mean, rate, gain, offset, average, along,
            lines, columns, out_lines, out_columns, channels, JOINS, SQUARES,
        )  # fmt: skip
    else:
        _spread_numbers(
            x, taken, gradient, beside, by_x, corner, out_corner, known, mean, rate, gain, offset, average, along,
            lines, columns, out_lines, out_columns, channels, JOINS, KERNEL, STRIDE, PADDING, PLACES, CHANNELS,
        )  # fmt: skip
