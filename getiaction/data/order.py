"""Decide in which order samples are seen: the same for any number of processes, and from any step on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from getiaction.random import Purpose, generator


@dataclass(frozen=True)
class Order:
    """Decide which samples each step sees: shuffled epochs, one after the other, cut into global batches.

    A batch may reach over the end of an epoch into the next, so every epoch shows each sample exactly once and every
    batch has the same size. With weights an epoch is still M samples long, but each source has its share of them, and
    goes through its own samples at its own pace: none is seen again before all others of its source were.

    Args:
        num_samples: M.
        batch_size: the global batch: per-device batch x processes x accumulation.
        seed: of the run.
        sizes: the samples of each source, which lie one source after the other; they add up to M.
        weights: how often each source is seen, in relation to the others; empty: as its size says.
    """

    num_samples: int
    batch_size: int
    seed: int
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def ids(self, step: int) -> np.ndarray:
        """Return the (batch_size,) samples of a step, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, self.num_samples)
        return np.concatenate([self.epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    @property
    def shares(self) -> np.ndarray:
        """Return the share of each source in what is seen."""
        parts = np.array(self.weights or self.sizes, dtype=float)
        return parts / parts.sum()

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the (M,) samples of an epoch, in order."""
        if not self.weights:
            return shuffled(self.num_samples, self.seed, epoch)
        return mixed(self.sizes, share_out(self.num_samples, self.weights), self.seed, epoch)


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, *counters: int) -> np.ndarray:
    """Return a permutation of `count`; the counters are an epoch, or a pass and its source."""
    return torch.randperm(count, generator=generator(seed, Purpose.ORDER, *counters)).numpy()


@lru_cache(maxsize=4)
def mixed(sizes: tuple[int, ...], quotas: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch that shows `quotas` samples of each source, where its last epoch left off."""
    parts = []
    for source, (size, quota) in enumerate(zip(sizes, quotas, strict=True)):
        passes, places = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), size)
        order = [shuffled(size, seed, int(p), source + 1)[places[passes == p]] for p in np.unique(passes)]
        parts.append(sum(sizes[:source]) + np.concatenate(order))
    return np.concatenate(parts)[shuffled(sum(quotas), seed, epoch)]


def share_out(count: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """Share `count` out by weights, by the largest remainder; nobody goes away empty-handed."""
    exact = count * np.array(weights) / sum(weights)
    shares = np.maximum(np.floor(exact).astype(int), 1)
    while (rest := count - int(shares.sum())) != 0:
        shares[np.argmax(exact - shares) if rest > 0 else np.argmax(shares)] += np.sign(rest)
    return tuple(shares.tolist())
