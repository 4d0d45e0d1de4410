"""Bring a checkpoint to the disk while training goes on: it is copied to the host at once, and written by a thread."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import Any

from torch import Tensor, nn

from getiaction.machine import available_memory
from getiaction.training.checkpoint import TrainingState

SPARE = 2  # times what is saved: the copy, and half of it again, which writing copies


class Background:
    """Run one call at a time in a thread. What it raises comes out of the next method, or at the end of the context."""

    def __init__(self) -> None:
        self._running: Future[Any] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        while self._running is not None:
            with contextlib.suppress(KeyboardInterrupt):  # who holds the folder lets go of it after this
                self.wait()

    def start(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Wait for the call before, then begin this one."""
        self.wait()
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._running = thread.submit(work, *arguments)
        thread.shutdown(wait=False)  # it ends after this call

    def wait(self) -> None:
        """Come back when nothing runs any more."""
        if self._running is not None:
            wait([self._running])
            self.check()

    def check(self) -> None:
        """Raise what the call raised, if it has ended."""
        if self._running is not None and self._running.done():
            running, self._running = self._running, None
            running.result()


def has_room(policy: nn.Module, state: TrainingState) -> bool:
    """Tell whether the host's memory has room for copies of them."""
    size = sum(tensor.nbytes for tensor in chain(policy.parameters(), policy.buffers(), tensors_of(state)))
    return SPARE * size < available_memory()


def policy_on_host(policy: nn.Module) -> nn.Module:
    """Return a copy of a policy whose weights and buffers are the host's own; the device needs no memory for it."""
    weights = {id(weight): nn.Parameter(on_host(weight), weight.requires_grad) for weight in policy.parameters()}
    copied = copy.deepcopy(policy, weights | copies(policy.buffers()))
    for name in ("forward", "_original_forward"):  # Accelerate's, methods of the copy: a circle that would outlive it
        copied.__dict__.pop(name, None)
    return copied


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
