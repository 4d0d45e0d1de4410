"""Notice what changed about a module since it was looked at, and who listens to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

GLOBAL_HOOKS = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_backward_pre_hooks,
)


class Held:
    """Remember which layers a module has, and where their weights lie; it holds none of them itself."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = [
            (weakref.ref(layer), children, places)
            for layer in module.modules()
            if (children := children_of(layer)) + (places := places_of(layer))
        ]

    def unchanged(self) -> bool:
        """Tell whether all layers are what they were, and their weights lie where they did."""
        for held, children, places in self._layers:
            layer = held()
            if layer is None or len(layer._modules) != len(children):
                return False
            if len(layer._parameters) + len(layer._buffers) != len(places):
                return False
            for name, child in children:
                if layer._modules.get(name) is not child():
                    return False
            for name, place in places:
                weight = layer._parameters.get(name, layer._buffers.get(name))
                if (None if weight is None else weight.data_ptr()) != place:
                    return False
        return True


def children_of(layer: nn.Module) -> list[tuple[str, Callable[[], nn.Module | None]]]:
    """Return what tells a layer's children, by name, without holding them; None is a child, too."""
    return [(name, weakref.ref(child) if child is not None else _nobody) for name, child in layer._modules.items()]


def _nobody() -> None:
    return None


def places_of(layer: nn.Module) -> list[tuple[str, int | None]]:
    """Return where a layer's own weights and buffers lie."""
    own = (*layer._parameters.items(), *layer._buffers.items())
    return [(name, None if value is None else value.data_ptr()) for name, value in own]


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


def is_watched(*layers: nn.Module) -> bool:
    """Tell whether somebody listens to one of these layers."""
    return any(GLOBAL_HOOKS) or any(any(hooks_of(layer)) for layer in layers)
