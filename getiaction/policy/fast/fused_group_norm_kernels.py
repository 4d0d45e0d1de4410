# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `fused_group_norm.py`, forwards and backwards: group norm, the addition and the ReLU after it.

A program has one group of one picture, and holds (PLACES, CHANNELS) of its numbers at a time; or GROUPS neighbouring
ones that are small, and holds all of them, (GROUPS, PLACES, CHANNELS).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_group(groups, size, GROUPS: tl.constexpr = 1):
    """Return which picture and group, the first of GROUPS, a program has, and all channels.

    Programs of one picture run together: a line of memory holds channels of several groups.
    """
    program, turns = tl.program_id(0), groups // GROUPS
    return (program // turns).to(tl.int64), program % turns * GROUPS, groups * size


@triton.jit
def _lay(start, PLACES: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the places, groups and channels of what a program holds.

    With GROUPS first Triton gives threads side by side neighbouring channels, on into the next group; with PLACES first
    each thread has channels of all groups, and up to twice the registers.
    """
    place, group, inside = tl.arange(0, PLACES)[:, None], start, tl.arange(0, CHANNELS)[None, :]
    if GROUPS > 1:
        place, group, inside = place[None, :, :], start + tl.arange(0, GROUPS)[:, None, None], inside[None, :, :]
    return place, group, inside


@triton.jit
def _spread(value, GROUPS: tl.constexpr):
    """Lay one number for each group, () or (GROUPS,), along what the program holds."""
    return value if GROUPS == 1 else value[:, None, None]


@triton.jit
def _sum_groups(value, GROUPS: tl.constexpr):
    """Sum all numbers of each group."""
    AXIS: tl.constexpr = 0 if GROUPS == 1 else 1
    return _spread(tl.sum(tl.sum(value, AXIS + 1), AXIS), GROUPS)


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
    WHOLE: tl.constexpr, GROUPS: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalise groups of one picture; keep each one's mean and what it was multiplied by.

    WHOLE: the program holds all of it at a time, and reads it once; where it does not, it has one group.
    """
    row, start, channels = find_group(groups, size, GROUPS)
    place, group, inside = _lay(start, PLACES, GROUPS, CHANNELS)
    known = inside < size
    channel = group * size + inside
    corner = row * places * channels + channel
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    kept = statistics + 2 * (row * groups + group)

    if WHOLE:
        mask, there = (place < places) & known, corner + place * channels
        value = tl.load(x + there, mask=mask, other=0.0).to(tl.float32)
        mean = _sum_groups(value, GROUPS) / (places * size)
        centred = tl.where(mask, value - mean, 0.0)
        rate = 1.0 / tl.sqrt(_sum_groups(centred * centred, GROUPS) / (places * size) + eps)
        _finish(centred * rate * gain + offset, residual, out, narrow, there, mask, ADDS, RECTIFIES, BRANCHES)
    else:
        mean, squares = measure(x, corner, places, size, channels, place, known, PLACES, 2)
        rate = 1.0 / tl.sqrt(squares / (places * size) + eps)
        for first in range(0, places, PLACES):
            mask, there = (first + place < places) & known, corner + (first + place) * channels
            y = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate * gain + offset
            _finish(y, residual, out, narrow, there, mask, ADDS, RECTIFIES, BRANCHES)
    tl.store(kept, mean)
    tl.store(kept + 1, rate)


@triton.jit
def measure(x, corner, places, size, channels, place, known, PLACES: tl.constexpr, AHEAD: tl.constexpr):
    """Return a group's mean and its sum of squares around it.

    Numbers are added up after the mean of the first block is taken off, so that no digits are lost far from zero, and
    each thread adds up its own until the end: nothing in the loop waits for others, and AHEAD blocks load together.
    """
    mask = (place < places) & known
    value = tl.load(x + corner + place * channels, mask=mask, other=0.0).to(tl.float32)
    pivot = tl.sum(tl.sum(value, 1), 0) / (tl.minimum(places, PLACES) * size)
    apart = tl.where(mask, value - pivot, 0.0)
    total, squares = apart, apart * apart
    for first in tl.range(PLACES, places, PLACES, loop_unroll_factor=AHEAD):
        mask = (first + place < places) & known
        value = tl.load(x + corner + (first + place) * channels, mask=mask, other=0.0).to(tl.float32)
        apart = tl.where(mask, value - pivot, 0.0)
        total += apart
        squares += apart * apart
    off = tl.sum(tl.sum(total, 1), 0) / (places * size)
    around = tl.sum(tl.sum(squares, 1), 0) - off * off * (places * size)
    return pivot + off, tl.where(around < 0.0, 0.0, around)  # by rounding, where all are equal; what is no number stays


@triton.jit
def load_gradient(
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
    WHOLE: tl.constexpr, GROUPS: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `norm_kernel`, for GROUPS of one picture; sums over pictures are left to do."""
    row, start, channels = find_group(groups, size, GROUPS)
    place, group, inside = _lay(start, PLACES, GROUPS, CHANNELS)
    known = inside < size
    channel = group * size + inside
    corner = row * places * channels + channel
    kept = statistics + 2 * (row * groups + start)
    alone, own = tl.arange(0, CHANNELS), tl.arange(0, CHANNELS) < size
    if GROUPS > 1:
        kept += 2 * tl.arange(0, GROUPS)
        alone, own = tl.arange(0, GROUPS)[:, None] * size + alone[None, :], own[None, :]
    mean, rate = _spread(tl.load(kept), GROUPS), _spread(tl.load(kept + 1), GROUPS)
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    each = row * channels + start * size + alone
    gains = tl.load(weight + start * size + alone, mask=own, other=0.0).to(tl.float32)

    AXIS: tl.constexpr = 0 if GROUPS == 1 else 1  # of places, and once those are summed, of channels
    by_offset, by_gain = tl.zeros_like(gains), tl.zeros_like(gains)
    for first in range(0, 1 if WHOLE else places, PLACES):
        mask, there = (first + place < places) & known, corner + (first + place) * channels
        normal = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate
        found = load_gradient(gradient, beside, out, there, mask, normal * gain + offset, ADDS, RECTIFIES, JOINS)
        if ADDS:
            tl.store(by_residual + there, found.to(by_residual.dtype.element_ty), mask=mask)
        by_offset += tl.sum(found, AXIS)
        by_gain += tl.sum(found * normal, AXIS)
        if WHOLE:
            average = _spread(tl.sum(by_offset * gains, AXIS), GROUPS) / (places * size)
            along = _spread(tl.sum(by_gain * gains, AXIS), GROUPS) / (places * size)
            result = rate * (found * gain - average - normal * along)
            tl.store(by_x + there, result.to(by_x.dtype.element_ty), mask=mask)
    tl.store(by_affine + each, by_gain, mask=own)
    tl.store(by_affine + (tl.num_programs(0) // (groups // GROUPS)) * channels + each, by_offset, mask=own)

    if not WHOLE:
        average = tl.sum(by_offset * gains, 0) / (places * size)
        along = tl.sum(by_gain * gains, 0) / (places * size)
        for first in range(0, places, PLACES):
            mask, there = (first + place < places) & known, corner + (first + place) * channels
            normal = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate
            found = load_gradient(gradient, beside, out, there, mask, normal * gain + offset, ADDS, RECTIFIES, JOINS)
            result = rate * (found * gain - average - normal * along)
            tl.store(by_x + there, result.to(by_x.dtype.element_ty), mask=mask)
