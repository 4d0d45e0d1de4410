"""Bring a checkpoint to the disk while training goes on: it is copied to the host at once, and written by a thread."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import psutil
from torch import Tensor, nn

from getiaction.training.checkpoint import TrainingState

SPARE = 2  # times the copy that the host must have room for: data and metrics go on growing


class Background:
    """Run one call at a time in a thread. What it raises comes out of the next `start` or `wait`, or of the context."""

    def __init__(self) -> None:
        self._running: Future[Any] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def start(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Wait for the call before, then begin this one."""
        self.wait()
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._running = thread.submit(work, *arguments)
        thread.shutdown(wait=False)  # it ends after this call

    def wait(self) -> None:
        """Come back when nothing runs any more."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def has_room(policy: nn.Module, state: TrainingState) -> bool:
    """Tell whether the host's memory has room for copies of them."""
    size = sum(tensor.nbytes for tensor in chain(policy.parameters(), policy.buffers(), tensors_of(state)))
    return SPARE * size < psutil.virtual_memory().available


def policy_on_host(policy: nn.Module) -> nn.Module:
    """Return a copy of a policy whose weights and buffers are the host's own; the device needs no memory for it."""
    weights = {id(weight): nn.Parameter(on_host(weight), weight.requires_grad) for weight in policy.parameters()}
    return copy.deepcopy(policy, weights | copies(policy.buffers()))


def state_on_host(state: TrainingState) -> TrainingState:
    """Return a copy of a training state whose tensors are the host's own."""
    return copy.deepcopy(state, copies(tensors_of(state)))


def tensors_of(state: TrainingState) -> list[Tensor]:
    """Return the weights and the optimiser's tensors."""
    kept = chain.from_iterable(entry.values() for entry in state.optimizer["state"].values())
    return [*state.weights.values(), *(value for value in kept if isinstance(value, Tensor))]


def copies(tensors: Iterable[Tensor]) -> dict[int, Any]:
    """Return the memo that makes `copy.deepcopy` take copies on the host for these tensors."""
    return {id(tensor): on_host(tensor) for tensor in tensors}


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory, in the same memory order."""
    return tensor.detach().to("cpu", copy=True)
