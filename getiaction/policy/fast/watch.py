"""Notice what changed about a module since it was looked at, and who listens to it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

GLOBAL_HOOKS = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_backward_pre_hooks,
)


class Held:
    """Remember which layers a module has, and where and how their weights lie; it holds none of them itself."""

    def __init__(self, module: nn.Module) -> None:
        layers = list(module.modules())
        self._layers = [weakref.ref(layer) for layer in layers]
        numbers = {layer: number for number, layer in enumerate(layers)}
        self._children = [-1 if child is None else numbers[child] for child in children_of(layers)]
        self._places = places_of(layers)

    def unchanged(self) -> bool:
        """Tell whether all layers are what they were, and their weights lie as they did; names do not matter."""
        layers = [layer() for layer in self._layers]
        if None in layers:
            return False
        children, known = children_of(layers), [*layers, None]
        if len(children) != len(self._children) or not all(map(is_, children, map(known.__getitem__, self._children))):
            return False
        return places_of(layers) == self._places

    def is_patched(self) -> bool:
        """Tell whether somebody put a function of his own in the place of a layer's `forward`."""
        return any("forward" in vars(layer()) for layer in self._layers)


def children_of(layers: Iterable[nn.Module | None]) -> list[nn.Module | None]:
    """Return the children of each layer, in order; None is one, too."""
    found: list[nn.Module | None] = []
    for layer in cast(Iterable[nn.Module], layers):
        if own := vars(layer)["_modules"]:
            found += own.values()
    return found


def places_of(layers: Iterable[nn.Module | None]) -> list[object]:
    """Return which weights and buffers each layer has, and how they lie in memory."""
    found: list[Tensor | None] = []
    for layer in cast(Iterable[nn.Module], layers):
        own = vars(layer)  # sooner than by name
        if own["_parameters"]:
            found += own["_parameters"].values()
        if own["_buffers"]:
            found += own["_buffers"].values()
    there = [one for one in found if one is not None]
    return [[one is None for one in found], list(map(Tensor.data_ptr, there)), list(map(Tensor.stride, there))]


def is_transformed() -> bool:
    """Tell whether calls are compiled, traced, vectorised, differentiated forwards, or seen by somebody else's mode."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack() > 0


class Listeners:
    """Know whether somebody listens to a module's layers, whom a replay would not call."""

    def __init__(self, module: nn.Module) -> None:
        self._hooks = [hooks for layer in module.modules() for hooks in hooks_of(layer)]

    def there(self) -> bool:
        """Tell whether there is one."""
        return any(self._hooks) or any(GLOBAL_HOOKS)


def hooks_of(layer: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the hooks that are called when a layer is, or its gradients are computed; they may change."""
    return layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks


def has_hooks(*layers: nn.Module) -> bool:
    """Tell whether somebody listens to one of these layers."""
    return any(GLOBAL_HOOKS) or any(any(hooks_of(layer)) for layer in layers)


def is_watched(*layers: nn.Module) -> bool:
    """Tell whether somebody listens to one of these layers, or put a function of his own in place of its `forward`."""
    return has_hooks(*layers) or any("forward" in vars(layer) for layer in layers)
