"""Derive every random number from (seed, purpose, counter).

Nothing draws from a shared stream, so what step s sees does not depend on what ran before it: an interrupted run
resumes exactly with no generator state to save, and the number of processes changes nothing.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Name each use of randomness; the numbers are part of what makes a run repeatable."""

    WEIGHTS = 0
    ORDER = 1
    CROP = 2
    NOISE = 3
    VALIDATION = 4
    SPLIT = 5
    ROLLOUT = 6
    DEMONSTRATION = 7
    MIRROR = 8
    OBSERVATION = 9


def derive_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """Return a 63-bit seed for one purpose and its counters (NumPy's SeedSequence mixes them)."""
    entropy = [seed, int(purpose), *(counters or (0,))]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, purpose: Purpose, *counters: int) -> torch.Generator:
    """Return a fresh CPU generator for one purpose and its counters."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *counters))
