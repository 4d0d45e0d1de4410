"""Take an optimiser step: operation by operation, or by replaying a CUDA graph of it."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from getiaction.data.gather import Batch
from getiaction.policy.fast.casts import shadows_of
from getiaction.policy.fast.replay import Replay
from getiaction.policy.fast.watch import has_hooks, is_watched
from getiaction.training.stepper import Stepper

log = logging.getLogger(__name__)


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


class Update:
    """Compute a step's loss and gradients, clip them, and let the optimiser update the weights.

    Args:
        model: as Accelerate prepared it.
        optimizer: the same.
        max_norm: where to clip, or None.
        replays: do it as a CUDA graph from the third step on, with the same sums; needs what `can_replay` asks for. A
            fused Adam or AdamW is part of the graph; other optimisers step outside.
        stepper: updates weights while gradients still come, where steps are replayed and nothing is done to all
            gradients before.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        max_norm: float | None,
        *,
        replays: bool,
        stepper: Stepper | None = None,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.max_norm, self.replays = max_norm, replays
        self.stepper = stepper if replays and max_norm is None and accelerator.scaler is None else None
        self.replay: Replay | None = None
        self._rates = Rates(optimizer.optimizer, accelerator.device) if replays else None
        self._gradients: list[Tensor | None] = []  # where a graph leaves them

    def forget(self) -> None:
        """Let go of the graph: weights, or the optimiser's moments, lie elsewhere from now on."""
        self.replay, self._gradients = None, []

    def __call__(self, parts: list[Part], weights: list[float]) -> Tensor:
        """Return the loss, ().

        Args:
            weights: of the micro-batches in their mean.
        """
        if self.replay is None and self.replays:
            self.replays = not is_listened_to(self.model)
            if not self.replays:
                log.warning(
                    "warning: a hook, or a replaced forward, keeps steps from being CUDA graphs: they are slower"
                )
        if not self.replays or set(weights) != {1.0}:  # others change from step to step
            loss = self._compute(parts, weights)
            self.optimizer.step()
        else:
            loss = self._replay(parts)
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _replay(self, parts: list[Part]) -> Tensor:
        rates = self._rates
        assert rates is not None
        whole = rates.fit
        if self.replay is None:
            keys, count, here = list(parts[0].batch), len(parts), weakref.proxy(self)

            def compute(*flat: Tensor) -> Tensor:
                each = len(flat) // count
                rows = [flat[first : first + each] for first in range(0, len(flat), each)]
                regrouped = [Part(dict(zip(keys, row[:-2], strict=True)), row[-2], row[-1]) for row in rows]
                if not whole:
                    return here._compute(regrouped, [1.0] * count)
                with rates.as_a_graph_reads_them(on_device=torch.cuda.is_current_stream_capturing()):
                    loss = here._compute(regrouped, [1.0] * count)
                    here.optimizer.step()
                return loss

            self.replay = Replay(compute, parts[0].noise.device)
        if whole:
            rates.take_over()
        if self.replay.captured and (shadows := shadows_of(self.model)) is not None:
            shadows.bring_up_to_date()  # the graph takes for granted that nobody but itself changes weights
        loss = self.replay(*(tensor for part in parts for tensor in part.flat()))
        if not whole:
            if self.replay.captured:
                self._gradients = self._gradients or [weight.grad for weight in self.model.parameters()]
                for weight, gradient in zip(self.model.parameters(), self._gradients, strict=True):
                    weight.grad = gradient
            self.optimizer.step()
        return loss

    def _compute(self, parts: list[Part], weights: list[float]) -> Tensor:
        total: Tensor | None = None
        self.model.zero_grad(set_to_none=True)
        for part, weight in zip(parts, weights, strict=True):
            is_last = part is parts[-1]
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss = self.model(part.batch, part.noise, part.timesteps) * (weight / len(parts))
                with self._ahead(loss) if len(parts) == 1 else contextlib.nullcontext():
                    self.accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        if self.max_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        assert total is not None
        return total

    def _ahead(self, loss: Tensor) -> contextlib.AbstractContextManager[None]:
        """Let weights learn during the backward pass of a loss, in steps that are or will be replayed as a whole."""
        whole = self.replays and self._rates is not None and self._rates.fit
        if self.stepper is None or not whole or (self.replay is not None and self.replay.refused):
            return contextlib.nullcontext()
        return self.stepper.ahead(loss)


class Rates:
    """Keep an optimiser's learning rates on the device, where a CUDA graph reads them."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer  # whose groups are others after a resume
        self._held = [float("nan")] * len(optimizer.param_groups)
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    @property
    def fit(self) -> bool:
        """Tell whether the optimiser can read them there."""
        return isinstance(self._optimizer, Adam | AdamW) and all(
            group.get("fused") for group in self._optimizer.param_groups
        )

    def take_over(self) -> None:
        """Bring the rates that a schedule has set to the device."""
        for number, (group, rate) in enumerate(zip(self._optimizer.param_groups, self._rates, strict=True)):
            if self._held[number] != group["lr"]:
                rate.fill_(group["lr"])
                self._held[number] = group["lr"]

    @contextlib.contextmanager
    def as_a_graph_reads_them(self, *, on_device: bool) -> Iterator[None]:
        """Let the optimiser read them on the device, or at least as numbers of float32, as those are."""
        groups = self._optimizer.param_groups
        before = [(group["lr"], group.get("capturable", False)) for group in groups]
        for group, rate, (number, capturable) in zip(groups, self._rates, before, strict=True):
            group.update(lr=rate if on_device else float(np.float32(number)), capturable=on_device or capturable)
        try:
            yield
        finally:
            for group, (number, capturable) in zip(groups, before, strict=True):
                group.update(lr=number, capturable=capturable)


def is_listened_to(model: nn.Module) -> bool:
    """Tell whether somebody listens to a layer, or replaced its `forward`; Accelerate, which casts, does not count."""
    outer, *layers = model.modules()
    own = getattr(vars(outer).get("_original_forward"), "__func__", None)
    casts = own is type(outer).forward and isinstance(getattr(outer.forward, "__wrapped__", None), ConvertOutputsToFp32)
    return is_watched(*layers) or (has_hooks(outer) if casts else is_watched(outer))


def can_replay(accelerator: Accelerator) -> bool:
    """Tell whether a step can be a CUDA graph: on one GPU, without a gradient scaler, which may leave a step out."""
    alone = accelerator.num_processes == 1 and accelerator.scaler is None
    return alone and accelerator.device.type == "cuda" and torch.cuda.is_available()
