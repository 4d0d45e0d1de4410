"""Let a fused Adam or AdamW on a CUDA GPU update many weights at once, some of them while gradients still come.

PyTorch's fused kernel is launched for some 36 tensors or 320 pieces of 65,536 numbers at a time, too few at once for a
large GPU: 2.4 TB/s of an H200's 4.3 with 76 million weights, 1.6 with 12. Here a launch takes all pieces of 16 tensors,
of 1,024 numbers each. While it has the new weights it takes them into their average, and casts them for the next step's
products. It is memory that an update waits for, and not so a backward pass, which leaves weights done long before its
end: those are updated beside it, from gradients that are still in autocast's type. The formula is PyTorch's, and so is
what the optimiser holds between steps; it is rounded otherwise. Measured and predicted: benchmarks/NOTES.md.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as hooks

from getiaction.policy.fast.beside import Beside, come_from_one_place, using
from getiaction.policy.fast.casts import Shadows
from getiaction.training.adam import (
    BLOCK,
    COUNT,
    MOMENTS,
    WARPS,
    Lists,
    average_of,
    find_kernel,
    is_aligned,
    is_decoupled,
    is_scaled,
    is_usual,
    kernel_takes,
    lies_as,
    state_of,
    weights_of,
)
from getiaction.training.ema import Followed

AHEAD = COUNT  # tensors that are launched before the step, as soon as there are so many


class Kind(NamedTuple):
    """Say what weights of one launch have in common."""

    gradient: torch.dtype
    aligned: bool  # four numbers of each can be read at once
    follows: bool  # they have averages
    casts: bool  # and shadows


Row = tuple[nn.Parameter, tuple[Tensor, ...]]  # a weight, and all that the kernel takes of it


def update_many_at_once(
    optimizer: Optimizer, followed: Followed | None = None, shadows: Shadows | None = None, *, narrow: bool = False
) -> Stepper | None:
    """Take the steps of a fused Adam or AdamW by our kernel, on a CUDA GPU where it runs; others are PyTorch's.

    PyTorch's step, which everything that listens to it sees, finds no weights to update then. It takes, or refuses,
    those that the kernel does not: without a gradient, of another type, or lying otherwise than what belongs to them;
    and all if there is a gradient scaler or a closure. Several processes must agree on who steps, so they should not
    use it: one of them may lack the compiler.

    Args:
        followed: averages to take the new weights into.
        shadows: other types to write them in.
        narrow: let gradients of weights that are updated ahead stay in autocast's type (see `Beside`); each is that of
            one backward pass, not a sum of several.

    Returns:
        What can update weights ahead of the step; None for other optimisers.
    """
    if type(optimizer) not in (Adam, AdamW):  # whatever a subclass does in its step
        return None
    return Stepper(optimizer, followed, shadows, narrow=narrow)


def writes_casts(optimizer: Optimizer) -> bool:
    """Tell whether `update_many_at_once` takes all steps of all weights, so that `Shadows` are always written."""
    return type(optimizer) in (Adam, AdamW) and all(map(is_usual, optimizer.param_groups)) and find_kernel() is not None


class Stepper:
    """Take an optimiser's steps; see `update_many_at_once`."""

    def __init__(
        self, optimizer: Optimizer, followed: Followed | None, shadows: Shadows | None, *, narrow: bool
    ) -> None:
        self._optimizer, self.followed, self.shadows = weakref.ref(optimizer), followed, shadows
        self._narrow = narrow
        self._lists = Lists()
        self._kept: list[tuple[dict[str, Any], list[nn.Parameter]]] = []  # groups, and all their weights
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}  # of the weights that may be updated ahead of this step
        self._ready: dict[tuple[int, Kind], list[Row]] = {}  # of those, the ones that wait for others
        self._done: set[nn.Parameter] = set()
        self._taken: list[Tensor] = []  # how many steps those took before this one
        self._beside: Beside | None = None
        own = weakref.ref(self)  # a weight should not hold its optimiser

        def tell(weight: Tensor) -> None:
            if (stepper := own()) is not None:
                stepper._update_ahead(weight)

        handles = [
            weight.register_post_accumulate_grad_hook(tell)
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight.requires_grad
        ]
        weakref.finalize(self, lambda: [handle.remove() for handle in handles])
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def optimizer(self) -> Optimizer:
        """Return the optimiser, which holds this object."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @contextlib.contextmanager
    def ahead(self, loss: Tensor) -> Iterator[None]:
        """Compute the weights' gradients beside the backward pass of a loss, the only one before a step; update them.

        Not if somebody listens who may read the gradients, or change them, before the step. Finding that out takes as
        long as a small step: it is for steps that are replayed. After an error some weights are a step ahead.
        """
        self._begin()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        usual = not self._is_listened_to(weights) and not is_scaled(self.optimizer) and come_from_one_place(loss)
        if not usual or find_kernel() is None:
            yield
            return
        groups = [group for group in self.optimizer.param_groups if is_usual(group)]
        self._groups = {weight: group for group in groups for weight in group["params"]}
        self._beside = self._beside or Beside(weights[0].device, narrow=self._narrow)
        if self._narrow:
            for weight in self._groups:
                weight.grad_dtype = None  # any; see `widen`
        try:
            with using(self._beside):
                yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # in a capture that CUDA broke off; the first error is to be told
                self._begin()
            raise
        finally:
            self._groups = {}

    def _is_listened_to(self, weights: list[nn.Parameter]) -> bool:
        if len(self.optimizer._optimizer_step_pre_hooks) > 1 or hooks._global_optimizer_pre_hooks:
            return True
        if torch.is_anomaly_enabled():
            return True
        return any(weight._backward_hooks or len(weight._post_accumulate_grad_hooks or ()) > 1 for weight in weights)

    def _update_ahead(self, weight: Tensor) -> None:
        """Update a weight whose gradient has come, once there are enough for a launch."""
        group = self._groups.get(weight)  # type: ignore[call-overload]
        if group is None or not kernel_takes(weight, self.optimizer.state.get(weight) or {}):
            return
        kind, row = self._row_of(weight)  # type: ignore[arg-type]
        ready = self._ready.setdefault((id(group), kind), [])
        ready.append(row)
        if len(ready) == AHEAD:
            assert self._beside is not None
            with self._beside.updating():
                self._launch(group, kind, ready)
            ready.clear()

    def _before_step(self, optimizer: Optimizer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Update all weights that the kernel takes, and leave the others to PyTorch."""
        self._after_step()  # what a step that raised left undone
        ready, self._ready = self._ready, {}
        if not self._done and not ready:
            self._begin()
        if named.get("closure") or any(callable(one) for one in given[1:]) or is_scaled(optimizer):
            if self._done:
                raise RuntimeError("a step with a closure or a gradient scaler comes too late: weights are updated")
            widen(optimizer)
            return
        try:
            for group in optimizer.param_groups if find_kernel() is not None else ():
                self._launch_rest(group, {kind: rows for (owner, kind), rows in ready.items() if owner == id(group)})
                self._kept.append((group, group["params"]))
                group["params"] = [weight for weight in group["params"] if weight not in self._done]
            widen(optimizer)
        except BaseException:
            self._after_step()
            raise
        finally:
            self._done = set()
            self._count()

    def _launch_rest(self, group: dict[str, Any], ready: dict[Kind, list[Row]]) -> None:
        """Update the weights of a group that are not done, of which some are ready."""
        known = {weight for rows in ready.values() for weight, _ in rows}
        for weight in weights_of(group, self.optimizer, self._done | known):
            kind, row = self._row_of(weight)
            ready.setdefault(kind, []).append(row)
        for kind, rows in ready.items():
            for begin in range(0, len(rows), COUNT):
                self._launch(group, kind, rows[begin : begin + COUNT])

    def _after_step(self, *_: Any) -> None:
        for group, weights in self._kept:
            group["params"] = weights
        self._kept.clear()

    def _count(self) -> None:
        """Count the step of all weights that took it, at once: a launch for each launch of theirs would take longer."""
        taken, self._taken = self._taken, []
        if taken:
            torch._foreach_add_(taken, 1.0)

    def _begin(self) -> None:
        """Forget the last step."""
        self._done, self._ready = set(), {}
        if self.followed is not None:
            self.followed.done.clear()
        self._count()

    def _row_of(self, weight: nn.Parameter) -> tuple[Kind, Row]:
        """Return all that the kernel takes of a weight, itself again for what it does not have."""
        state, average, bare = state_of(self.optimizer, weight), average_of(weight, self.followed), weight.detach()
        shadow = None if self.shadows is None else self.shadows.of.get(weight)
        shadow = shadow if shadow is not None and lies_as(shadow, weight) else None
        assert weight.grad is not None
        table = (bare, weight.grad, state[MOMENTS[0]], state[MOMENTS[1]])
        more = [one for one in (average, shadow) if one is not None]
        kind = Kind(weight.grad.dtype, is_aligned(*table, *more), average is not None, shadow is not None)
        others = (bare if average is None else average, bare if shadow is None else shadow, state["step"])
        return kind, (weight, (*table, *others))

    def _launch(self, group: dict[str, Any], kind: Kind, rows: list[Row]) -> None:
        """Take one step with COUNT weights of a group at most, whose rate may be a number or a tensor, ()."""
        weights, tables = [weight for weight, _ in rows], [table for _, table in rows]
        (beta1, beta2), rate, device = group["betas"], group["lr"], weights[0].device
        lr = rate if isinstance(rate, Tensor) else torch.full((), rate, device=device)
        numbers = (math.log(beta1), math.log(beta2), beta1, beta2, 1 - beta1, 1 - beta2)
        share = lr if self.followed is None else self.followed.share
        ends, sizes, programs = self._lists.of(weights)
        columns = zip(*tables, *tables[-1:] * (COUNT - len(tables)), strict=True)
        kernel = find_kernel()
        assert kernel is not None
        with torch.cuda.device_of(lr):
            kernel.adam_kernel[(programs,)](
                *columns, ends, sizes, lr, share, *numbers, float(group["eps"]), float(group["weight_decay"]),
                ALIGNED=kind.aligned, DECOUPLED=is_decoupled(self.optimizer, group), FOLLOWS=kind.follows,
                CASTS=kind.casts, COUNT=COUNT, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        self._done.update(weights)
        self._taken += [table[-1] for table in tables]
        changed = [*weights, *(moment for table in tables for moment in table[2:4])]
        if kind.follows:
            assert self.followed is not None
            self.followed.done.update(weights)
            changed += [self.followed.averages[weight] for weight in weights]
        torch.autograd.graph.increment_version(changed)
        if kind.casts:
            assert self.shadows is not None
            torch.autograd.graph.increment_version([self.shadows.of[weight] for weight in weights])
            for weight in weights:
                self.shadows.wrote(weight)


def widen(optimizer: Optimizer) -> None:
    """Bring the gradients that are left to PyTorch's step, which takes no others, to the type of their weights."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and weight.grad.dtype != weight.dtype and weight.grad_dtype is None:
                weight.grad = weight.grad.to(weight.dtype)
