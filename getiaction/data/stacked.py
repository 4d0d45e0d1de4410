"""Show the pictures of several datasets as one array, without copying them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Stacked:
    """Show arrays of pictures, one after the other, as one array that is only read.

    It knows what this package asks of pictures: their shape, single rows, and any arrangement of rows.

    Args:
        parts: each (F_i, H, W, C), of one shape but for F_i; the rows count through them.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])  # (parts + 1,)
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        """Return F, the rows of all parts."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return `rows` (any shape), or what `row, ...` names in one picture, as NumPy would."""
        row, rest = (index[0], index[1:]) if isinstance(index, tuple) else (index, ())
        if not isinstance(row, np.ndarray):
            part = int(np.searchsorted(self.starts, row, side="right")) - 1
            return self.parts[part][(row - self.starts[part], *rest)]
        out = np.empty((*row.shape, *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self.starts, row, side="right") - 1
        for part in np.unique(owner):
            here = owner == part
            out[here] = self.parts[part][row[here] - self.starts[part]]
        return out[(*(slice(None),) * row.ndim, *rest)] if rest else out

    def span(self, start: int, stop: int) -> np.ndarray:
        """Return consecutive rows of one part, where they lie."""
        part = int(np.searchsorted(self.starts, start, side="right")) - 1
        assert stop <= self.starts[part + 1], "an episode lies in one dataset"
        return self.parts[part][start - self.starts[part] : stop - self.starts[part]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Copy all parts into one array."""
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)


def span_of(frames: np.ndarray | Stacked, start: int, stop: int) -> np.ndarray:
    """Return consecutive rows of pictures, where they lie."""
    return frames.span(start, stop) if isinstance(frames, Stacked) else frames[start:stop]
