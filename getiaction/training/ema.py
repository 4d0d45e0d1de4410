"""Keep an exponential moving average of a policy's weights, with a decay that warms up."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class Ema:
    """Average the weights of a module; copy its buffers (the running statistics of batch norm).

    The decay of update n, counted from 0, is `min(1 - n ** -power, max_decay)`, and 0 for the first two: the reference
    recipe (real-stanford/diffusion_policy, `EMAModel`; it copies the affine weights of batch norm, we average them).
    All tensors are updated by two fused calls, with no host-device synchronisation.

    Args:
        module: the module to follow; `average` starts as its copy.
    """

    def __init__(self, module: Module, *, power: float = 0.75, max_decay: float = 0.9999) -> None:
        self.power, self.max_decay = power, max_decay
        self.average = copy.deepcopy(module).eval().requires_grad_(False)

    def decay(self, step: int) -> float:
        """Return the decay of update number `step`, counted from 0."""
        return min(1 - max(step, 1) ** -self.power, self.max_decay)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0."""
        averages: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(module.parameters())
        torch._foreach_lerp_(averages, weights, 1 - self.decay(step))
        if buffers := list(self.average.buffers()):
            torch._foreach_copy_(buffers, list(module.buffers()))
