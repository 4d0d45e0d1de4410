"""Notice what changed about a module since it was looked at, and who listens to it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import is_
from typing import Any, cast

from torch import Tensor, nn
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
        layers = list(module.modules())
        values = parts_of(layers)
        self._layers = [weakref.ref(layer) for layer in layers]
        self._values = [_nobody if value is None else weakref.ref(value) for value in values]
        self._places = places_of(values)

    def unchanged(self) -> bool:
        """Tell whether all layers are what they were, and their weights lie where they did."""
        layers = [layer() for layer in self._layers]
        if None in layers:
            return False
        values = parts_of(layers)
        if len(values) != len(self._values) or not all(map(is_, values, [value() for value in self._values])):
            return False
        return places_of(values) == self._places


def parts_of(layers: Iterable[nn.Module | None]) -> list[nn.Module | Tensor | None]:
    """Return the children, weights and buffers of each layer, in order; None is one, too."""
    found: list[nn.Module | Tensor | None] = []
    for layer in cast(Iterable[nn.Module], layers):
        found += layer._modules.values()
        found += layer._parameters.values()
        found += layer._buffers.values()
    return found


def places_of(values: Iterable[nn.Module | Tensor | None]) -> list[int]:
    """Return where the weights and buffers among some values lie."""
    return [value.data_ptr() for value in values if isinstance(value, Tensor)]


def _nobody() -> None:
    return None


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
