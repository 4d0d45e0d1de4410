"""Learn on a CPU with a convolution of pictures by calls of C.

Where Winograd's products are fewer, each way is one: `native_winograd.py`. Else the gradient of the weights is one, by
`native_pictures.c`: without AVX-512 oneDNN takes up to twice as long for it as for each of the other two passes, which
are left to it. benchmarks/NOTES.md says by how much this is faster.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from getiaction.policy.fast import native_winograd
from getiaction.policy.fast.native import find_library
from getiaction.policy.fast.native_norms import FLOATS, LAST, is_plain_tensor, once
from getiaction.policy.fast.watch import is_transformed

FEWEST = 16  # channels, of what goes in and of what comes out
HELD = 112 * 1024  # bytes of PANEL channels of some samples, which each tap goes through again
FLOAT = 4  # bytes
ONES, ZEROS = (1, 1), (0, 0)


class Pictures(ctypes.Structure):
    """Say what to do with which memory: `pictures` of `native_pictures.c`. Strides are in numbers, not bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "out_channels", "kernel", "stride", "padding")),
        *((name, ctypes.c_int64) for name in ("height", "width", "out_height", "out_width", "some")),
        *((name, ctypes.c_void_p) for name in ("x", "gradient")),
        *((f"{name}_{way}", ctypes.c_int64) for name in ("x", "gradient") for way in ("batch", "line", "place")),
        ("by_weight", ctypes.c_void_p),
        *((f"by_{name}_stride", ctypes.c_int64) for name in ("out", "in", "line", "tap")),
        ("scratch", ctypes.c_void_p),
    )


class Weigher:
    """Hold the compiled operation."""

    def __init__(self, functions: ctypes.CDLL, panel: int) -> None:
        self._weigh, self._scratch, self._panel = functions.weigh_pictures, functions.pictures_scratch, panel
        self._weigh.argtypes, self._weigh.restype = (ctypes.c_void_p, ctypes.c_int64), None
        self._scratch.argtypes, self._scratch.restype = (ctypes.c_void_p,), ctypes.c_int64
        functions.pictures_size.restype = ctypes.c_int64
        assert functions.pictures_size() == ctypes.sizeof(Pictures)

    def weigh(self, x: Tensor, gradient: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        """Return the gradient of a weight (C', C, k, k), lying as it does.

        Args:
            x: what was convolved, (B, C, h, w), its channels in order.
            gradient: of what came out, (B, C', h', w'), the same.
        """
        found, kernel = torch.empty_like(weight), weight.shape[2]
        tall, wide = ((side - 1) * stride + kernel for side in gradient.shape[2:])
        some = max(1, min(len(x), HELD // (FLOAT * self._panel * tall * wide)))
        one = Pictures(
            len(x), x.shape[1], len(weight), kernel, stride, padding,
            *x.shape[2:], *gradient.shape[2:], some,
            x.data_ptr(), gradient.data_ptr(),
            x.stride(0), *x.stride()[2:], gradient.stride(0), *gradient.stride()[2:],
            found.data_ptr(), *found.stride(),
        )  # fmt: skip
        scratch = torch.empty(self._scratch(ctypes.addressof(one)), **FLOATS)
        one.scratch = scratch.data_ptr()
        self._weigh(ctypes.addressof(one), torch.get_num_threads())
        return found


class _Convolution(torch.autograd.Function):
    """Convolve x (B, C, h, w) with weights (C', C, k, k) into (B, C', h', w')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.window, ctx.shapes = (stride, padding), (x.shape, weight.shape)
        ctx.by_tiles = native_winograd.takes(x, weight, bias, stride, padding)
        ctx.set_materialize_grads(False)  # of what nobody used there is none
        if ctx.by_tiles:
            return convolver().convolve(x, weight, bias)
        return torch.convolution(x, weight, bias, (stride, stride), (padding, padding), ONES, False, ZEROS, 1)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if gradients[0] is None:
            return (None,) * 5
        (x, weight), (stride, padding), gradient = ctx.saved_tensors, ctx.window, gradients[0]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        by_x = by_weight = by_bias = None
        how = (stride, stride), (padding, padding), ONES, False, ZEROS, 1
        # hooks, and who differentiates, may have brought others
        fits = (x.shape, weight.shape) == ctx.shapes and lie_as_they_are(x, weight, gradient)
        gradient, by_tiles = in_rows(gradient) if fits else gradient, fits and ctx.by_tiles
        if needs_x and by_tiles:
            by_x = convolver().convolve(gradient, weight, is_turned=True)
        elif needs_x:
            by_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, *how, (True, False, False))[0]
        if needs_weight and by_tiles:
            by_weight = convolver().weigh(in_rows(x), gradient, weight)
        elif needs_weight and fits:
            by_weight = weigher().weigh(in_rows(x), gradient, weight, stride, padding)
        elif needs_weight:
            by_weight = torch.ops.aten.convolution_backward(gradient, x, weight, None, *how, (False, True, False))[1]
        if needs_bias:
            by_bias = gradient.sum(dim=(0, 2, 3))
        return by_x, by_weight, by_bias, None, None


def lie_as_they_are(x: Tensor, weight: Tensor, gradient: Tensor) -> bool:
    """Tell whether a backward pass sees plain numbers, and nobody transforms it."""
    functorch = torch._C._functorch
    if is_transformed() or functorch.is_legacy_batchedtensor(gradient) or functorch.is_batchedtensor(gradient):
        return False
    return all(is_plain_tensor(one) for one in (x, weight, gradient)) and is_dense(weight)


def in_rows(x: Tensor) -> Tensor:
    """Return x (B, C, h, w) with its channels in order: as it lies, or a copy."""
    return x if x.stride(1) == 1 and 0 not in x.stride() else x.contiguous(memory_format=LAST)


def takes(layer: nn.Conv2d, x: Tensor) -> bool:
    """Tell whether a convolution that learns can be done here, and is faster so: plain, of square windows."""
    weight, bias, windows = layer.weight, layer.bias, (layer.stride, layer.padding)
    if any(not isinstance(pair, tuple) or [type(side) for side in pair] != [int, int] for pair in windows):
        return False
    if any(pair[0] != pair[1] for pair in windows) or weight.shape[2] != weight.shape[3]:
        return False
    if type(layer)._conv_forward is not nn.Conv2d._conv_forward or "_conv_forward" in vars(layer):
        return False
    if weight.shape[2] == 1:  # where it was no faster
        return False
    if min(weight.shape[:2]) < FEWEST or x.shape[1] != weight.shape[1] or x.stride(1) != 1:
        return False
    numbers = (weight,) if bias is None else (weight, bias)
    return weight.requires_grad and all(is_plain_tensor(one) for one in numbers) and is_dense(weight)


def has_tiles(layer: nn.Conv2d, x: Tensor) -> bool:
    """Tell whether a convolution that is taken is done by `native_winograd.py`."""
    return native_winograd.takes(x, layer.weight, layer.bias, layer.stride[0], int(layer.padding[0]))


def is_dense(weight: Tensor) -> bool:
    """Tell whether numbers lie side by side, in whatever order, each once."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(weight))


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Do what a convolution does: (B, C, h, w) to (B, C', h', w')."""
    return cast(Tensor, _Convolution.apply(x, layer.weight, layer.bias, layer.stride[0], int(layer.padding[0])))


def weigher() -> Weigher:
    """Return the compiled operation, which is there."""
    found = find_pictures()
    assert found is not None
    return found


def convolver() -> native_winograd.Convolver:
    """Return the compiled operations of tiles, which are there."""
    found = native_winograd.find_winograd()
    assert found is not None
    return found


@cache
def find_pictures() -> Weigher | None:
    """Return the compiled operation, or None where it cannot be had."""
    return None if (library := find_library()) is None else Weigher(library.functions, library.panel)


def compare() -> None:
    """Compare convolutions, and their gradients, with PyTorch's in float64.

    Raises:
        ArithmeticError: they are not the same to rounding.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = (40, 20, 7, 3, 1), (16, 50, 6, 3, 2), (32, 16, 5, 1, 2), (32, 48, 9, 3, 1), (48, 16, 6, 3, 1)
    for wide, high, side, kernel, stride in shapes:
        x = torch.randn((5, side, side, wide), generator=draw, **FLOATS).movedim(3, 1)
        weight = torch.randn((high, wide, kernel, kernel), generator=draw, **FLOATS).requires_grad_()
        x = x.requires_grad_()
        precise, exact = (one.detach().double().requires_grad_() for one in (x, weight))
        ours = _Convolution.apply(x, weight, None, stride, kernel // 2)
        theirs = torch.nn.functional.conv2d(precise, exact, None, stride, kernel // 2)
        came = torch.randn(ours.shape, generator=draw, **FLOATS)
        found = torch.autograd.grad(ours, [x, weight], came)
        wanted = torch.autograd.grad(theirs, [precise, exact], came.double())
        for one, other in zip((ours.detach(), *found), (theirs.detach(), *wanted), strict=True):
            if not float((one - other).norm()) < 1e-4 * float(other.norm()):
                raise ArithmeticError("a convolution computes something else")
