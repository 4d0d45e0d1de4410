# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over the rows of small tables on a CUDA GPU, as gradients of biases and norms are: a training step has dozens.

PyTorch takes 5 us for each on an H200, however small.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TALL = 128  # rows, from which a program takes fewer columns
HELD = 512  # rows of a program at a time
NUMBERS_A_WARP = 512


@triton.jit
def sum_kernel(x, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add up all rows of one table, a block of its columns, in float32."""
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < columns
    table = x + tl.program_id(0).to(tl.int64) * rows * columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        there = table + (first + row) * columns + column[None, :]
        total += tl.load(there, mask=(first + row < rows) & known[None, :], other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * columns + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=known)


def add_rows(tables: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums of tables (N, R, C) over their rows: (N, C). Sums are float32."""
    count, rows, columns = tables.shape
    out = torch.empty((count, columns), dtype=dtype, device=tables.device)
    held, across = min(triton.next_power_of_2(rows), HELD), 16 if rows > TALL else 32
    with torch.cuda.device_of(tables):
        sum_kernel[count, triton.cdiv(columns, across)](
            tables.contiguous(), out, rows, columns,
            ROWS=held, COLUMNS=across, num_warps=max(1, min(8, held * across // NUMBERS_A_WARP)),
        )  # fmt: skip
    return out
