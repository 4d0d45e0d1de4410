# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernel of `few.py`: a matrix product of so few rows that reading the weights is the work."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def few_kernel(
    x, weight, bias, out, rows, columns, width, weight_row,
    BIASED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Compute a few columns of four rows: each weight is read once for them, and multiplied in float32."""
    first, column = tl.program_id(0) * 4, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = column < columns
    has1, has2, has3 = first + 1 < rows, first + 2 < rows, first + 3 < rows
    weights = weight + column.to(tl.int64)[:, None] * weight_row
    seen = x + first.to(tl.int64) * width
    offset = tl.zeros((COLUMNS,), tl.float32)
    if BIASED:
        offset += tl.load(bias + column, mask=kept, other=0.0).to(tl.float32)
    total0 = tl.zeros((COLUMNS, BLOCK), tl.float32)
    total1 = tl.zeros((COLUMNS, BLOCK), tl.float32)
    total2 = tl.zeros((COLUMNS, BLOCK), tl.float32)
    total3 = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for start in tl.range(0, width, BLOCK, loop_unroll_factor=UNROLL):
        inner = start + tl.arange(0, BLOCK)
        known = inner < width
        w = tl.load(weights + inner[None, :], mask=kept[:, None] & known[None, :], other=0.0)
        w = w.to(tl.float32)
        total0 += w * tl.load(seen + inner, mask=known, other=0.0).to(tl.float32)[None, :]
        total1 += w * tl.load(seen + width + inner, mask=known & has1, other=0.0).to(tl.float32)[None, :]
        total2 += w * tl.load(seen + 2 * width + inner, mask=known & has2, other=0.0).to(tl.float32)[None, :]
        total3 += w * tl.load(seen + 3 * width + inner, mask=known & has3, other=0.0).to(tl.float32)[None, :]
    totals = tl.join(tl.join(total0, total1), tl.join(total2, total3))  # (COLUMNS, BLOCK, 2, 2): one sum for all
    row = first + tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :]
    result = tl.sum(totals, 1) + offset[:, None, None]
    there = out + row.to(tl.int64) * columns + column[:, None, None]
    tl.store(there, result.to(out.dtype.element_ty), mask=kept[:, None, None] & (row < rows))


@triton.jit
def unfold_picture_kernel(
    x, out, width, channels, lines, columns, out_lines, out_columns, x_row, x_channel, x_line, x_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one window of a picture, a block of its (C, HEIGHT, WIDTH) numbers, or with the channels LAST."""
    window = tl.program_id(0)
    row, place = (window // (out_lines * out_columns)).to(tl.int64), window % (out_lines * out_columns)
    inner = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        channel, tap = inner % channels, inner // channels
    else:
        channel, tap = inner // (HEIGHT * WIDTH), inner % (HEIGHT * WIDTH)
    line = place // out_columns * STRIDE_Y - PADDING_Y + tap // WIDTH
    column = place % out_columns * STRIDE_X - PADDING_X + tap % WIDTH
    inside = (inner < width) & (line >= 0) & (line < lines) & (column >= 0) & (column < columns)
    there = x + row * x_row + channel * x_channel + line * x_line + column * x_column
    value = tl.load(there, mask=inside, other=0.0)
    tl.store(out + window.to(tl.int64) * width + inner, value.to(out.dtype.element_ty), mask=inner < width)
