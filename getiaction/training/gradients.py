"""Compute the loss and the gradients of a step: operation by operation, or by replaying a CUDA graph of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from getiaction.data.gather import Batch
from getiaction.policy.replay import Replay


@dataclass(frozen=True)
class Part:
    """Hold what this process makes of one micro-batch.

    Args:
        batch: as `DiffusionPolicy.forward` takes it.
        noise: (B K, T, Da).
        timesteps: (B K,).
    """

    batch: Batch
    noise: Tensor
    timesteps: Tensor

    def flat(self) -> list[Tensor]:
        """Return all tensors, the batch's first."""
        return [*self.batch.values(), self.noise, self.timesteps]


class Gradients:
    """Leave the gradients of a step's loss in a model's weights, clipped.

    Args:
        model: as Accelerate prepared it.
        max_norm: where to clip, or None.
        replays: do it as a CUDA graph from the third step on, with the same sums. Needs a GPU of its own for each
            process and no gradient scaler. The gradients then lie in the same place at every step.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, max_norm: float | None, *, replays: bool) -> None:
        self.accelerator, self.model, self.max_norm, self.replays = accelerator, model, max_norm, replays
        self._replay: Replay | None = None
        self._kept: list[Tensor | None] = []  # the gradients, where a graph leaves them

    def __call__(self, parts: list[Part], weights: list[float]) -> Tensor:
        """Return the loss, ().

        Args:
            weights: of the micro-batches in their mean.
        """
        if not self.replays or set(weights) != {1.0}:  # others change from step to step
            return self._compute(parts, weights)
        if self._replay is None:
            keys, count = list(parts[0].batch), len(parts)

            def compute(*flat: Tensor) -> Tensor:
                each = len(flat) // count
                rows = [flat[first : first + each] for first in range(0, len(flat), each)]
                regrouped = [Part(dict(zip(keys, row[:-2], strict=True)), row[-2], row[-1]) for row in rows]
                return self._compute(regrouped, [1.0] * count)

            self._replay = Replay(compute)
        loss = self._replay(*(tensor for part in parts for tensor in part.flat()))
        if self._replay.captured:
            self._kept = self._kept or [weight.grad for weight in self.model.parameters()]
            for weight, gradient in zip(self.model.parameters(), self._kept, strict=True):
                weight.grad = gradient
        return loss

    def _compute(self, parts: list[Part], weights: list[float]) -> Tensor:
        total: Tensor | None = None
        self.model.zero_grad(set_to_none=True)
        for part, weight in zip(parts, weights, strict=True):
            is_last = part is parts[-1]
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss = self.model(part.batch, part.noise, part.timesteps) * (weight / len(parts))
                self.accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        if self.max_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        assert total is not None
        return total


def can_replay(accelerator: Accelerator) -> bool:
    """Tell whether a step's gradients can be a CUDA graph: on one GPU, without a scaler, which looks at them."""
    alone = accelerator.num_processes == 1 and accelerator.scaler is None
    return alone and accelerator.device.type == "cuda" and torch.cuda.is_available()
