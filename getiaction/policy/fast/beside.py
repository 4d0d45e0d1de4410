"""Launch on streams of their own what the rest of a backward pass does not wait for: the weights' gradients, updates.

A backward pass goes from layer to layer by the gradients of what lies between them. Those of the weights are of no use
to it, but are half of its work; small kernels leave a large GPU room for both. Nor do gradients wait for the updates of
other weights, which take long and may come last.

Autograd does not know of the other stream, so it must do nothing but hand such gradients over: each weight's comes from
one place (`come_from_one_place`), is that of a leaf (`are_leaves`), and lies as the weight does (`lay_as`).

PyTorch's own gradients of weights under autocast are products in two bytes, which it then copies into four. Who only
reads them once may take them as they are (see `Beside.narrow`); others get `fused.py`'s in four, not rounded before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MOST = 2**30  # bytes that are kept for kernels that may not have begun


class Beside:
    """Launch kernels beside those of a device's current stream; on a CPU, where there are none, in turn.

    Args:
        narrow: who reads the weights' gradients takes them in the type that they were multiplied in, autocast's.
    """

    def __init__(self, device: torch.device, *, narrow: bool = False) -> None:
        self.device, self.narrow = device, narrow
        # of lower priority than `Replay`, whose kernels others wait for, and the second than the first
        self._streams = (
            [torch.cuda.Stream(device, priority=number) for number in (-1, 0)] if device.type == "cuda" else []
        )
        self._ahead: set[int] = set()  # which of them have something that nobody waits for yet
        self._read: list[Tensor] = []
        self._bytes = 0

    @contextlib.contextmanager
    def launching(self, *read: Tensor) -> Iterator[None]:
        """Launch what comes after everything that was launched before.

        Args:
            read: what it reads and somebody may let go of, whose memory would be another's at once.
        """
        with self._launching_on(0):
            yield
        self._read += read
        self._bytes += sum(one.nbytes for one in read)
        if self._bytes > MOST:
            self._catch_up(0)
            self._let_go()

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Launch what comes after everything that was launched before, and what only `join` waits for."""
        return self._launching_on(1)

    def join(self) -> None:
        """Let the current stream wait for all that; for nothing, if there was none: a capture would be refused."""
        try:
            for number in range(len(self._streams)):
                self._catch_up(number)
        finally:
            self._ahead.clear()
            self._let_go()

    @contextlib.contextmanager
    def _launching_on(self, number: int) -> Iterator[None]:
        if not self._streams:
            yield
            return
        own = self._streams[number]
        own.wait_stream(torch.cuda.current_stream(self.device))
        for before in self._ahead & {*range(number)}:
            own.wait_stream(self._streams[before])
        self._ahead.add(number)
        with torch.cuda.stream(own):
            yield

    def _catch_up(self, number: int) -> None:
        if number in self._ahead:
            self._ahead.remove(number)
            torch.cuda.current_stream(self.device).wait_stream(self._streams[number])

    def _let_go(self) -> None:
        self._read.clear()
        self._bytes = 0


_HERE: list[Beside] = []  # autograd calls backward passes from threads of its own


@contextlib.contextmanager
def using(own: Beside) -> Iterator[None]:
    """Let `beside` launch by `own`, during one backward pass whose gradients nobody reads before its end."""
    _HERE.append(own)
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error is the one to tell of
            own.join()
        raise
    finally:
        _HERE.remove(own)
    own.join()


@contextlib.contextmanager
def beside(only_leaves: bool, *read: Tensor) -> Iterator[bool]:
    """Launch, in a backward pass, what computes the gradients of weights; see `Beside.launching`.

    Args:
        only_leaves: whether those are where autograd ends, so that nothing is computed from their gradients.

    Returns:
        Whether they may stay in the type that they were multiplied in, instead of becoming the weights'.
    """
    with contextlib.ExitStack() as stack:
        narrow = False
        if only_leaves and _HERE and _HERE[-1].device == read[0].device:
            stack.enter_context(_HERE[-1].launching(*read))
            narrow = _HERE[-1].narrow
        yield narrow


def are_leaves(*weights: Tensor | None) -> bool:
    """Tell whether autograd ends at all of them: a weight that is computed from another does not."""
    whole = torch.ops.aten.is_non_overlapping_and_dense
    return all(weight is None or (weight.is_leaf and whole(weight)) for weight in weights)


def lay_as(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the gradient of a weight as the weight lies, or autograd would copy it."""
    if gradient.stride() == strides:
        return gradient
    return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def come_from_one_place(loss: Tensor) -> bool:
    """Tell whether no weight's gradient is a sum that autograd adds up, as where a weight is used twice."""
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn] if loss.grad_fn is not None else []
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node is None:
                continue
            is_end = hasattr(node, "variable")
            if is_end and node in seen:
                return False
            if node not in seen:
                seen.add(node)
                ahead.append(node)
    return True
