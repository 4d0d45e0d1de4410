"""Cast weights to the type that autocast multiplies in: once for a chunk of actions, or all at once for a step.

An optimiser that has the new weights at hand can write those as well (see `Shadows` and `training/stepper.py`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from itertools import accumulate

import torch
from torch import Tensor, nn

from getiaction.policy.fast.kernels import find_kernels

ALIGNED = 64  # numbers, at whose multiples each weight begins that is cast among others
Casts = dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]
"""What `cast` looks up: which weight in which type -> the weight, whose id stays its own while it is held, and it."""

_CASTS: ContextVar[Casts | None] = ContextVar("casts", default=None)
_SHADOWS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Shadows]] = weakref.WeakKeyDictionary()


class Shadows:
    """Hold the weights of a module's convolutions in autocast's type, for as long as their optimiser writes both.

    What else changes weights (loading a checkpoint, say) is noticed by `bring_up_to_date`, by what PyTorch counts and
    by where they lie; what goes around that, as `weight.data.fill_(0)` does, is only at the optimiser's next step.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.casts = lay_out(convolved_by(module), dtype)
        self.of = dict(self.casts.values())
        self._seen: dict[Tensor, tuple[int, int]] = {}

    def wrote(self, weight: Tensor) -> None:
        """Remember that the shadow of a weight is what the weight is now; who captures a graph writes nothing yet."""
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._seen[weight] = weight._version, weight.data_ptr()

    def bring_up_to_date(self) -> None:
        """Cast the weights that somebody else has changed."""
        old = [one for one in self.of if self._seen.get(one) != (one._version, one.data_ptr())]
        if old:
            torch._foreach_copy_([self.of[one] for one in old], [one.detach() for one in old])
            for one in old:
                self.wrote(one)


def keep_shadows(module: nn.Module, dtype: torch.dtype) -> Shadows:
    """Let training steps of `module` find its convolutions' weights in a type without casting them; see `Shadows`.

    As long as somebody holds what comes back: the optimiser that writes it.
    """
    shadows = Shadows(module, dtype)
    _SHADOWS[module] = weakref.ref(shadows)
    return shadows


def shadows_of(module: nn.Module) -> Shadows | None:
    """Return what `keep_shadows` made for a module, if it is still held."""
    held = _SHADOWS.get(module)
    return None if held is None else held()


@contextlib.contextmanager
def cast_once() -> Iterator[None]:
    """Let `cast` keep what it makes, for calls without gradients that use the same weights again and again."""
    token = _CASTS.set({})
    try:
        yield
    finally:
        _CASTS.reset(token)


@contextlib.contextmanager
def cast_ahead(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let `cast` find the convolutions' weights below `module`, cast in one go: a training step under autocast, say.

    Each on its own takes a kernel, and more time to launch than to run.
    """
    learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not learns or device.type != "cuda" or not torch.is_autocast_enabled("cuda") or find_kernels() is None:
        yield
        return
    token = _CASTS.set(casts_of(module, torch.get_autocast_dtype("cuda")))
    try:
        yield
    finally:
        _CASTS.reset(token)


def casts_of(module: nn.Module, dtype: torch.dtype) -> Casts:
    """Return the convolutions' weights in a type: kept ones, or new ones."""
    shadows = shadows_of(module)
    if shadows is None or shadows.dtype != dtype:
        casts = lay_out(convolved_by(module), dtype)
        if casts:
            torch._foreach_copy_([place for _, place in casts.values()], [one.detach() for one, _ in casts.values()])
        return casts
    shadows.bring_up_to_date()
    return dict(shadows.casts)  # `cast` adds to it


def convolved_by(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the convolutions below `module` that do not use the library: those that call `cast`."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d)]
    own = [layer for layer in layers if not getattr(layer, "by_library", True)]
    return [weight for layer in own for weight in layer.parameters()]


def lay_out(weights: list[nn.Parameter], dtype: torch.dtype) -> Casts:
    """Return room for weights in a type, in one piece of memory, each lying as its weight does; nothing is copied."""
    taken = [one for one in weights if one.dtype != dtype and torch.ops.aten.is_non_overlapping_and_dense(one)]
    begins = list(accumulate((-(-one.numel() // ALIGNED) * ALIGNED for one in taken), initial=0))
    if not taken:
        return {}
    device = taken[0].device
    memory = torch.empty(begins[-1], dtype=dtype, device=device).untyped_storage()
    casts: Casts = {}
    for one, begin in zip(taken, begins, strict=False):
        # no view of the whole: autograd would take a change of one for a change of all
        place = torch.empty(0, dtype=dtype, device=device).set_(memory, begin, one.shape, one.stride())
        casts[id(one), dtype] = one, place
    return casts


def multiplied_in(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type of products: autocast's, or the one that the weights have."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in a type."""
    kept = _CASTS.get()
    if weight.dtype == dtype or kept is None or not isinstance(weight, nn.Parameter):  # made for this call, say
        return weight.to(dtype)
    place = id(weight), dtype
    if place not in kept:
        kept[place] = weight, weight.to(dtype)
    return kept[place][1]
