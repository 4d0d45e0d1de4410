# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernel that `stepper.py` launches."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adam_kernel(
    weights, gradients, means, squares, averages, shadows, steps, ends, sizes, lr, share,
    log_beta1, log_beta2, beta1, beta2, fresh1, fresh2, eps, decay,
    ALIGNED: tl.constexpr, DECOUPLED: tl.constexpr, FOLLOWS: tl.constexpr, CASTS: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take Adam's step in a block of one of COUNT tensors, whose programs end at `ends`; average and cast them.

    `steps` are those taken before.
    """
    program = tl.program_id(0)
    weight, gradient, mean, square, step = weights[0], gradients[0], means[0], squares[0], steps[0]
    average, shadow = averages[0], shadows[0]
    first, size = 0, tl.load(sizes)
    for number in tl.static_range(1, COUNT):
        begin = tl.load(ends + number - 1)
        mine = program >= begin
        weight, gradient = tl.where(mine, weights[number], weight), tl.where(mine, gradients[number], gradient)
        mean, square = tl.where(mine, means[number], mean), tl.where(mine, squares[number], square)
        step, first = tl.where(mine, steps[number], step), tl.where(mine, begin, first)
        average, shadow = tl.where(mine, averages[number], average), tl.where(mine, shadows[number], shadow)
        size = tl.where(mine, tl.load(sizes + number), size)
    if ALIGNED:  # four numbers are read at once
        weight, gradient = tl.multiple_of(weight, 16), tl.multiple_of(gradient, 16)
        mean, square, size = tl.multiple_of(mean, 16), tl.multiple_of(square, 16), tl.multiple_of(size, 4)
        average, shadow = tl.multiple_of(average, 16), tl.multiple_of(shadow, 16)
    place = (program - first) * BLOCK + tl.arange(0, BLOCK)
    known = place < size
    w, g = tl.load(weight + place, mask=known, other=0.0), tl.load(gradient + place, mask=known, other=0.0)
    m, s = tl.load(mean + place, mask=known, other=0.0), tl.load(square + place, mask=known, other=0.0)
    if FOLLOWS:
        a = tl.load(average + place, mask=known, other=0.0)
        part = tl.load(share)
    g = g.to(tl.float32)
    # 1 - beta ** step, of which float32 would leave four digits at the first steps
    rate, taken = tl.load(lr), tl.load(step).to(tl.float64) + 1.0
    short = rate / (1.0 - tl.exp(taken * log_beta1)).to(tl.float32)
    spread = tl.sqrt((1.0 - tl.exp(taken * log_beta2)).to(tl.float32))

    if DECOUPLED:
        w -= rate * decay * w
    else:
        g += decay * w
    m = beta1 * m + fresh1 * g
    s = beta2 * s + fresh2 * g * g
    w -= short * m / (tl.sqrt(s) / spread + eps)
    tl.store(weight + place, w, mask=known)
    if CASTS:
        tl.store(shadow + place, w.to(shadow.dtype.element_ty), mask=known)
    if FOLLOWS:  # as `torch.lerp` does it
        a = tl.where(part < 0.5, a + part * (w - a), w - (w - a) * (1.0 - part))
        tl.store(average + place, a, mask=known)
    tl.store(mean + place, m, mask=known)
    tl.store(square + place, s, mask=known)
