"""Convolve pictures on a CPU by Winograd's F(4x4, 3x3) and F(2x2, 3x3), each way one call of C.

That is `native_winograd.c`: a quarter of the multiplications, at errors of some 7e-7 of the result's size, or four
ninths, at PyTorch's own. A tile shares its errors: what is not finite makes all of it NaN, and a place some thousand
times as large as those beside it costs them digits. benchmarks/NOTES.md says by how much this is faster, and where.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from getiaction.policy.fast.native import find_library
from getiaction.policy.fast.native_norms import FLOATS, LAST

SMALLEST = 3  # places a side, below which windows are all padding
FEWEST = 32  # tiles, below which it takes as long to transform the weights as to multiply by them
EACH = 16  # channels go in and come out by multiples of it, the numbers of the largest vector
SIDES = 4, 2  # places of a tile each way
TILES = {4: 24, 2: 60}  # that are transformed before they are multiplied
WEIGHED = {4: 60, 2: 120}  # the same for a weight's gradient
FLOAT = 4  # bytes


class Winograd(ctypes.Structure):
    """Say what to do with which memory: `winograd` of `native_winograd.c`. Strides are in numbers, not bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "out_channels", "height", "width", "tile", "some")),
        *((name, ctypes.c_void_p) for name in ("x", "gradient")),
        *((f"{name}_{way}", ctypes.c_int64) for name in ("x", "gradient") for way in ("batch", "line", "place")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((f"weight_{way}", ctypes.c_int64) for way in ("out", "in", "line", "tap")),
        ("found", ctypes.c_void_p),
        *((f"found_{way}", ctypes.c_int64) for way in ("batch", "line", "place", "out", "in", "row", "tap")),
        *((name, ctypes.c_void_p) for name in ("panels", "scratch")),
    )


class Convolver:
    """Hold the compiled operations. Pictures have their channels in order."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._convolve, self._weigh = functions.convolve_winograd, functions.weigh_winograd
        self._lay = functions.lay_winograd
        self._panels, self._scratch = functions.winograd_panels, functions.winograd_scratch
        for run in (self._convolve, self._weigh, self._lay):
            run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_int64), None
        self._scratch.argtypes, self._scratch.restype = (ctypes.c_void_p, *(ctypes.c_int64,) * 2), ctypes.c_int64
        self._panels.argtypes, self._panels.restype = (ctypes.c_void_p,), ctypes.c_int64
        functions.winograd_size.restype = ctypes.c_int64
        assert functions.winograd_size() == ctypes.sizeof(Winograd)

    def lay(self, tile: int, weight: Tensor) -> Tensor:
        """Return weights (C', C, 3, 3) as `convolve` reads them, by tiles of so many places a side."""
        one = Winograd(channels=weight.shape[1], out_channels=len(weight), tile=tile, weight=weight.data_ptr())
        one.weight_out, one.weight_in, one.weight_line, one.weight_tap = weight.stride()
        panels = torch.empty(self._panels(ctypes.addressof(one)), **FLOATS)
        one.panels = panels.data_ptr()
        self._lay(ctypes.addressof(one), torch.get_num_threads())
        return panels

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        is_turned: bool = False,
        panels: Tensor | None = None,
    ) -> Tensor:
        """Return x (B, C, h, w) convolved with weights (C', C, 3, 3): (B, C', h, w).

        Args:
            is_turned: the weights are (C, C', 3, 3), and seen the other way round: x is the gradient of what came out,
                and what is returned that of what went in.
            panels: what `lay` made of the weights for `tile_of(x)`; of the weights only the shape is looked at then.
        """
        (batch, channels, *sides), tile = x.shape, tile_of(x)
        at, (out, into, line, tap) = weight.data_ptr(), weight.stride()
        if is_turned:
            at, out, into, line, tap = at + 2 * (line + tap) * FLOAT, into, out, -line, -tap
        made = weight.shape[1 if is_turned else 0]
        found = torch.empty((batch, made, *sides), memory_format=LAST, **FLOATS)
        one = Winograd(
            batch, channels, made, *sides, tile, share_of(count_tiles(x, tile), TILES[tile]),
            x.data_ptr(), None, *places(x), 0, 0, 0,
            at, None if bias is None else bias.data_ptr(), out, into, line, tap,
            found.data_ptr(), *places(found), 0, 0, 0, 0, None if panels is None else panels.data_ptr(),
        )  # fmt: skip
        self._run(one, is_gradient=False)
        return found

    def weigh(self, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of a weight (C', C, 3, 3), lying as it does.

        Args:
            x: what was convolved, (B, C, h, w).
            gradient: of what came out, (B, C', h, w).
        """
        found, tile = torch.empty_like(weight), tile_of(x)
        one = Winograd(
            len(x), x.shape[1], len(weight), *x.shape[2:], tile, WEIGHED[tile],
            x.data_ptr(), gradient.data_ptr(), *places(x), *places(gradient),
            None, None, 0, 0, 0, 0,
            found.data_ptr(), 0, 0, 0, *found.stride(),
        )  # fmt: skip
        self._run(one, is_gradient=True)
        return found

    def _run(self, one: Winograd, *, is_gradient: bool) -> None:
        threads = torch.get_num_threads()
        scratch = torch.empty(self._scratch(ctypes.addressof(one), int(is_gradient), threads), **FLOATS)
        one.scratch = scratch.data_ptr()
        (self._weigh if is_gradient else self._convolve)(ctypes.addressof(one), threads)


def places(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of samples, lines and places of x (B, C, h, w)."""
    return x.stride(0), x.stride(2), x.stride(3)


def tile_of(x: Tensor) -> int:
    """Return how many places a side tiles of x (B, C, h, w) have: those of the fewest products."""
    return min(SIDES, key=lambda side: count_tiles(x, side) * (side + 2) ** 2 + side / 8)


def share_of(tiles: int, most: int) -> int:
    """Return how many tiles to do at once, at most so many, for all threads to have as much to do."""
    threads = torch.get_num_threads()
    turns = -(-tiles // (threads * most))
    return -(-tiles // (threads * turns))


def count_tiles(x: Tensor, side: int) -> int:
    """Return of how many tiles x (B, C, h, w) is made."""
    batch, _, height, width = x.shape
    return batch * -(-height // side) * -(-width // side)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, *, fewest: int = FEWEST) -> bool:
    """Tell whether a convolution is faster so: of 3x3 taps, at every place of pictures x (B, C, h, w)."""
    if weight.shape[2:] != (3, 3) or (stride, padding) != (1, 1) or min(x.shape[2:]) < SMALLEST:
        return False
    if any(channels % EACH for channels in weight.shape[:2]) or not x.is_contiguous(memory_format=LAST):
        return False
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return False
    return count_tiles(x, tile_of(x)) >= fewest


@cache
def find_winograd() -> Convolver | None:
    """Return the compiled operations, or None where they cannot be had."""
    return None if (library := find_library()) is None else Convolver(library.functions)
