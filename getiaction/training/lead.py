"""Let the host be a few steps ahead of the device, and no more."""

from __future__ import annotations

from collections import deque

import torch

STEPS = 4  # enough that the device never waits for the host


class Lead:
    """Know which of the last steps a GPU has come to the end of; on a CPU nobody is ahead.

    What a step was given stays in the device's memory until then: batches that were gathered ahead, say.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = device.type == "cuda" and torch.cuda.is_available()
        self._ends: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        """Wait, after a step was launched, until the device is at most STEPS behind."""
        if not self._counts:
            return
        end = torch.cuda.Event(blocking=True)  # others need the processor
        end.record()
        self._ends.append(end)
        if len(self._ends) > STEPS:
            self._ends.popleft().synchronize()
