"""Let a fused Adam or AdamW on a CUDA GPU update many weights at once.

PyTorch's fused kernel is launched for some 36 tensors or 320 pieces of 65,536 numbers at a time, too few at once for a
large GPU: 2.4 TB/s of an H200's 4.3 with 76 million weights, 1.6 with 12. Here a launch takes all pieces of 16 tensors,
of 2,048 numbers each, and takes the new weights into their average while it has them. The formula is PyTorch's, and so
is what the optimiser holds between steps; it is rounded otherwise. Measured and predicted: benchmarks/NOTES.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from getiaction.policy.fast.kernels import find_kernels
from getiaction.training.ema import Followed

COUNT = 16  # tensors of a launch
BLOCK = 2048  # numbers of a program
DEVICES = ("cuda",)
PLAIN = ("amsgrad", "maximize", "differentiable")  # what the kernel does not do, and nobody here asks for
MOMENTS = ("exp_avg", "exp_avg_sq")


def update_many_at_once(optimizer: Optimizer, followed: Followed | None = None) -> None:
    """Take the steps of a fused Adam or AdamW by our kernel, on a CUDA GPU where it runs; others are PyTorch's.

    With `followed` each step also averages the weights that the kernel takes.

    PyTorch's step, which everything that listens to it sees, finds no weights to update then. It takes, or refuses,
    those that the kernel does not: without a gradient, of another type, or lying otherwise than what belongs to them;
    and all if there is a gradient scaler or a closure. Several processes must agree on who steps, so they should not
    use it: one of them may lack the compiler.
    """
    if type(optimizer) not in (Adam, AdamW):  # whatever a subclass does in its step
        return
    lists = Lists()
    kept: list[tuple[dict[str, Any], list[nn.Parameter]]] = []  # groups, and all their weights

    def enter(optimizer: Optimizer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        leave()  # what a step that raised left undone
        if followed is not None:
            followed.done.clear()
        if named.get("closure") or any(callable(one) for one in given[1:]) or is_scaled(optimizer):
            return
        try:
            for group in optimizer.param_groups:
                ours = weights_of(group, optimizer)
                if ours and (kernel := find_kernel()) is not None:
                    update(kernel, optimizer, group, ours, lists, followed)
                    kept.append((group, group["params"]))
                    taken = set(ours)
                    group["params"] = [weight for weight in group["params"] if weight not in taken]
        except BaseException:
            leave()
            raise

    def leave(*_: Any) -> None:
        for group, weights in kept:
            group["params"] = weights
        kept.clear()

    optimizer.register_step_pre_hook(enter)
    optimizer.register_step_post_hook(leave)


def find_kernel() -> ModuleType | None:
    """Import the kernel; None where Triton's do not run."""
    if find_kernels() is None:
        return None
    from getiaction.training import adam_kernel

    return adam_kernel


def is_scaled(optimizer: Optimizer) -> bool:
    """Tell whether a gradient scaler leaves it to the optimiser to divide, and maybe to leave the step out."""
    return any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))


def weights_of(group: dict[str, Any], optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the weights of a group that the kernel takes; none of a group that is not all on one GPU."""
    weights, rate = group["params"], group["lr"]
    if not group.get("fused") or any(group.get(name) for name in PLAIN):
        return []
    if not all(isinstance(beta, float) and beta > 0 for beta in group["betas"]):
        return []
    devices = {weight.device for weight in weights} | ({rate.device} if isinstance(rate, Tensor) else set())
    if len(devices) != 1 or next(iter(devices)).type not in DEVICES:
        return []
    return [weight for weight in weights if is_ours(weight, optimizer.state.get(weight) or {})]


def is_ours(weight: nn.Parameter, state: dict[str, Tensor]) -> bool:
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

    def of(self, weights: list[Tensor]) -> tuple[Tensor, Tensor, int]:
        """Return ends and sizes, (COUNT,) each, and the number of programs; no weight, no program."""
        sizes = tuple(weight.numel() for weight in weights)
        key = weights[0].device, sizes
        if key not in self.known:
            padded = torch.tensor([*sizes, *[0] * (COUNT - len(sizes))])
            ends = ((padded + BLOCK - 1) // BLOCK).cumsum(0)
            self.known[key] = ends.to(key[0], torch.int32), padded.to(key[0], torch.int32), int(ends[-1])
        return self.known[key]


def update(
    kernel: ModuleType,
    optimizer: Optimizer,
    group: dict[str, Any],
    weights: list[nn.Parameter],
    lists: Lists,
    followed: Followed | None,
) -> None:
    """Take one step with the weights of a group, whose rate may be a number or a tensor, ()."""
    states = [state_of(optimizer, weight) for weight in weights]
    torch._foreach_add_([state["step"] for state in states], 1.0)
    (beta1, beta2), rate, device = group["betas"], group["lr"], weights[0].device
    lr = rate if isinstance(rate, Tensor) else torch.full((), rate, device=device)
    numbers = (math.log(beta1), math.log(beta2), beta1, beta2, 1 - beta1, 1 - beta2)
    share = lr if followed is None else followed.share
    launches: dict[tuple[bool, bool], list[tuple[Tensor, ...]]] = {}
    for weight, state in zip(weights, states, strict=True):
        average = average_of(weight, followed)
        table = (weight.detach(), gradient_of(weight), state[MOMENTS[0]], state[MOMENTS[1]])
        kind = is_aligned(*table, *([] if average is None else [average])), average is not None
        more = weight.detach() if average is None else average, state["step"]
        launches.setdefault(kind, []).append((*table, *more))
    for (aligned, follows), tables in launches.items():
        for begin in range(0, len(tables), COUNT):
            some = tables[begin : begin + COUNT]
            ends, sizes, programs = lists.of([table[0] for table in some])
            columns = zip(*some, *some[-1:] * (COUNT - len(some)), strict=True)
            with torch.cuda.device_of(lr):
                kernel.adam_kernel[(programs,)](
                    *columns, ends, sizes, lr, share, *numbers, float(group["eps"]), float(group["weight_decay"]),
                    ALIGNED=aligned, DECOUPLED=is_decoupled(optimizer, group), FOLLOWS=follows,
                    COUNT=COUNT, BLOCK=BLOCK, num_warps=4,
                )  # fmt: skip
    changed = [*weights, *(state[name] for state in states for name in MOMENTS)]
    if followed is not None:
        taken = [weight for weight in weights if average_of(weight, followed) is not None]
        followed.done.update(taken)
        changed += [followed.averages[weight] for weight in taken]
    torch.autograd.graph.increment_version(changed)


def average_of(weight: nn.Parameter, followed: Followed | None) -> Tensor | None:
    """Return the average of a weight, if the kernel can take it: it lies like the weight."""
    average = None if followed is None else followed.averages.get(weight)
    if average is None or (average.dtype, average.device) != (weight.dtype, weight.device):
        return None
    return average.detach() if lies_as(average, weight) else None


def gradient_of(weight: nn.Parameter) -> Tensor:
    """Return the gradient that `is_ours` has seen."""
    assert weight.grad is not None
    return weight.grad


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
