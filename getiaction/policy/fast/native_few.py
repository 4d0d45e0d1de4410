"""Convolve pictures of few places, as when one robot acts, by `native_few.c`: each weight is read once for many."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from getiaction.policy.fast.copies import Copy
from getiaction.policy.fast.native import find_library
from getiaction.policy.fast.native_norms import FLOATS, LAST, at


class Few(ctypes.Structure):
    """Say what to do with which memory: `few` of `native_few.c`. Strides are in numbers, not bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "in", "height", "width", "out", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("kernel", "stride", "padding", "halves")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias")),
        *((f"x_{way}", ctypes.c_int64) for way in ("batch", "line", "place")),
        *((name, ctypes.c_void_p) for name in ("found", "scratch")),
    )


class FewPlaces:
    """Do what a convolution of square windows does, with the weights and the bias that are given.

    Args:
        layer: says how it convolves; its own weights are not read.
        dtype: that weights are kept in, float32 or bfloat16; what they are multiplied with, and sums, are float32.
    """

    def __init__(self, layer: nn.Conv2d, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        found = find_few()
        assert found is not None
        self._run, panel = found
        self._windows = windows_of(layer)
        self._channels, self._bias = weight.shape[:2], bias
        self._halves = dtype == torch.bfloat16
        self._panels = panels_of(weight, dtype, panel)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w), whose channels are in order, to (B, C', h', w')."""
        (out, channels), kernel, sides = self._channels, self._windows[0], sides_of(x, *self._windows)
        found = torch.empty((len(x), out, *sides), memory_format=LAST, **FLOATS)
        scratch = torch.empty(len(x), *sides, *kernel, channels, **FLOATS)
        one = Few(
            len(x), channels, *x.shape[2:], out, *sides, *(one for one, _ in self._windows), self._halves,
            x.data_ptr(), self._panels.data_ptr(), at(self._bias),
            x.stride(0), x.stride(2), x.stride(3),
            found.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        self._run(ctypes.addressof(one), torch.get_num_threads())
        return found


def windows_of(layer: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the kernel's sides, the strides and the padding, which must be numbers of places."""
    return layer.kernel_size, layer.stride, cast(tuple[int, ...], layer.padding)


def sides_of(x: Tensor, *windows: Sequence[int]) -> list[int]:
    """Return (h', w') of what comes out of x (B, C, h, w): by the kernel's sides, the strides and the padding."""
    sides = zip(x.shape[2:], *windows, strict=True)
    return [(side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides]


def panels_of(weight: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """Return weights (C', C, k, k) in panels of so many channels that come out: (C' / width, k, k, C, width)."""
    whole = -(-len(weight) // width) * width
    rows = nn.functional.pad(weight.detach(), (0, 0, 0, 0, 0, 0, 0, whole - len(weight))).unflatten(0, (-1, width))
    copy = Copy(weight, rows.permute(0, 3, 4, 2, 1), dtype, in_pairs=dtype == torch.bfloat16)
    copy.refresh()
    return copy.copy


@cache
def find_few() -> tuple[Callable[[int, int], None], int] | None:
    """Return the compiled operation and the channels of a panel, or None where it cannot be had."""
    if (library := find_library()) is None:
        return None
    run, size = library.functions.convolve_few, library.functions.few_size
    run.argtypes, run.restype, size.restype = (ctypes.c_void_p, ctypes.c_int64), None, ctypes.c_int64
    assert size() == ctypes.sizeof(Few)
    return run, library.panel
