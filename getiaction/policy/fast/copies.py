"""Copies of weights, in another type or order, that are made again only when the weights changed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from getiaction.machine import read_cpu

LOOKED_AT = 64  # numbers of each weight


class Copy:
    """Keep a copy of a weight.

    PyTorch counts changes, but not those through `weight.data` or NumPy, as some averages of weights and some loaders
    make them. So a few numbers of each weight are compared as well: who averages or loads changes all of them. What
    only `weight.data[some] = ...` changes may stay unseen: write `with torch.no_grad(): weight[some] = ...`.

    Args:
        weight: some numbers in any order. They may change, but must stay where they are.
        source: a view of them, whose order the copy has.
        dtype: what the copy is in.
        width: of the copy's last dimension, with zeros at its end; None: as in the source.
    """

    def __init__(self, weight: Tensor, source: Tensor, dtype: torch.dtype, width: int | None = None) -> None:
        self.copy = torch.zeros((*source.shape[:-1], width or source.shape[-1]), dtype=dtype, device=source.device)
        self._source, self._own = source, self.copy[..., : source.shape[-1]]
        flat = in_order(weight)
        self._few = flat[:: flat.numel() // LOOKED_AT | 1]  # odd: not one column only
        self._seen: tuple[int | None, Tensor] | None = None

    def refresh(self) -> None:
        """Copy the weight again if it changed since the last time."""
        count = None if self._few.is_inference() else self._few._version
        if self._seen is not None and self._seen[0] == count and torch.equal(self._seen[1], self._few):
            return
        self._own.copy_(self._source)
        self._seen = count, self._few.clone()


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
