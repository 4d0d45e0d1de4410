# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gather and crop recorded pictures on a CUDA GPU: a line of a picture is one piece, not so many single numbers.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers that a program copies


@triton.jit
def crop_kernel(
    frames, rows, corners, out, lines, width, steps, out_lines, out_width, colours,
    LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy some lines of one picture; `width` and `out_width` count the numbers of a line, all colours."""
    picture = tl.program_id(0).to(tl.int64)
    corner = corners + 2 * (picture // steps)
    top, left = tl.load(corner), tl.load(corner + 1)
    line, place = tl.program_id(1) * LINES + tl.arange(0, LINES)[:, None], tl.arange(0, WIDTH)[None, :]
    known = (line < out_lines) & (place < out_width)
    source = frames + (tl.load(rows + picture) * lines + top + line) * width + left * colours + place
    value = tl.load(source, mask=known, other=0)
    tl.store(out + (picture * out_lines + line) * out_width + place, value, mask=known)


def crop(frames: Tensor, rows: Tensor, corners: Tensor, shape: tuple[int, int]) -> Tensor:
    """Gather `rows` (B, To) of frames (F, H, W, C), each sample cropped at its corner (B, 2): (B, To, h, w, C)."""
    count, steps, (lines, columns, colours) = *rows.shape, frames.shape[1:]
    out = torch.empty((count, steps, *shape, colours), dtype=frames.dtype, device=frames.device)
    width = triton.next_power_of_2(shape[1] * colours)
    together = max(1, BLOCK // width)
    with torch.cuda.device_of(frames):
        crop_kernel[count * steps, triton.cdiv(shape[0], together)](
            frames, rows.contiguous(), corners.contiguous(), out,
            lines, columns * colours, steps, shape[0], shape[1] * colours, colours, LINES=together, WIDTH=width,
        )  # fmt: skip
    return out
