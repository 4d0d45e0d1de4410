# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `fused_group_norm.py`, forwards and backwards: group norm, the addition and the ReLU after it; or
group norm, ReLU and max pooling.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _find_group(groups, size):
    """Return which picture and group a program has, and all channels.

    Programs of one picture run together: a line of memory holds channels of several groups.
    """
    program = tl.program_id(0)
    return (program // groups).to(tl.int64), program % groups, groups * size


@triton.jit
def _finish(
    y, residual, out, narrow, there, mask, ADDS: tl.constexpr, RECTIFIES: tl.constexpr, BRANCHES: tl.constexpr
):  # fmt: skip
    """Add, cut off, and write; twice where two types are asked for."""
    if ADDS:
        y += tl.load(residual + there, mask=mask, other=0.0).to(tl.float32)
    if RECTIFIES:
        y = tl.where(y < 0.0, 0.0, y)  # what is no number stays none
    tl.store(out + there, y.to(out.dtype.element_ty), mask=mask)
    if BRANCHES:
        tl.store(narrow + there, y.to(narrow.dtype.element_ty), mask=mask)


@triton.jit
def norm_kernel(
    x, weight, bias, residual, out, narrow, statistics, places, groups, size, eps,
    ADDS: tl.constexpr, RECTIFIES: tl.constexpr, BRANCHES: tl.constexpr,
    WHOLE: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalise one group of one picture; keep its mean and what it was multiplied by.

    WHOLE: the program holds all of it at a time, and reads it once.
    """
    row, group, channels = _find_group(groups, size)
    place, inside = tl.arange(0, PLACES)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    channel = group * size + inside
    corner = row * places * channels + channel
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    kept = statistics + 2 * (row * groups + group)

    if WHOLE:
        mask, there = (place < places) & known, corner + place * channels
        value = tl.load(x + there, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(value, 1), 0) / (places * size)
        centred = tl.where(mask, value - mean, 0.0)
        rate = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, 1), 0) / (places * size) + eps)
        _finish(centred * rate * gain + offset, residual, out, narrow, there, mask, ADDS, RECTIFIES, BRANCHES)
    else:
        mean, squares = _measure(x, corner, places, size, channels, place, known, PLACES)
        rate = 1.0 / tl.sqrt(squares / (places * size) + eps)
        for first in range(0, places, PLACES):
            mask, there = (first + place < places) & known, corner + (first + place) * channels
            y = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate * gain + offset
            _finish(y, residual, out, narrow, there, mask, ADDS, RECTIFIES, BRANCHES)
    tl.store(kept, mean)
    tl.store(kept + 1, rate)


@triton.jit
def _measure(x, corner, places, size, channels, place, known, PLACES: tl.constexpr):
    """Return a group's mean and its sum of squares around it, block by block (Chan et al., 1983)."""
    mean, squares, seen = 0.0, 0.0, 0.0
    for first in range(0, places, PLACES):
        mask = (first + place < places) & known
        value = tl.load(x + corner + (first + place) * channels, mask=mask, other=0.0).to(tl.float32)
        count = (tl.minimum(places - first, PLACES) * size).to(tl.float32)
        average = tl.sum(tl.sum(value, 1), 0) / count
        centred = tl.where(mask, value - average, 0.0)
        apart, share = average - mean, count / (seen + count)
        squares += tl.sum(tl.sum(centred * centred, 1), 0) + apart * apart * seen * share
        mean += apart * share
        seen += count
    return mean, squares


@triton.jit
def _load_gradient(
    gradient, beside, out, there, mask, y, ADDS: tl.constexpr, RECTIFIES: tl.constexpr, JOINS: tl.constexpr
):  # fmt: skip
    """Read the gradient of what came out, from one place or two, 0 where the ReLU cut off.

    Where nothing was added, that is known from y, computed again, which is sooner than reading `out`.
    """
    found = tl.load(gradient + there, mask=mask, other=0.0).to(tl.float32)
    if JOINS:
        found += tl.load(beside + there, mask=mask, other=0.0).to(tl.float32)
    if RECTIFIES:
        if ADDS:
            found = tl.where(tl.load(out + there, mask=mask, other=0.0) > 0.0, found, 0.0)
        else:
            found = tl.where(y > 0.0, found, 0.0)
    return found


@triton.jit
def norm_backward_kernel(
    x, weight, bias, out, statistics, gradient, beside, by_x, by_residual, by_affine, places, groups, size,
    ADDS: tl.constexpr, RECTIFIES: tl.constexpr, JOINS: tl.constexpr,
    WHOLE: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `norm_kernel`, for one group of one picture; sums over pictures are left to do."""
    row, group, channels = _find_group(groups, size)
    place, inside = tl.arange(0, PLACES)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    channel = group * size + inside
    corner = row * places * channels + channel
    kept = statistics + 2 * (row * groups + group)
    mean, rate = tl.load(kept), tl.load(kept + 1)
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    alone = tl.arange(0, CHANNELS)
    each, own = row * channels + group * size + alone, alone < size
    gains = tl.load(weight + group * size + alone, mask=own, other=0.0).to(tl.float32)

    by_offset, by_gain = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, 1 if WHOLE else places, PLACES):
        mask, there = (first + place < places) & known, corner + (first + place) * channels
        normal = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate
        found = _load_gradient(gradient, beside, out, there, mask, normal * gain + offset, ADDS, RECTIFIES, JOINS)
        if ADDS:
            tl.store(by_residual + there, found.to(by_residual.dtype.element_ty), mask=mask)
        by_offset += tl.sum(found, 0)
        by_gain += tl.sum(found * normal, 0)
        if WHOLE:
            average = tl.sum(by_offset * gains, 0) / (places * size)
            along = tl.sum(by_gain * gains, 0) / (places * size)
            result = rate * (found * gain - average - normal * along)
            tl.store(by_x + there, result.to(by_x.dtype.element_ty), mask=mask)
    tl.store(by_affine + each, by_gain, mask=own)
    tl.store(by_affine + (tl.num_programs(0) // groups) * channels + each, by_offset, mask=own)

    if not WHOLE:
        average = tl.sum(by_offset * gains, 0) / (places * size)
        along = tl.sum(by_gain * gains, 0) / (places * size)
        for first in range(0, places, PLACES):
            mask, there = (first + place < places) & known, corner + (first + place) * channels
            normal = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate
            found = _load_gradient(gradient, beside, out, there, mask, normal * gain + offset, ADDS, RECTIFIES, JOINS)
            result = rate * (found * gain - average - normal * along)
            tl.store(by_x + there, result.to(by_x.dtype.element_ty), mask=mask)


@triton.jit
def pool_kernel(
    x, weight, bias, out, narrow, taken, statistics, lines, columns, out_lines, out_columns, groups, size, eps,
    BRANCHES: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalise one group of one picture, ReLU, and keep the largest number of each window.

    At which of the window's places it was is kept as well: the first of equal ones, or the last that is no number.
    """
    row, group, channels = _find_group(groups, size)
    place, inside = tl.arange(0, PLACES)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    channel, places, out_places = group * size + inside, lines * columns, out_lines * out_columns
    corner = row * places * channels + channel
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    mean, squares = _measure(x, corner, places, size, channels, place, known, PLACES)
    rate = 1.0 / tl.sqrt(squares / (places * size) + eps)
    kept = statistics + 2 * (row * groups + group)
    tl.store(kept, mean)
    tl.store(kept + 1, rate)

    for first in range(0, out_places, PLACES):
        window = first + place
        mask, line, column = (window < out_places) & known, window // out_columns, window % out_columns
        best, tap = tl.full((PLACES, CHANNELS), float("-inf"), tl.float32), tl.full((PLACES, CHANNELS), -1, tl.int32)
        for down in tl.static_range(KERNEL):
            for along in tl.static_range(KERNEL):
                y, z = line * STRIDE - PADDING + down, column * STRIDE - PADDING + along
                within = mask & (y >= 0) & (y < lines) & (z >= 0) & (z < columns)
                value = tl.load(x + corner + (y * columns + z) * channels, mask=within, other=0.0).to(tl.float32)
                value = (value - mean) * rate * gain + offset
                better = within & ((value > best) | (value != value) | (tap < 0))
                best, tap = tl.where(better, value, best), tl.where(better, down * KERNEL + along, tap)
        there = (row * out_places + window) * channels + channel
        best = tl.where(best < 0.0, 0.0, best)
        tl.store(out + there, best.to(out.dtype.element_ty), mask=mask)
        if BRANCHES:
            tl.store(narrow + there, best.to(narrow.dtype.element_ty), mask=mask)
        tl.store(taken + there, tap.to(tl.int8), mask=mask)


@triton.jit
def pool_backward_kernel(
    x, weight, bias, taken, statistics, gradient, beside, by_x, by_affine,
    lines, columns, out_lines, out_columns, groups, size,
    JOINS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `pool_kernel`, for one group of one picture; sums over pictures are left to do."""
    row, group, channels = _find_group(groups, size)
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
    by_offset, by_gain = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, out_places, PLACES):
        window = first + place
        mask, there = (window < out_places) & known, out_corner + window * channels
        tap = tl.load(taken + there, mask=mask, other=0).to(tl.int32)
        y = (window // out_columns) * STRIDE - PADDING + tap // KERNEL
        z = (window % out_columns) * STRIDE - PADDING + tap % KERNEL
        value = tl.load(x + corner + (y * columns + z) * channels, mask=mask, other=0.0).to(tl.float32)
        normal = (value - mean) * rate
        found = _load_gradient(gradient, beside, x, there, mask, normal * gain + offset, False, True, JOINS)
        by_offset += tl.sum(found, 0)
        by_gain += tl.sum(found * normal, 0)
    tl.store(by_affine + each, by_gain, mask=own)
    tl.store(by_affine + (tl.num_programs(0) // groups) * channels + each, by_offset, mask=own)

    # the gradients, number by number: each may be the largest of several windows
    average = tl.sum(by_offset * gains, 0) / (places * size)
    along = tl.sum(by_gain * gains, 0) / (places * size)
    for first in range(0, places, PLACES):
        number = first + place
        mask, line, column = (number < places) & known, number // columns, number % columns
        value = tl.load(x + corner + number * channels, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((PLACES, CHANNELS), tl.float32)
        for up in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            for left in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
                y, z = (line + PADDING) // STRIDE - up, (column + PADDING) // STRIDE - left  # a window that may see it
                down, across = line + PADDING - y * STRIDE, column + PADDING - z * STRIDE
                within = mask & (y >= 0) & (y < out_lines) & (down < KERNEL)
                within = within & (z >= 0) & (z < out_columns) & (across < KERNEL)
                there = out_corner + (y * out_columns + z) * channels
                # all channels of it are read, side by side, also where another place was larger
                came = tl.load(gradient + there, mask=within, other=0.0).to(tl.float32)
                if JOINS:
                    came += tl.load(beside + there, mask=within, other=0.0).to(tl.float32)
                tap = tl.load(taken + there, mask=within, other=-1)
                total += tl.where(tap == down * KERNEL + across, came, 0.0)
        normal = (value - mean) * rate
        found = tl.where(normal * gain + offset > 0.0, total, 0.0)
        result = rate * (found * gain - average - normal * along)
        tl.store(by_x + corner + number * channels, result.to(by_x.dtype.element_ty), mask=mask)
