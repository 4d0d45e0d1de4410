# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `fused_pictures.py`: group norm, the addition and the ReLU after it, forwards and backwards."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    x, weight, bias, residual, out, statistics, places, size, eps,
    ADDS: tl.constexpr, RECTIFIES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalise one group of one picture; keep its mean and what it was multiplied by."""
    row, group, channels = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1) * size
    place, inside = tl.arange(0, PLACES)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    channel = group * size + inside
    corner = row * places * channels + channel

    # Chan et al., 1983: the mean and the sum of squares around it, block by block
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
    rate = 1.0 / tl.sqrt(squares / seen + eps)
    kept = statistics + 2 * (row * tl.num_programs(1) + group)
    tl.store(kept, mean)
    tl.store(kept + 1, rate)

    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    for first in range(0, places, PLACES):
        mask = (first + place < places) & known
        there = corner + (first + place) * channels
        y = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate * gain + offset
        if ADDS:
            y += tl.load(residual + there, mask=mask, other=0.0).to(tl.float32)
        if RECTIFIES:
            y = tl.where(y < 0.0, 0.0, y)  # what is no number stays none
        tl.store(out + there, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_gradient(gradient, out, there, mask, y, ADDS: tl.constexpr, RECTIFIES: tl.constexpr):
    """Read the gradient of what came out, 0 where the ReLU cut off.

    Where nothing was added, that is known from y, computed again, which is sooner than reading `out`.
    """
    found = tl.load(gradient + there, mask=mask, other=0.0).to(tl.float32)
    if RECTIFIES:
        if ADDS:
            found = tl.where(tl.load(out + there, mask=mask, other=0.0) > 0.0, found, 0.0)
        else:
            found = tl.where(y > 0.0, found, 0.0)
    return found


@triton.jit
def norm_backward_kernel(
    x, weight, bias, out, statistics, gradient, by_x, by_residual, by_affine, places, size,
    ADDS: tl.constexpr, RECTIFIES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `norm_kernel`, for one group of one picture; sums over pictures are left to do."""
    row, group, channels = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1) * size
    place, inside = tl.arange(0, PLACES)[:, None], tl.arange(0, CHANNELS)[None, :]
    known = inside < size
    channel = group * size + inside
    corner = row * places * channels + channel
    kept = statistics + 2 * (row * tl.num_programs(1) + group)
    mean, rate = tl.load(kept), tl.load(kept + 1)
    gain = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)

    by_offset, by_gain = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, places, PLACES):
        mask = (first + place < places) & known
        there = corner + (first + place) * channels
        normal = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate
        found = load_gradient(gradient, out, there, mask, normal * gain + offset, ADDS, RECTIFIES)
        if ADDS:
            tl.store(by_residual + there, found.to(by_residual.dtype.element_ty), mask=mask)
        by_offset += tl.sum(found, 0)
        by_gain += tl.sum(found * normal, 0)
    alone = tl.arange(0, CHANNELS)
    each, own = row * channels + group * size + alone, alone < size
    tl.store(by_affine + each, by_gain, mask=own)
    tl.store(by_affine + tl.num_programs(0) * channels + each, by_offset, mask=own)

    gains = tl.load(weight + group * size + alone, mask=own, other=0.0).to(tl.float32)
    average = tl.sum(by_offset * gains, 0) / (places * size)
    along = tl.sum(by_gain * gains, 0) / (places * size)
    for first in range(0, places, PLACES):
        mask = (first + place < places) & known
        there = corner + (first + place) * channels
        normal = (tl.load(x + there, mask=mask, other=0.0).to(tl.float32) - mean) * rate
        found = load_gradient(gradient, out, there, mask, normal * gain + offset, ADDS, RECTIFIES)
        result = rate * (found * gain - average - normal * along)
        tl.store(by_x + there, result.to(by_x.dtype.element_ty), mask=mask)


@triton.jit
def pool_kernel(
    x, out, taken, numbers, channels, lines, columns, out_lines, out_columns,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep the largest number of each window, and at which of its places it was: the first, or the last NaN."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of (B, H', W', C)
    known, channel, place = number < numbers, number % channels, number // channels
    row, line, column = place // (out_lines * out_columns), (place // out_columns) % out_lines, place % out_columns
    best, tap = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), -1, tl.int32)
    for down in tl.static_range(KERNEL):
        for along in tl.static_range(KERNEL):
            y, z = line * STRIDE - PADDING + down, column * STRIDE - PADDING + along
            inside = known & (y >= 0) & (y < lines) & (z >= 0) & (z < columns)
            there = ((row * lines + y) * columns + z) * channels + channel
            value = tl.load(x + there, mask=inside, other=float("-inf")).to(tl.float32)
            better = inside & ((value > best) | (value != value) | (tap < 0))
            best, tap = tl.where(better, value, best), tl.where(better, down * KERNEL + along, tap)
    tl.store(out + number, best.to(out.dtype.element_ty), mask=known)
    tl.store(taken + number, tap.to(tl.int8), mask=known)


@triton.jit
def pool_backward_kernel(
    gradient, taken, by_x, numbers, channels, lines, columns, out_lines, out_columns,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of the windows that took a number."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of (B, H, W, C)
    known, channel, place = number < numbers, number % channels, number // channels
    row, line, column = place // (lines * columns), (place // columns) % lines, place % columns
    total = tl.zeros((BLOCK,), tl.float32)
    for down in tl.static_range(KERNEL):
        for along in tl.static_range(KERNEL):
            y, z = line + PADDING - down, column + PADDING - along
            inside = known & (y >= 0) & (y % STRIDE == 0) & (y // STRIDE < out_lines)
            inside = inside & (z >= 0) & (z % STRIDE == 0) & (z // STRIDE < out_columns)
            there = ((row * out_lines + y // STRIDE) * out_columns + z // STRIDE) * channels + channel
            mine = inside & (tl.load(taken + there, mask=inside, other=-1) == down * KERNEL + along)
            total += tl.load(gradient + there, mask=mine, other=0.0).to(tl.float32)
    tl.store(by_x + number, total.to(by_x.dtype.element_ty), mask=known)
