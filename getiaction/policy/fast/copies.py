"""Copies of weights, in another type or order, that are made again only when the weights changed."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from getiaction.machine import read_cpu

LOOKED_AT = 64  # numbers of each weight
BITS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}  # that are as long as a number


class OtherLayerError(TypeError):
    """A layer is not what it was made as, or its weights do not lie in order."""


class Stamp:
    """Notice whether some weights on the CPU changed since they were taken in.

    PyTorch counts changes, but not those through `weight.data` or NumPy, as some averages of weights and some loaders
    make them. So a few numbers of each weight are compared as well: who averages or loads changes all of them. What
    only `weight.data[some] = ...` changes may stay unseen: write `with torch.no_grad(): weight[some] = ...`.

    Args:
        weights: numbers in any order. They may change, but must stay where they are for as long as this is asked.

    Raises:
        OtherLayerError: one's numbers do not lie at equal distances.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        few = [one[:: stride_over(one.numel())] for one in map(in_order, [weight.detach() for weight in weights])]
        self._few = few  # whose memory `_bits` views
        self._counted = [one for one in few if not one.is_inference()]
        self._bits = [bits_of(one) for one in few if one.numel()]
        self._now: tuple[list[int], bytes] | None = None
        self._seen: tuple[list[int], bytes] | None = None

    def changed(self) -> bool:
        """Tell whether one changed since the last `keep`; before the first, all did."""
        bits = np.concatenate(self._bits).tobytes() if self._bits else b""  # PyTorch takes ten times as long to join
        self._now = [one._version for one in self._counted], bits
        return self._now != self._seen

    def keep(self) -> None:
        """Remember what `changed` saw, once it is taken in: not before, or an interruption would lose it."""
        self._seen = self._now


class Copy:
    """Keep a copy of a weight.

    Args:
        weight: some numbers in any order; see `Stamp`.
        source: a view of them, whose order the copy has.
        dtype: what the copy is in.
        width: of the copy's last dimension, with zeros at its end; None: as in the source.
        in_pairs: let the last dimension's two halves take turns, a number of each, as `native.c` reads bf16.
    """

    def __init__(
        self, weight: Tensor, source: Tensor, dtype: torch.dtype, width: int | None = None, *, in_pairs: bool = False
    ) -> None:
        width = width or source.shape[-1]
        self.copy = torch.zeros((*source.shape[:-1], width), dtype=dtype, device=source.device)
        parts = self.copy.unflatten(-1, (-1, 2)).unbind(-1) if in_pairs else (self.copy,)
        each = width // len(parts)
        self._parts = [
            (part[..., : own.shape[-1]], own) for part, own in zip(parts, source.split(each, -1), strict=False)
        ]
        self.weight, self._stamp = weight, Stamp([weight])

    def refresh(self) -> None:
        """Copy the weight again if it changed since the last time."""
        if self._stamp.changed():
            for part, source in self._parts:
                part.copy_(source)
            self._stamp.keep()


class Copies:
    """Keep the copies of a network's weights, each once, and what else is made of them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Copy] = {}
        self._made: dict[object, Any] = {}

    def find(
        self, weight: Tensor, source: Tensor, dtype: torch.dtype, width: int | None = None, *, in_pairs: bool = False
    ) -> Copy:
        """Return the copy of a weight, or make it; see `Copy`."""
        key = source.data_ptr(), source.shape, source.stride(), dtype, width, in_pairs
        if key not in self._kept:
            self._kept[key] = Copy(weight, source, dtype, width, in_pairs=in_pairs)
        return self._kept[key]

    def once[Made](self, key: object, make: Callable[[], Made]) -> Made:
        """Return what was made under a key, or make it."""
        if key not in self._made:
            self._made[key] = make()
        return cast(Made, self._made[key])


def stride_over(count: int) -> int:
    """Return every which number to look at: some 64 of all, but never those of one column, or row, only."""
    stride = count // LOOKED_AT | 1
    while math.gcd(stride, count) > 1:
        stride += 2
    return stride


def bits_of(few: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """View numbers (n,) of the CPU's memory as integers, without a word to PyTorch, which would keep it from moving."""
    size = few.element_size()
    length = (len(few) - 1) * few.stride(0) * size + size
    memory = (ctypes.c_char * length).from_address(few.data_ptr())
    return np.ndarray(len(few), BITS[size], memory, strides=(few.stride(0) * size,))


def in_order(weight: Tensor) -> Tensor:
    """View a weight as (n,), in the order of its memory; every other number where it is part of another.

    Raises:
        OtherLayerError: its numbers do not lie at equal distances.
    """
    try:
        return weight.permute(sorted(range(weight.ndim), key=weight.stride, reverse=True)).view(-1)
    except RuntimeError as error:
        raise OtherLayerError from error


@cache
def read_faster_in_columns() -> bool:
    """Tell whether products of a few rows read a matrix faster, (K, C'), than its transpose as PyTorch keeps it.

    An Intel Xeon does, an AMD EPYC does not: benchmarks/NOTES.md.
    """
    return read_cpu("vendor_id") == "GenuineIntel"
