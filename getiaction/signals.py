"""Turn signals into requests: what asks a run to stop is heard after the step that is under way."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from tqdm import tqdm

WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""What a cluster sends some time before it takes a machine back."""
STOPPING = (signal.SIGTERM, signal.SIGINT, *WARNINGS)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], int]]:
    """Turn SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C into a request; a second Ctrl-C interrupts.

    Yields a function that returns the signal's number, or 0.
    """
    received: list[int] = []

    def request(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        tqdm.write(f"{signal.Signals(number).name}: saving soon")

    previous = {number: signal.signal(number, request) for number in STOPPING}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
