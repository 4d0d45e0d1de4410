# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `fused_batch_norm.py`: x lies as (rows, channels), of which a program takes a block."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def measure_kernel(x, means, squares, rows, channels, chunk, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write each channel's mean, and its sum of squares around it, over one chunk of rows (Welford, 1962)."""
    channel, lane = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, ROWS)[:, None]
    known, begin = channel < channels, tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    mean, square = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS, CHANNELS), tl.float32)
    count = tl.zeros((ROWS, 1), tl.float32)
    for first in range(begin, end, ROWS):
        mask = first + lane < end
        there = x + (first + lane).to(tl.int64) * channels + channel[None, :]
        value = tl.load(there, mask=mask & known[None, :], other=0.0).to(tl.float32)
        count += tl.where(mask, 1.0, 0.0)
        apart = tl.where(mask, value - mean, 0.0)
        mean += apart / tl.maximum(count, 1.0)
        square += apart * tl.where(mask, value - mean, 0.0)
    average = tl.sum(mean * count, 0) / (end - begin)
    spread = mean - average[None, :]
    place = tl.program_id(0) * channels + channel
    tl.store(means + place, average, mask=known)
    tl.store(squares + place, tl.sum(square + count * spread * spread, 0), mask=known)


@triton.jit
def finish_kernel(
    means, squares, statistics, running_mean, running_var, batches, rows, channels, chunk, splits, eps, momentum,
    SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Join the chunks (Chan et al., 1983): each channel's mean and what it is multiplied by; and the running ones."""
    channel, split = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, SPLITS)[:, None]
    known, there = channel < channels, split < splits
    place, mask = split * channels + channel[None, :], there & known[None, :]
    count = tl.where(there, tl.minimum(chunk, rows - split * chunk), 0).to(tl.float32)
    part = tl.load(means + place, mask=mask, other=0.0)
    mean = tl.sum(part * count, 0) / rows
    apart = tl.where(mask, part - mean[None, :], 0.0)
    square = tl.sum(tl.load(squares + place, mask=mask, other=0.0) + count * apart * apart, 0)
    tl.store(statistics + channel, mean, mask=known)
    tl.store(statistics + channels + channel, 1.0 / tl.sqrt(square / rows + eps), mask=known)
    old = tl.load(running_mean + channel, mask=known, other=0.0)
    tl.store(running_mean + channel, old + momentum * (mean - old), mask=known)
    old = tl.load(running_var + channel, mask=known, other=0.0)
    tl.store(running_var + channel, old + momentum * (square / (rows - 1) - old), mask=known)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _find(statistics, weight, bias, channel, channels, known):
    """Return what a block's channels are shifted and multiplied by."""
    mean, rate = statistics + channel, statistics + channels + channel
    return (
        tl.load(mean, mask=known, other=0.0)[None, :],
        tl.load(rate, mask=known, other=0.0)[None, :],
        tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)[None, :],
        tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def normalise_kernel(
    x, weight, bias, residual, out, statistics, rows, channels,
    ADDS: tl.constexpr, RECTIFIES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalise, add, cut off what is negative."""
    channel, row = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = channel < channels
    mask, there = (row < rows)[:, None] & known[None, :], row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + there, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        beside = tl.load(residual + there, mask=mask, other=0.0).to(tl.float32)
    mean, rate, gain, offset = _find(statistics, weight, bias, channel, channels, known)
    y = (value - mean) * rate * gain + offset
    if ADDS:
        y += beside
    if RECTIFIES:
        y = tl.where(y < 0.0, 0.0, y)  # what is no number stays none
    tl.store(out + there, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_gradients_kernel(
    x, weight, bias, out, statistics, gradient, beside, by_residual, parts, rows, channels, chunk,
    ADDS: tl.constexpr, RECTIFIES: tl.constexpr, JOINS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write sums over one chunk of rows: of gradients times what was normalised, and of gradients.

    With ADDS each gradient is written as well, since it is what was added's.
    """
    channel, lane = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, ROWS)[:, None]
    known, begin = channel < channels, tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    mean, rate, gain, offset = _find(statistics, weight, bias, channel, channels, known)
    by_gain, by_offset = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(begin, end, ROWS):
        mask, there = (first + lane < end) & known[None, :], (first + lane).to(tl.int64) * channels + channel[None, :]
        normal = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate
        found = tl.load(gradient + there, mask=mask, other=0.0).to(tl.float32)
        if JOINS:
            found += tl.load(beside + there, mask=mask, other=0.0).to(tl.float32)
        if RECTIFIES:
            if ADDS:
                found = tl.where(tl.load(out + there, mask=mask, other=0.0) > 0.0, found, 0.0)
            else:
                found = tl.where(normal * gain + offset > 0.0, found, 0.0)
        if ADDS:
            tl.store(by_residual + there, found.to(by_residual.dtype.element_ty), mask=mask)
        by_gain += found * normal
        by_offset += found
    place = tl.program_id(0) * channels + channel
    tl.store(parts + place, tl.sum(by_gain, 0), mask=known)
    tl.store(parts + tl.num_programs(0) * channels + place, tl.sum(by_offset, 0), mask=known)


@triton.jit
def gradient_kernel(
    x, weight, bias, statistics, gradient, beside, sums, by_x, rows, channels,
    RECTIFIES: tl.constexpr, JOINS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of what was normalised."""
    channel, row = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = channel < channels
    mask, there = (row < rows)[:, None] & known[None, :], row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + there, mask=mask, other=0.0).to(tl.float32)
    found = tl.load(gradient + there, mask=mask, other=0.0).to(tl.float32)
    if JOINS:
        found += tl.load(beside + there, mask=mask, other=0.0).to(tl.float32)
    mean, rate, gain, offset = _find(statistics, weight, bias, channel, channels, known)
    by_gain = tl.load(sums + channel, mask=known, other=0.0)[None, :]
    by_offset = tl.load(sums + channels + channel, mask=known, other=0.0)[None, :]
    normal = (value - mean) * rate
    if RECTIFIES:
        found = tl.where(normal * gain + offset > 0.0, found, 0.0)
    result = rate * gain * (found - (by_offset + normal * by_gain) / rows)
    tl.store(by_x + there, result.to(by_x.dtype.element_ty), mask=mask)
