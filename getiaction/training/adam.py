"""What the kernel of `adam_kernel.py` takes: which groups of an optimiser, which weights, and what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from getiaction.policy.fast.kernels import find_kernels
from getiaction.training.ema import Followed

COUNT = 16  # tensors of a launch
BLOCK, WARPS = 1024, 4  # numbers of a program, and how many warps share them
DEVICES = ("cuda",)
PLAIN = ("amsgrad", "maximize", "differentiable")  # what the kernel does not do, and nobody here asks for
MOMENTS = ("exp_avg", "exp_avg_sq")
GRADIENTS = (torch.float32, torch.bfloat16)  # types that they may come in


def find_kernel() -> ModuleType | None:
    """Import the kernel; None where Triton's do not run."""
    if find_kernels() is None:
        return None
    from getiaction.training import adam_kernel

    return adam_kernel


def is_scaled(optimizer: Optimizer) -> bool:
    """Tell whether a gradient scaler leaves it to the optimiser to divide, and maybe to leave the step out."""
    return any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))


def is_usual(group: dict[str, Any]) -> bool:
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
    if not is_usual(group):
        return []
    left = [weight for weight in group["params"] if weight not in done]
    return [weight for weight in left if kernel_takes(weight, optimizer.state.get(weight) or {})]


def kernel_takes(weight: Tensor, state: dict[str, Tensor]) -> bool:
    """Tell whether the kernel takes a weight: one piece of float32, as are its moments, that lie alike.

    So does its gradient, which may be bfloat16.
    """
    gradient = weight.grad
    if gradient is None or gradient.is_sparse or not 0 < weight.numel() < 2**31 or not is_whole(weight):
        return False
    if any(one.device != weight.device for one in state.values()):
        return False
    moments = [state[name] for name in MOMENTS if name in state]
    types = {weight.dtype, *(one.dtype for one in moments)}
    if types != {torch.float32} or gradient.dtype not in GRADIENTS:
        return False
    return all(lies_as(one, weight) for one in (gradient, *moments))


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
