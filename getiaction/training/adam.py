"""Let a fused Adam or AdamW on a CUDA GPU update weights at the memory's rate.

PyTorch's fused kernel is launched for some 36 tensors or 320 pieces of 65,536 numbers at a time, too few at once for a
large GPU: 2.4 TB/s of an H200's 4.3 with 76 million weights, 1.6 with 12. Here a launch takes as many pieces as there
are. The formula is PyTorch's, and so is what the optimiser holds between steps; sums are rounded in another order.
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

COUNT = 16  # tensors of a launch
BLOCK = 2048  # numbers of a program
DEVICES = ("cuda",)
PLAIN = ("amsgrad", "maximize", "differentiable")  # what the kernel does not do, and nobody here asks for


def update_at_full_rate(optimizer: Optimizer) -> None:
    """Take the steps of a fused Adam or AdamW by our kernel, on CUDA GPUs where it runs; others are PyTorch's.

    PyTorch's step, which everything that listens to it sees, finds no weights to update then. It takes those that have
    no gradient or lie otherwise than it, and all if there is a gradient scaler or a closure.
    """
    if isinstance(optimizer, Adam | AdamW) and all(group.get("fused") for group in optimizer.param_groups):
        lists = Lists()
        kept: list[tuple[dict[str, Any], list[nn.Parameter]]] = []  # groups, and all their weights

        def enter(optimizer: Optimizer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            kept.clear()
            if named.get("closure") or any(callable(one) for one in given[1:]) or is_scaled(optimizer):
                return
            for group in optimizer.param_groups:
                ours = [weight for weight in group["params"] if is_ours(weight, group)]
                if ours and (kernel := find_kernel()) is not None:
                    update(kernel, optimizer, group, ours, lists)
                    kept.append((group, group["params"]))
                    taken = set(ours)
                    group["params"] = [weight for weight in group["params"] if weight not in taken]

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


def is_ours(weight: nn.Parameter, group: dict[str, Any]) -> bool:
    """Tell whether the kernel takes a weight: one piece of float32 on a GPU, whose gradient lies as it does."""
    gradient = weight.grad
    unusual = any(group.get(name) for name in PLAIN) or 0.0 in group["betas"]
    if gradient is None or weight.device.type not in DEVICES or unusual:
        return False
    plain = weight.dtype == gradient.dtype == torch.float32 and not gradient.is_sparse
    return plain and 0 < weight.numel() < 2**31 and weight.stride() == gradient.stride() and is_whole(weight)


def is_whole(weight: Tensor) -> bool:
    """Tell whether a tensor's numbers lie side by side, in whatever order."""
    return weight.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(weight))


@dataclass
class Lists:
    """Keep on the device what does not change: how large the weights of a launch are, and where their programs end."""

    known: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor, int]] = field(default_factory=dict)

    def of(self, weights: list[nn.Parameter]) -> tuple[Tensor, Tensor, int]:
        """Return ends and sizes, (COUNT,) each, and the number of programs; no weight, no program."""
        sizes = tuple(weight.numel() for weight in weights)
        key = weights[0].device, sizes
        if key not in self.known:
            padded = torch.tensor([*sizes, *[0] * (COUNT - len(sizes))])
            ends = ((padded + BLOCK - 1) // BLOCK).cumsum(0)
            self.known[key] = ends.to(key[0], torch.int32), padded.to(key[0], torch.int32), int(ends[-1])
        return self.known[key]


def update(
    kernel: ModuleType, optimizer: Optimizer, group: dict[str, Any], weights: list[nn.Parameter], lists: Lists
) -> None:
    """Take one step with the weights of a group, whose rate may be a number or a tensor, ()."""
    states = {weight: state_of(optimizer, weight) for weight in weights}
    torch._foreach_add_([state["step"] for state in states.values()], 1.0)
    (beta1, beta2), rate, device = group["betas"], group["lr"], weights[0].device
    lr = rate if isinstance(rate, Tensor) else torch.full((), rate, device=device)
    numbers = (math.log(beta1), math.log(beta2), beta1, beta2, 1 - beta1, 1 - beta2)
    for aligned in (True, False):
        alike = [weight for weight, state in states.items() if is_aligned(weight, state) is aligned]
        for begin in range(0, len(alike), COUNT):
            some = alike[begin : begin + COUNT]
            ends, sizes, programs = lists.of(some)
            some += some[-1:] * (COUNT - len(some))
            rows = [tuple(states[weight][name] for weight in some) for name in ("exp_avg", "exp_avg_sq", "step")]
            with torch.cuda.device_of(lr):
                kernel.adam_kernel[(programs,)](
                    tuple(weight.detach() for weight in some), tuple(weight.grad for weight in some), *rows,
                    ends, sizes, lr, *numbers, group["eps"], group["weight_decay"],
                    ALIGNED=aligned, DECOUPLED=is_decoupled(optimizer, group), COUNT=COUNT, BLOCK=BLOCK, num_warps=4,
                )  # fmt: skip


def is_aligned(weight: nn.Parameter, state: dict[str, Tensor]) -> bool:
    """Tell whether four numbers of a weight, and of what belongs to it, can be read at once."""
    assert weight.grad is not None
    there = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
    return weight.numel() % 4 == 0 and all(one.data_ptr() % 16 == 0 for one in there)


def is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Tell whether weights decay beside the gradient's way, as AdamW's do."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def state_of(optimizer: Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    """Return what the optimiser holds of a weight, made as PyTorch's Adam does at the first step."""
    state: dict[str, Tensor] = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    return state
