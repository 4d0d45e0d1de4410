"""Intervals have the values of textbooks, and come out the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from getiaction.simulation.environment import Step
from getiaction.simulation.metrics import Estimate, bootstrap, summarize, wilson
from getiaction.simulation.rollout import Episode, finished


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (32, 50, 0.5014, 0.7586),
    ],
)
def test_success_rates_have_wilsons_interval(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count).mean == successes / count
    assert (wilson(successes, count).low, wilson(successes, count).high) == pytest.approx((low, high), abs=6e-5)
    opposite = wilson(count - successes, count)
    assert (1 - opposite.high, 1 - opposite.low) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("count", [1, 10, 500])
def test_no_success_and_nothing_else_stay_within_bounds(count: int) -> None:
    bound = 1.959963984540054**2
    assert wilson(0, count) == Estimate(0.0, 0.0, pytest.approx(bound / (count + bound)))
    assert wilson(count, count) == Estimate(1.0, pytest.approx(count / (count + bound)), 1.0)


def test_the_bootstrap_is_near_the_normal_interval_and_repeats() -> None:
    values = np.random.default_rng(1).beta(5, 1, size=400)
    estimate = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate == bootstrap(list(values))
    assert estimate.mean == values.mean()
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_bootstrap_covers() -> None:
    draw = np.random.default_rng(2)
    found = [bootstrap(draw.uniform(size=50)) for _ in range(12)]
    assert sum(estimate.low <= 0.5 <= estimate.high for estimate in found) >= 9
    widths = np.array([estimate.high - estimate.low for estimate in found])
    np.testing.assert_allclose(widths, 2 * 1.96 * np.sqrt(1 / 12 / 50), rtol=0.3)


def test_one_episode_has_an_interval_of_no_width() -> None:
    assert bootstrap([0.3]) == Estimate(0.3, 0.3, 0.3)


def episode(seed: int, *coverages: float) -> Episode:
    steps = [Step(min(value / 0.95, 1.0), value > 0.95, {"coverage": value}) for value in coverages]
    return finished(seed, steps, [np.zeros(2)] * len(steps))


def test_episodes_are_summed_up_by_their_best_and_their_last_step() -> None:
    episodes = [episode(0, 0.1, 0.76, 0.38), episode(1, 0.2, 0.96), episode(2, 0.0)]
    summary = summarize(episodes)
    assert summary.episodes == 3
    assert summary.score.mean == pytest.approx((0.8 + 1.0 + 0.0) / 3)
    assert summary.success == wilson(1, 3)
    assert summary.length.mean == 2
    assert summary.largest["coverage"].mean == pytest.approx((0.76 + 0.96) / 3)
    assert summary.final["coverage"].mean == pytest.approx((0.38 + 0.96) / 3)
    assert str(wilson(8, 10)) == "0.800 [0.490, 0.943]"
