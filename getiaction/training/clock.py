"""Tell training from what interrupts it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Clock:
    """Time training, apart from validation and saving; and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self.begin, self.waited = time.perf_counter(), 0.0

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass `batches` through, counting the time that each takes to come."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def lap(self) -> tuple[float, float]:
        """Return (seconds, seconds waited for data) since the last lap."""
        now = time.perf_counter()
        seconds, waited = now - self.begin, self.waited
        self.begin, self.waited = now, 0.0
        return seconds, waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the lap."""
        start = time.perf_counter()
        yield
        self.begin += time.perf_counter() - start


def is_due(step: int, every: int | None) -> bool:
    """Tell whether something that happens `every` so many steps happens now; None is never."""
    return every is not None and step % every == 0
