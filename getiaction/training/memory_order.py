"""Let a fused optimiser on the CPU update weights as they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer


def update_in_memory_order(optimizer: Optimizer) -> None:
    """Show a fused Adam or AdamW its weights with their sides in memory order, for the time of a step on the CPU.

    PyTorch's kernel goes through weights, gradients and moments as they lie, but copies every gradient first that is
    not contiguous, and does not use the copy. Weights whose channels lie last are contiguous once their sides come in
    another order. Nothing else changes: not a bit of the result, nor what the optimiser holds between steps. A step
    that evaluates a closure is PyTorch's own; after one that raises, the optimiser is of no more use.

    Source: PyTorch, aten/src/ATen/native/cpu/FusedAdamKernel.cpp.
    """
    if isinstance(optimizer, Adam | AdamW) and all(group.get("fused") for group in optimizer.param_groups):
        views: dict[nn.Parameter, View] = {}

        def enter(optimizer: Optimizer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if named.get("closure") or any(callable(one) for one in given[1:]):
                return
            for group in optimizer.param_groups:
                group["params"] = [show(weight, views, optimizer) for weight in group["params"]]

        def leave(optimizer: Optimizer, *_: Any) -> None:
            shown = {view.shown: view for view in views.values()}
            for group in optimizer.param_groups:
                group["params"] = [shown[one].leave(optimizer) if one in shown else one for one in group["params"]]

        optimizer.register_step_pre_hook(enter)
        optimizer.register_step_post_hook(leave)


def show(weight: nn.Parameter, views: dict[nn.Parameter, View], optimizer: Optimizer) -> nn.Parameter:
    """Return a weight with its sides in memory order; as it is where it is so, or its gradient lies otherwise."""
    gradient = weight.grad
    if gradient is None or weight.device.type != "cpu" or weight.is_contiguous():
        return weight
    if gradient.stride() != weight.stride():
        return weight
    view = views.get(weight)
    if view is None or view.shown.data_ptr() != weight.data_ptr():
        view = views[weight] = View(weight)
    return view.enter(optimizer) if view.pays else weight


class View:
    """Hold a weight, and the same memory with its sides in order, of which an optimiser knows the same."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.sides = weight, in_order(weight)
        self.back = [self.sides.index(side) for side in range(weight.ndim)]
        self.shown = nn.Parameter(weight.detach().permute(self.sides))
        self.pays = self.shown.is_contiguous()
        self._known: tuple[dict[str, Any], dict[str, Any]] = {}, {}  # of the weight, of what is shown, seen last

    def enter(self, optimizer: Optimizer) -> nn.Parameter:
        """Let the optimiser see the view instead of the weight."""
        self.shown.grad = self.weight.grad.permute(self.sides) if self.weight.grad is not None else None
        entry = optimizer.state.pop(self.weight, None)
        if entry is not None:
            if not same(self._known[0], entry):
                self._known = dict(entry), {name: self._turn(value, self.sides) for name, value in entry.items()}
            optimizer.state[self.shown] = dict(self._known[1])
        return self.shown

    def leave(self, optimizer: Optimizer) -> nn.Parameter:
        """Let the optimiser see the weight again."""
        entry = optimizer.state.pop(self.shown)  # which Adam makes for each weight that has a gradient
        if not same(self._known[1], entry):
            self._known = {name: self._turn(value, self.back) for name, value in entry.items()}, dict(entry)
        optimizer.state[self.weight], self.shown.grad = dict(self._known[0]), None
        return self.weight

    def _turn(self, value: Any, sides: list[int]) -> Any:
        return value.permute(sides) if isinstance(value, Tensor) and value.ndim == len(sides) else value


def in_order(weight: Tensor) -> list[int]:
    """Return the sides of a tensor, from the one with the largest stride to the one with the smallest."""
    strides = weight.stride()
    return sorted(range(weight.ndim), key=lambda side: (-strides[side], side))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two states hold the very same tensors."""
    return one.keys() == other.keys() and all(one[name] is value for name, value in other.items())
