"""Turn episodes into numbers that can be quoted: means with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from getiaction.simulation.rollout import Episode

Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """Hold a mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, count: int) -> Estimate:
    """Return a success rate with Wilson's 95% score interval (Wilson 1927, JASA 22:209)."""
    rate, z2 = successes / count, Z95**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    # where all or none succeeded a bound is the rate itself, which rounding must not miss
    return Estimate(rate, max(min(centre - half, rate), 0.0), min(max(centre + half, rate), 1.0))


def bootstrap(values: Sequence[float]) -> Estimate:
    """Return a mean with its percentile-bootstrap 95% interval; the resamples are the same each time."""
    array = np.asarray(values, np.float64)
    draw = np.random.default_rng(0)
    means = [array[draw.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high))


@dataclass(frozen=True)
class Summary:
    """Hold what a set of episodes says of a policy.

    Args:
        score: mean over episodes of the largest reward (PushT's A).
        success: share of episodes that succeeded (PushT's B).
        length: mean control steps of an episode.
        largest: mean of each measure's largest value, `coverage` for PushT.
        final: mean of each measure's last value.
    """

    episodes: int
    score: Estimate
    success: Estimate
    length: Estimate
    largest: dict[str, Estimate]
    final: dict[str, Estimate]


def summarize(episodes: Sequence[Episode]) -> Summary:
    """Sum up at least one episode."""
    names = list(episodes[0].largest)
    return Summary(
        episodes=len(episodes),
        score=bootstrap([episode.score for episode in episodes]),
        success=wilson(sum(episode.success for episode in episodes), len(episodes)),
        length=bootstrap([episode.length for episode in episodes]),
        largest={name: bootstrap([episode.largest[name] for episode in episodes]) for name in names},
        final={name: bootstrap([episode.final[name] for episode in episodes]) for name in names},
    )
