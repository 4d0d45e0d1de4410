"""Do what lies between two convolutions on a CPU as one call of C, and learn so, each way: `native_norms.c`.

A norm, an activation, FiLM and an addition are up to a dozen of PyTorch's operations, each of which reads and writes
all of a layer. Here they are a few passes over a sample, which a cache holds, with the channels last in memory and
samples and places in any order around them: a convolution by taps leaves (h, w, B, C), which is taken as it lies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from getiaction.policy.fast.native import find_library
from getiaction.policy.fast.watch import is_transformed

PLAIN, MISH, RELU = range(3)
LAST: torch.memory_format = torch.channels_last
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever somebody's default is


class Between(ctypes.Structure):
    """Say what to do with which memory: `between` of `native_norms.c`. Strides are in numbers, not bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("activation", "batch", "places", "channels", "groups")),
        *((name, ctypes.c_void_p) for name in ("x", "start", "weight", "bias", "scale", "shift", "added")),
        *((name, ctypes.c_void_p) for name in ("out", "moments", "running_mean", "running_variance", "scratch")),
        *((name, ctypes.c_void_p) for name in ("samples", "gradient")),
        *((name, ctypes.c_void_p) for name in ("by_x", "by_scale", "by_shift", "by_added", "by_affine")),
        *(
            (f"{name}_{way}", ctypes.c_int64)
            for name in ("x", "out", "added", "gradient")
            for way in ("batch", "place")
        ),
        *((name, ctypes.c_int64) for name in ("by_x_batch", "by_x_place", "film_batch", "by_film_batch")),
        *((name, ctypes.c_float) for name in ("eps", "momentum")),
    )


class How(NamedTuple):
    """Say what comes between: `activation` is one of PLAIN, MISH and RELU; batch norm has no groups, but moments."""

    activation: int
    groups: int
    eps: float
    momentum: float = 0.0
    running_mean: Tensor | None = None
    running_variance: Tensor | None = None


class Norms:
    """Hold the compiled operations."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._normalise, self._scratch_size = functions.normalise, functions.scratch_size
        self._normalise.argtypes, self._normalise.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), None
        self._scratch_size.argtypes, self._scratch_size.restype = (ctypes.c_int64,) * 3, ctypes.c_int64
        functions.between_size.restype = ctypes.c_int64
        assert functions.between_size() == ctypes.sizeof(Between)

    def forwards(
        self,
        how: How,
        x: Tensor,
        start: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        film: Tensor | None,
        added: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what comes out of x (B, C, ...), lying as it does, and the moments, as `between` has them."""
        out = torch.empty_strided(x.shape, x.stride(), **FLOATS)
        (batch, channels, *_), (by_batch, by_place) = x.shape, strides(x)
        moments = torch.empty((batch, how.groups, 2) if how.groups else (2, channels), **FLOATS)
        scale, shift, film_batch = halves(film, channels)
        added_strides = (0, 0) if added is None else strides(added)
        self._run(False, Between(
            how.activation, batch, x.numel() // (batch * channels), channels, how.groups,
            x.data_ptr(), at(start), weight.data_ptr(), bias.data_ptr(), scale, shift, at(added),
            out.data_ptr(), moments.data_ptr(), at(how.running_mean), at(how.running_variance), None,
            None, None,
            None, None, None, None, None,
            by_batch, by_place, by_batch, by_place, *added_strides, 0, 0,
            0, 0, film_batch, 0,
            how.eps, how.momentum,
        ))  # fmt: skip
        return out, moments

    def backwards(
        self,
        how: How,
        gradient: Tensor,
        x: Tensor,
        start: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        film: Tensor | None,
        moments: Tensor,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of x, of start, weight and bias (3, C), of FiLM's values, and of what was added before
        the sum was rectified to `out`.
        """
        by_x = torch.empty_strided(x.shape, x.stride(), **FLOATS)
        (batch, channels, *_), (by_batch, by_place) = x.shape, strides(x)
        by_affine = torch.empty(3, channels, **FLOATS)
        by_film = None if film is None else torch.empty_like(film)
        by_added = None if out is None else torch.empty_strided(out.shape, out.stride(), **FLOATS)
        (scale, shift, film_batch), (by_scale, by_shift, by_film_batch) = (
            halves(film, channels),
            halves(by_film, channels),
        )
        out_strides = (0, 0) if out is None else strides(out)
        self._run(True, Between(
            how.activation, batch, x.numel() // (batch * channels), channels, how.groups,
            x.data_ptr(), at(start), weight.data_ptr(), bias.data_ptr(), scale, shift, None,
            at(out), moments.data_ptr(), None, None, None,
            None, gradient.data_ptr(),
            by_x.data_ptr(), by_scale, by_shift, at(by_added), by_affine.data_ptr(),
            by_batch, by_place, *out_strides, *out_strides, *strides(gradient),
            by_batch, by_place, film_batch, by_film_batch,
            how.eps, 0.0,
        ))  # fmt: skip
        return by_x, by_affine, by_film, by_added

    def _run(self, is_backwards: bool, one: Between) -> None:
        threads = torch.get_num_threads()
        scratch = torch.empty(self._scratch_size(threads, one.batch, one.channels), **FLOATS)
        one.scratch = scratch.data_ptr()
        self._normalise(ctypes.addressof(one), is_backwards, threads)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let gradients be computed, but not theirs in turn, with an error that says so."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "what learns in C has no second derivative, which create_graph=True asks for: "
                "use hardware.convolutions=library, or do without `use_native`"
            )
        return backward(ctx, *gradients)

    return checked


def expect_plain(*numbers: Tensor | None) -> None:
    """Check what a backward pass was given, whatever hooks, casts and transforms have made of it since.

    Raises:
        RuntimeError: C would read something else.
    """
    if not all(one is None or is_plain_tensor(one) for one in numbers):
        raise RuntimeError(
            "what learns in C goes back with plain float32 tensors of the CPU only, as it went forwards: "
            "use hardware.convolutions=library, or do without `use_native`"
        )


class _Normalise(torch.autograd.Function):
    """Add `start` (C,) to x (B, C, ...), normalise, and go on as `How` says."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        start: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        film: Tensor | None,
        added: Tensor | None,
        how: How,
    ) -> Tensor:
        x, added = in_rows(x), None if added is None else in_rows(added)
        start = None if start is None else start.contiguous()
        film = film if film is None or film.stride(-1) == 1 else film.contiguous()
        out, moments = found().forwards(how, x, start, weight, bias, film, added)
        ctx.adds, ctx.how = added is not None, how
        ctx.rectified_sum = ctx.adds and how.activation == RELU
        ctx.save_for_backward(x, start, weight, bias, film, moments, out if ctx.rectified_sum else None)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, start, weight, bias, film, moments, out = saved = ctx.saved_tensors
        expect_plain(gradients[0], *saved)
        x, out = in_rows(x), None if out is None else in_rows(out)  # hooks may have saved them otherwise
        film = film if film is None or film.stride(-1) == 1 else film.contiguous()
        given = in_rows(gradients[0]), x, start, weight, bias, film, moments.contiguous(), out
        by_x, by_affine, by_film, by_added = found().backwards(ctx.how, *given)
        by_start, by_weight, by_bias = by_affine.unbind()
        by_added = gradients[0] if ctx.adds and not ctx.rectified_sum else by_added
        return by_x, by_start if ctx.needs_input_grad[1] else None, by_weight, by_bias, by_film, by_added, None


def normalise_groups(
    norm: nn.GroupNorm,
    x: Tensor,
    start: Tensor | None = None,
    film: Tensor | None = None,
    added: Tensor | None = None,
    *,
    activation: int,
) -> Tensor:
    """Do what group norm and an activation do to x (B, C, ...) + start (C,), and what is done to that.

    Args:
        film: shifts (B, C), or scales and shifts (B, 2C), after Mish only.
        added: (B, C, ...), after Mish, or before ReLU.
    """
    return _Normalise.apply(x, start, norm.weight, norm.bias, film, added, How(activation, norm.num_groups, norm.eps))


def normalise_batch(norm: nn.BatchNorm2d, x: Tensor, added: Tensor | None = None, *, activation: int) -> Tensor:
    """Do what batch norm, learning, and ReLU or nothing do to x (B, C, H, W), with `added` (B, C, H, W) before ReLU."""
    momentum = norm.momentum or 0.0  # there is one where it has moments that run
    how = How(activation, 0, norm.eps, momentum, norm.running_mean, norm.running_var)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return _Normalise.apply(x, None, norm.weight, norm.bias, None, added, how)


def learns(x: Tensor) -> bool:
    """Tell whether x (B, C, ...) may be taken: float32 on a CPU, with gradients."""
    if not is_plain_tensor(x) or not x.numel() or not torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled("cpu") and not is_transformed()


def is_plain_norm(norm: nn.Module) -> bool:
    """Tell whether a norm's numbers are there, float32 and in order."""
    numbers = norm.weight, norm.bias, getattr(norm, "running_mean", norm.bias), getattr(norm, "running_var", norm.bias)
    if norm.weight is None or norm.bias is None:
        return False
    given = [cast(Tensor, one) for one in numbers if one is not None]
    return all(is_plain_tensor(one) and one.is_contiguous() for one in given)


def is_plain_tensor(x: Tensor) -> bool:
    """Tell whether numbers lie in memory as they are: float32 on a CPU, and nobody's own kind of tensor."""
    if type(x) not in (Tensor, nn.Parameter) or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return not x.is_neg() and not x._is_zerotensor()


def at(numbers: Tensor | None) -> int | None:
    """Return where numbers lie."""
    return None if numbers is None else numbers.data_ptr()


def strides(x: Tensor) -> tuple[int, int]:
    """Return how far a sample of x (B, C, ...) lies from the next, and a place, which `in_rows` has seen to."""
    steps = x.stride()
    for side, step in zip(reversed(x.shape), reversed(steps), strict=True):
        if side > 1:
            return steps[0], step
    return steps[0], steps[0]


def in_rows(x: Tensor) -> Tensor:
    """Return x (B, C, h, w) with its channels in order and all of its places in one row: as it lies, or a copy."""
    _, _, height, width = x.shape
    _, channel, down, right = x.stride()
    is_row = height == 1 or width == 1 or down == right * width
    return x if channel == 1 and is_row and 0 not in x.stride() else x.contiguous(memory_format=LAST)


def halves(film: Tensor | None, channels: int) -> tuple[int | None, int | None, int]:
    """Return where scales lie, where shifts lie, if there are any, and how far a sample's from the next."""
    if film is None:
        return None, None, 0
    place, scales = film.data_ptr(), film.shape[1] == 2 * channels
    return place if scales else None, place + film.element_size() * channels * scales, film.stride(0)


def found() -> Norms:
    """Return the compiled operations, which are there."""
    norms = find_norms()
    assert norms is not None
    return norms


@cache
def find_norms() -> Norms | None:
    """Return the compiled operations, or None where they cannot be had."""
    return None if (library := find_library()) is None else Norms(library.functions)
