"""Copies of weights, in another type or order, that are made again only when the weights changed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from getiaction.machine import read_cpu

LOOKED_AT = 64  # numbers of each weight
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # that are as long as a number


class Stamp:
    """Notice whether some weights on the CPU changed since the last time.

    PyTorch counts changes, but not those through `weight.data` or NumPy, as some averages of weights and some loaders
    make them. So a few numbers of each weight are compared as well: who averages or loads changes all of them. What
    only `weight.data[some] = ...` changes may stay unseen: write `with torch.no_grad(): weight[some] = ...`.

    Args:
        weights: numbers in any order. They may change, but must stay where they are.

    Raises:
        RuntimeError: one's numbers do not lie at equal distances.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        flat = [in_order(weight.detach()) for weight in weights]
        few = [one[:: one.numel() // LOOKED_AT | 1] for one in flat]  # odd: not one column only
        self._counted = [one for one in few if not one.is_inference()]
        self._bits = [one.view(BITS[one.element_size()]).numpy() for one in few]  # which joins them ten times as fast
        self._seen: tuple[list[int], bytes] | None = None

    def renew(self) -> bool:
        """Tell whether one changed since the last call; the first says so, too."""
        counts = [one._version for one in self._counted]
        bits = np.concatenate(self._bits).tobytes() if self._bits else b""
        if self._seen == (counts, bits):
            return False
        self._seen = counts, bits
        return True


class Copy:
    """Keep a copy of a weight.

    Args:
        weight: some numbers in any order; see `Stamp`.
        source: a view of them, whose order the copy has.
        dtype: what the copy is in.
        width: of the copy's last dimension, with zeros at its end; None: as in the source.
    """

    def __init__(self, weight: Tensor, source: Tensor, dtype: torch.dtype, width: int | None = None) -> None:
        self.copy = torch.zeros((*source.shape[:-1], width or source.shape[-1]), dtype=dtype, device=source.device)
        self._source, self._own = source, self.copy[..., : source.shape[-1]]
        self.weight, self._stamp = weight, Stamp([weight])

    def refresh(self) -> None:
        """Copy the weight again if it changed since the last time."""
        if self._stamp.renew():
            self._own.copy_(self._source)


class Copies:
    """Keep the copies of a network's weights, each once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Copy] = {}

    def find(self, weight: Tensor, source: Tensor, dtype: torch.dtype, width: int | None = None) -> Copy:
        """Return the copy of a weight, or make it; see `Copy`."""
        key = source.data_ptr(), source.shape, source.stride(), dtype, width
        if key not in self._kept:
            self._kept[key] = Copy(weight, source, dtype, width)
        return self._kept[key]


def in_order(weight: Tensor) -> Tensor:
    """View a weight as (n,), in the order of its memory; every other number where it is part of another.

    Raises:
        RuntimeError: its numbers do not lie at equal distances.
    """
    return weight.permute(sorted(range(weight.ndim), key=weight.stride, reverse=True)).view(-1)


@cache
def read_faster_in_columns() -> bool:
    """Tell whether products of a few rows read a matrix faster, (K, C'), than its transpose as PyTorch keeps it.

    An Intel Xeon does, an AMD EPYC does not: benchmarks/NOTES.md.
    """
    return read_cpu("vendor_id") == "GenuineIntel"
