# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `fused.py`: windows and back, and what lies between two convolutions, forwards and backwards."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unfold_kernel(
    x, out, steps, out_steps, width, x_row, x_step, x_channel,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one window of a sequence, a block of its (C, k) numbers."""
    window = tl.program_id(0).to(tl.int64)
    row, first = window // out_steps, (window % out_steps) * STRIDE - PADDING
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # in (C, k)
    step, channel = first + place % KERNEL, place // KERNEL
    inside = (place < width) & (step >= 0) & (step < steps)
    value = tl.load(x + row * x_row + step * x_step + channel * x_channel, mask=inside, other=0.0)
    tl.store(out + window * width + place, value.to(out.dtype.element_ty), mask=place < width)


@triton.jit
def unfold_lines_kernel(
    x, out, windows, steps, out_steps, channels, x_row, x_step, x_channel,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WINDOWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy what some windows of sequences hold at one tap, a block of channels, into their (k, C) numbers."""
    tap, channel = tl.program_id(1) % KERNEL, tl.program_id(1) // KERNEL * BLOCK + tl.arange(0, BLOCK)[None, :]
    window = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)[:, None]
    known = (window < windows) & (channel < channels)
    row, step = (window // out_steps).to(tl.int64), (window % out_steps) * STRIDE - PADDING + tap
    inside = known & (step >= 0) & (step < steps)
    value = tl.load(x + (row * x_row + step * x_step) + channel * x_channel, mask=inside, other=0.0)
    there = (window.to(tl.int64) * KERNEL + tap) * channels + channel
    tl.store(out + there, value.to(out.dtype.element_ty), mask=known)


@triton.jit
def fold_kernel(
    windows, bias, out, places, steps, window_steps, channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BIASED: tl.constexpr, LAST: tl.constexpr,
    PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what all windows, of (C, k) or if LAST (k, C) numbers, hold of some moments, a block of channels."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)[:, None]
    row, step = (place // steps).to(tl.int64), place % steps
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = (place < places) & (channel < channels)
    total = tl.zeros((PLACES, BLOCK), tl.float32)
    for tap in tl.static_range(KERNEL):
        shifted = step + PADDING - tap
        window = shifted // STRIDE
        inside = (shifted >= 0) & (shifted % STRIDE == 0) & (window < window_steps)
        begin = row * window_steps + window
        if LAST:
            source = windows + (begin * KERNEL + tap) * channels + channel
        else:
            source = windows + (begin * channels + channel) * KERNEL + tap
        total += tl.load(source, mask=known & inside, other=0.0).to(tl.float32)
    if BIASED:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    tl.store(out + place.to(tl.int64) * channels + channel, total.to(out.dtype.element_ty), mask=known)


@triton.jit
def _mish(y):
    """Return Mish and its slope: with s = sigmoid(y) and r = sigmoid(-y), as in `activation.py`."""
    sigmoid = 1.0 / (1.0 + tl.exp(-y))
    rest = 1.0 / (1.0 + tl.exp(y))
    divisor = 1.0 + rest * rest
    gate = sigmoid * (1.0 + rest) / divisor
    share = rest / divisor
    return y * gate, gate + 4.0 * y * sigmoid * share * share


@triton.jit
def _normalise(x, start, place, channel, mask, count, eps, STARTS: tl.constexpr):
    """Return a group of x, `start` added, with mean 0 and variance 1, and what it was multiplied by."""
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if STARTS:
        value += tl.load(start + channel, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(value, 1), 0) / count
    centred = tl.where(mask, value - mean, 0.0)
    rate = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, 1), 0) / count + eps)
    return centred * rate, rate


@triton.jit
def block_kernel(
    x, start, weight, bias, scale, shift, residual, out, steps, size, eps,
    film_row, residual_row, residual_step, residual_channel,
    STARTS: tl.constexpr, SCALES: tl.constexpr, SHIFTS: tl.constexpr, ADDS: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Do what lies after a convolution, for one group of one row."""
    row, group, channels = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1) * size
    step, inside = tl.arange(0, STEPS)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    mask = (step < steps) & known
    channel = group * size + inside
    place = (row * steps + step) * channels + channel

    # all that is read comes first: who waits for a sum cannot wait for memory at the same time
    gain, offset = tl.load(weight + channel, mask=known, other=0.0), tl.load(bias + channel, mask=known, other=0.0)
    if SCALES:
        factor = tl.load(scale + row * film_row + channel, mask=known, other=0.0).to(tl.float32)
    if SHIFTS:
        summand = tl.load(shift + row * film_row + channel, mask=known, other=0.0).to(tl.float32)
    if ADDS:
        around = residual + row * residual_row + step * residual_step + channel * residual_channel
        beside = tl.load(around, mask=mask, other=0.0).to(tl.float32)
    normal, _ = _normalise(x, start, place, channel, mask, steps * size, eps, STARTS)
    y, _ = _mish(normal * gain.to(tl.float32) + offset.to(tl.float32))
    if SCALES:
        y *= factor
    if SHIFTS:
        y += summand
    if ADDS:
        y += beside
    tl.store(out + place, y, mask=mask)


@triton.jit
def block_backward_kernel(
    x, start, weight, bias, scale, gradient, by_x, by_affine, by_scale, by_shift,
    steps, size, eps, film_row, by_film_row,
    gradient_row, gradient_step, gradient_channel,
    STARTS: tl.constexpr, SCALES: tl.constexpr, SHIFTS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `block_kernel`, for one group of one row; sums over rows are left to do."""
    row, group, channels = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1) * size
    rows = tl.num_programs(0)
    step, inside = tl.arange(0, STEPS)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    mask = (step < steps) & known
    channel = group * size + inside
    place = (row * steps + step) * channels + channel
    # one number for each channel of this group
    alone = tl.arange(0, CHANNELS)
    kept, each = alone < size, row * channels + group * size + alone
    film = row * by_film_row + group * size + alone

    count = steps * size
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    source = gradient + row * gradient_row + step * gradient_step + channel * gradient_channel
    found = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    normal, rate = _normalise(x, start, place, channel, mask, count, eps, STARTS)
    y, slope = _mish(normal * gain + offset)

    if SHIFTS:
        tl.store(by_shift + film, tl.sum(found, 0).to(by_shift.dtype.element_ty), mask=kept)
    if SCALES:
        tl.store(by_scale + film, tl.sum(found * y, 0).to(by_scale.dtype.element_ty), mask=kept)
        found *= tl.load(scale + row * film_row + channel, mask=known, other=0.0).to(tl.float32)
    found *= slope
    tl.store(by_affine + each, tl.sum(found * normal, 0), mask=kept)
    tl.store(by_affine + rows * channels + each, tl.sum(found, 0), mask=kept)
    found *= gain
    average = tl.sum(tl.sum(found, 1), 0) / count
    along = tl.sum(tl.sum(found * normal, 1), 0) / count
    result = tl.where(mask, rate * (found - average - normal * along), 0.0)
    if STARTS:
        tl.store(by_affine + 2 * rows * channels + each, tl.sum(result, 0), mask=kept)
    tl.store(by_x + place, result.to(by_x.dtype.element_ty), mask=mask)
