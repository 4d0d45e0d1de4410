"""Keep an exponential moving average of a policy's weights, with a decay that warms up."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Weights = tuple[list[Tensor], list[Tensor]]


@dataclass
class Followed:
    """Let an optimiser average the weights that its step updates, since it has them at hand: see `stepper.py`.

    Args:
        averages: of each weight.
        share: of the new weight in its average, (), where the step reads it.
        done: the weights that were averaged by the last step.
    """

    averages: dict[nn.Parameter, nn.Parameter]
    share: Tensor
    done: set[nn.Parameter] = field(default_factory=set)


class Ema:
    """Average the weights of a module; copy its buffers (the running statistics of batch norm).

    The decay of update n, counted from 0, is `min(1 - n ** -power, max_decay)`, and 0 for the first two: the reference
    recipe (real-stanford/diffusion_policy, `EMAModel`; it copies the affine weights of batch norm, we average them).
    All tensors are updated by a few fused calls, with no host-device synchronisation.

    Args:
        module: the module to follow; `average` starts as its copy.
    """

    def __init__(self, module: Module, *, power: float = 0.75, max_decay: float = 0.9999) -> None:
        self.power, self.max_decay = power, max_decay
        self.average = copy.deepcopy(module).eval().requires_grad_(False)
        self._pairs: Pairs | None = None
        self._followed: Followed | None = None

    def follow(self, module: nn.Module, device: torch.device) -> Followed:
        """Return what an optimiser needs to average weights itself; `update` then leaves out those that it did.

        Call `prepare` before each of its steps: without, the averages are not numbers.
        """
        averages = dict(zip(module.parameters(), self.average.parameters(), strict=True))  # wherever these come to lie
        self._followed = Followed(averages, torch.full((), float("nan"), device=device))
        return self._followed

    def prepare(self, step: int) -> None:
        """Say before optimiser step `step`, counted from 0, how much of the new weights its averages take."""
        if self._followed is not None:
            self._followed.share.fill_(1 - self.decay(step))

    def decay(self, step: int) -> float:
        """Return the decay of update number `step`, counted from 0."""
        return min(1 - max(step, 1) ** -self.power, self.max_decay)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0."""
        if self._pairs is None or self._pairs.module is not module:
            self._pairs = Pairs(self.average, module)
        done = self._followed.done if self._followed is not None else set()
        left = self._pairs.left(done)
        if left[0]:
            torch._foreach_lerp_(*left, 1 - self.decay(step))
        for averages, buffers in self._pairs.buffers:
            torch._foreach_copy_(averages, buffers)


class Pairs:
    """Hold the tensors of an average and of what it follows: finding a thousand of them takes as long as a small step.

    Args:
        average: its tensors must stay what they are, and so must those of `module`; their values may change.
    """

    def __init__(self, average: nn.Module, module: nn.Module) -> None:
        self.module = module
        self.weights: Weights = list(average.parameters()), list(module.parameters())
        kept = [saved_buffers(average), saved_buffers(module)]
        types = {buffer.dtype for buffer in kept[0]}  # one fused copy takes tensors of one type
        self.buffers = [[[one for one in side if one.dtype == dtype] for side in kept] for dtype in types]

    def left(self, done: set[nn.Parameter]) -> Weights:
        """Return averages and weights, but for those that are done."""
        if not done:
            return self.weights
        pairs = [pair for pair in zip(*self.weights, strict=True) if pair[1] not in done]
        return [average for average, _ in pairs], [weight for _, weight in pairs]


def saved_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers that are part of a module's state; the others are constants."""
    names = module.state_dict().keys()
    return [buffer for name, buffer in module.named_buffers() if name in names]
