"""Read memory-mapped pictures at random: only what is asked for, ahead of its use, and kept by nobody.

Left to itself an operating system reads megabytes around each picture, and a process seems to hold all that it has ever
read. Measured: `python -m benchmarks.large_data`. Where there is no `madvise` nothing happens.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np

from getiaction.data.stacked import Stacked


def maps_of(frames: np.ndarray | Stacked) -> Iterator[tuple[int, int, mmap.mmap]]:
    """Yield first row, row past the last, and memory map of each part that has one."""
    first = 0
    for part in frames.parts if isinstance(frames, Stacked) else (frames,):
        mapped = getattr(part, "_mmap", None)  # of np.memmap
        if mapped is not None and hasattr(mapped, "madvise"):
            yield first, first + len(part), mapped
        first += len(part)


def expect_random(frames: np.ndarray | Stacked) -> None:
    """Tell the system that pictures are read in no order, so that it reads nothing around them."""
    for _, _, mapped in maps_of(frames):
        mapped.madvise(mmap.MADV_RANDOM)


def read_ahead(frames: np.ndarray | Stacked, rows: np.ndarray) -> None:
    """Start reading the pictures of some samples, all at once, and do not wait.

    Args:
        rows: (B, To), consecutive or repeated within a sample.
    """
    size = int(np.prod(frames.shape[1:]))
    firsts, stops = rows.min(1), rows.max(1) + 1
    for start, end, mapped in maps_of(frames):
        here = (firsts >= start) & (stops <= end)
        for first, stop in zip((firsts[here] - start).tolist(), (stops[here] - start).tolist(), strict=True):
            page = first * size // mmap.PAGESIZE * mmap.PAGESIZE  # where madvise may begin
            mapped.madvise(mmap.MADV_WILLNEED, page, stop * size - page)


def let_go(frames: np.ndarray | Stacked) -> None:
    """Hold no page any longer; what was read stays in the system's cache as long as there is room."""
    for _, _, mapped in maps_of(frames):
        mapped.madvise(mmap.MADV_DONTNEED)  # the maps are read-only: nothing is lost
