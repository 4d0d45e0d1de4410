"""Let a fused Adam or AdamW on a CUDA GPU update many weights at once, some of them while gradients still come.

PyTorch's fused kernel is launched for some 36 tensors or 320 pieces of 65,536 numbers at a time, too few at once for a
large GPU: 2.4 TB/s of an H200's 4.3 with 76 million weights, 1.6 with 12. Here a launch takes all pieces of 16 tensors,
of 2,048 numbers each. While it has the new weights it takes them into their average, and casts them for the next step's
products. It is memory that an update waits for, and not so a backward pass, which leaves weights done long before its
end: those are updated beside it. The formula is PyTorch's, and so is what the optimiser holds between steps; it is
rounded otherwise. Measured and predicted: benchmarks/NOTES.md.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as hooks

from getiaction.policy.fast.beside import Beside, come_from_one_place, using
from getiaction.policy.fast.casts import Shadows
from getiaction.policy.fast.kernels import find_kernels
from getiaction.training.ema import Followed

COUNT = 16  # tensors of a launch
AHEAD = COUNT  # tensors that are launched before the step, as soon as there are so many
BLOCK = 2048  # numbers of a program
DEVICES = ("cuda",)
PLAIN = ("amsgrad", "maximize", "differentiable")  # what the kernel does not do, and nobody here asks for
MOMENTS = ("exp_avg", "exp_avg_sq")


class Kind(NamedTuple):
    """Say what weights of one launch have in common."""

    aligned: bool  # four numbers of each can be read at once
    follows: bool  # they have averages
    casts: bool  # and shadows


Given = tuple[nn.Parameter, tuple[Tensor, ...]]  # a weight, and all that the kernel takes of it


def update_many_at_once(
    optimizer: Optimizer, followed: Followed | None = None, shadows: Shadows | None = None
) -> Stepper | None:
    """Take the steps of a fused Adam or AdamW by our kernel, on a CUDA GPU where it runs; others are PyTorch's.

    PyTorch's step, which everything that listens to it sees, finds no weights to update then. It takes, or refuses,
    those that the kernel does not: without a gradient, of another type, or lying otherwise than what belongs to them;
    and all if there is a gradient scaler or a closure. Several processes must agree on who steps, so they should not
    use it: one of them may lack the compiler.

    Args:
        followed: averages to take the new weights into.
        shadows: other types to write them in.

    Returns:
        What can update weights ahead of the step; None for other optimisers.
    """
    if type(optimizer) not in (Adam, AdamW):  # whatever a subclass does in its step
        return None
    return Stepper(optimizer, followed, shadows)


def writes_casts(optimizer: Optimizer) -> bool:
    """Tell whether `update_many_at_once` takes all steps of all weights, so that `Shadows` are always written."""
    return type(optimizer) in (Adam, AdamW) and all(map(is_plain, optimizer.param_groups)) and find_kernel() is not None


class Stepper:
    """Take an optimiser's steps; see `update_many_at_once`."""

    def __init__(self, optimizer: Optimizer, followed: Followed | None, shadows: Shadows | None) -> None:
        self._optimizer, self.followed, self.shadows = weakref.ref(optimizer), followed, shadows
        self._lists = Lists()
        self._kept: list[tuple[dict[str, Any], list[nn.Parameter]]] = []  # groups, and all their weights
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}  # of the weights that may be updated ahead of this step
        self._ready: dict[tuple[int, Kind], list[Given]] = {}  # of those, the ones that wait for others
        self._done: set[nn.Parameter] = set()
        self._beside: Beside | None = None
        here = weakref.WeakMethod(self._take)  # a weight should not hold its optimiser
        handles = [
            weight.register_post_accumulate_grad_hook(lambda one: (take := here()) and take(one))
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight.requires_grad
        ]
        weakref.finalize(self, lambda: [handle.remove() for handle in handles])
        optimizer.register_step_pre_hook(self._enter)
        optimizer.register_step_post_hook(self._leave)

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
        groups = [group for group in self.optimizer.param_groups if is_plain(group)]
        self._groups = {weight: group for group in groups for weight in group["params"]}
        self._beside = self._beside or Beside(weights[0].device)
        try:
            with using(self._beside):
                yield
        except BaseException:
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

    def _take(self, weight: Tensor) -> None:
        """Update a weight whose gradient has come, once there are enough for a launch."""
        group = self._groups.get(weight)  # type: ignore[call-overload]
        if group is None or not is_ours(weight, self.optimizer.state.get(weight) or {}):
            return
        kind, given = self._give(weight)  # type: ignore[arg-type]
        ready = self._ready.setdefault((id(group), kind), [])
        ready.append(given)
        if len(ready) == AHEAD:
            assert self._beside is not None
            with self._beside.launching():
                self._launch(group, kind, ready)
            ready.clear()

    def _enter(self, optimizer: Optimizer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._leave()  # what a step that raised left undone
        ready, self._ready = self._ready, {}
        if not self._done and not ready:
            self._begin()
        if named.get("closure") or any(callable(one) for one in given[1:]) or is_scaled(optimizer):
            if self._done:
                raise RuntimeError("a step with a closure or a gradient scaler comes too late: weights are updated")
            return
        try:
            for group in optimizer.param_groups:
                ours = weights_of(group, optimizer, self._done)
                if not ours and not self._done:
                    continue
                if find_kernel() is None:
                    continue
                left = {kind: gives for (owner, kind), gives in ready.items() if owner == id(group)}
                known = {weight for gives in left.values() for weight, _ in gives}
                for weight in ours:
                    if weight not in known:
                        kind, one = self._give(weight)
                        left.setdefault(kind, []).append(one)
                for kind, gives in left.items():
                    for begin in range(0, len(gives), COUNT):
                        self._launch(group, kind, gives[begin : begin + COUNT])
                self._kept.append((group, group["params"]))
                group["params"] = [weight for weight in group["params"] if weight not in self._done]
        except BaseException:
            self._leave()
            raise
        finally:
            self._done = set()

    def _leave(self, *_: Any) -> None:
        for group, weights in self._kept:
            group["params"] = weights
        self._kept.clear()

    def _begin(self) -> None:
        """Forget the last step."""
        self._done, self._ready = set(), {}
        if self.followed is not None:
            self.followed.done.clear()

    def _give(self, weight: nn.Parameter) -> tuple[Kind, Given]:
        """Return all that the kernel takes of a weight that `is_ours`; what it does not have, is the weight again."""
        state, average, bare = state_of(self.optimizer, weight), average_of(weight, self.followed), weight.detach()
        shadow = None if self.shadows is None else self.shadows.of.get(weight)
        shadow = shadow if shadow is not None and lies_as(shadow, weight) else None
        assert weight.grad is not None
        table = (bare, weight.grad, state[MOMENTS[0]], state[MOMENTS[1]])
        more = [one for one in (average, shadow) if one is not None]
        kind = Kind(is_aligned(*table, *more), average is not None, shadow is not None)
        others = (bare if average is None else average, bare if shadow is None else shadow, state["step"])
        return kind, (weight, (*table, *others))

    def _launch(self, group: dict[str, Any], kind: Kind, given: list[Given]) -> None:
        """Take one step with COUNT weights of a group at most, whose rate may be a number or a tensor, ()."""
        weights, tables = [weight for weight, _ in given], [table for _, table in given]
        torch._foreach_add_([table[-1] for table in tables], 1.0)
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
                CASTS=kind.casts, COUNT=COUNT, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        self._done.update(weights)
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


def find_kernel() -> ModuleType | None:
    """Import the kernel; None where Triton's do not run."""
    if find_kernels() is None:
        return None
    from getiaction.training import adam_kernel

    return adam_kernel


def is_scaled(optimizer: Optimizer) -> bool:
    """Tell whether a gradient scaler leaves it to the optimiser to divide, and maybe to leave the step out."""
    return any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))


def is_plain(group: dict[str, Any]) -> bool:
    """Tell whether the kernel does what a group asks for, whose weights are all on one GPU."""
    if not group.get("fused") or any(group.get(name) for name in PLAIN):
        return False
    if not all(isinstance(beta, float) and beta > 0 for beta in group["betas"]):
        return False
    rate = group["lr"]
    devices = {weight.device for weight in group["params"]} | ({rate.device} if isinstance(rate, Tensor) else set())
    return len(devices) == 1 and next(iter(devices)).type in DEVICES


def weights_of(group: dict[str, Any], optimizer: Optimizer, done: set[nn.Parameter]) -> list[nn.Parameter]:
    """Return the weights of a group that the kernel takes, but for those that are done; none if it is not plain."""
    if not is_plain(group):
        return []
    left = [weight for weight in group["params"] if weight not in done]
    return [weight for weight in left if is_ours(weight, optimizer.state.get(weight) or {})]


def is_ours(weight: Tensor, state: dict[str, Tensor]) -> bool:
    """Tell whether the kernel takes a weight: one piece of float32, as are its gradient and moments, that lie alike."""
    gradient = weight.grad
    if gradient is None or gradient.is_sparse or not 0 < weight.numel() < 2**31 or not is_whole(weight):
        return False
    if any(one.device != weight.device for one in state.values()):
        return False
    alike = (gradient, *(state[name] for name in MOMENTS if name in state))
    types = {weight.dtype, *(one.dtype for one in alike)}
    return types == {torch.float32} and all(lies_as(one, weight) for one in alike)


def lies_as(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of one shape lie alike; a side of length 1 lies anyhow."""
    if one.stride() == other.stride():
        return True
    return all(size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True))


def is_whole(weight: Tensor) -> bool:
    """Tell whether a tensor's numbers lie side by side, in whatever order."""
    return weight.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(weight))


@dataclass
class Lists:
    """Keep on the device what does not change: how large the weights of a launch are, and where their programs end."""

    known: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor, int]] = field(default_factory=dict)

    def of(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
        """Return ends and sizes, (COUNT,) each, and the number of programs; no weight, no program."""
        sizes = tuple(weight.numel() for weight in weights)
        key = weights[0].device, sizes
        if key not in self.known:
            padded = torch.tensor([*sizes, *[0] * (COUNT - len(sizes))])
            ends = ((padded + BLOCK - 1) // BLOCK).cumsum(0)
            self.known[key] = ends.to(key[0], torch.int32), padded.to(key[0], torch.int32), int(ends[-1])
        return self.known[key]


def average_of(weight: nn.Parameter, followed: Followed | None) -> Tensor | None:
    """Return the average of a weight, if the kernel can take it: it lies like the weight."""
    average = None if followed is None else followed.averages.get(weight)
    if average is None or (average.dtype, average.device) != (weight.dtype, weight.device):
        return None
    return average.detach() if lies_as(average, weight) else None


def is_aligned(*there: Tensor) -> bool:
    """Tell whether four numbers of a weight, and of all that belongs to it, can be read at once."""
    return there[0].numel() % 4 == 0 and all(one.data_ptr() % 16 == 0 for one in there)


def is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Tell whether weights decay beside the gradient's way, as AdamW's do."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def state_of(optimizer: Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    """Return what the optimiser holds of a weight, made as PyTorch's Adam does at the first step."""
    state: dict[str, Tensor] = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    return state
