"""Let several processes train and evaluate as one, and end where one of them hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import time
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from getiaction.simulation.evaluation import Team

EASE = 1.0  # seconds between two settings of the alarm
STDERR = 2  # the descriptor: `sys.stderr` may be anything


def from_main[Value](value: Value) -> Value:
    """Return the main process's value."""
    return broadcast_object_list([value])[0]


def share_buffers(module: nn.Module) -> None:
    """Take the main process's buffers: each has its own running statistics of batch norm."""
    if PartialState().num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


class Ranks(Team):
    """Share the episodes of an evaluation among the processes of a run."""

    def __init__(self) -> None:
        state = PartialState()
        super().__init__(state.process_index, state.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def broadcast[Value](self, value: Value) -> Value:
        """Return rank 0's value."""
        return from_main(value)

    def gather[Value](self, value: Value) -> list[Value]:
        """Return every rank's value, by rank."""
        return gather_object([value])


class Watchdog:
    """End this process, with the traceback of every thread, when it does not come by for too long.

    Processes that train together wait for each other: when one hangs, all do, without a word. The alarm is the C
    library's of `faulthandler`, which also rings while Python itself is stuck.

    Args:
        limit: seconds; None never ends anything.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit, self.set_at = limit, -EASE

    def come_by(self) -> None:
        """Set the alarm anew."""
        now = time.monotonic()
        if self.limit is not None and now - self.set_at >= min(EASE, self.limit / 2):
            self.set_at = now
            faulthandler.dump_traceback_later(self.limit, exit=True, file=STDERR)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what happens inside."""
        self.come_by()
        try:
            yield
        finally:
            if self.limit is not None:
                faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Look away from what takes as long as it takes."""
        if self.limit is not None:
            faulthandler.cancel_dump_traceback_later()
        yield
        self.set_at = -EASE
        self.come_by()
