"""Start PushT in the middle of the task: the agent at the block, which is anywhere, or nearly at its goal already.

gym-pusht's own starts put the agent far from the block. Who has learned from those alone has seen few of the places
where its first mistakes bring it.
"""

from __future__ import annotations

import numpy as np

from getiaction.simulation.pusht_geometry import (
    AGENT_RADIUS,
    CENTRE_OF_GRAVITY,
    GOAL,
    OUTLINE,
    block_distance,
    to_block,
    to_world,
)

NEARLY_THERE = 0.4  # share of the starts with the block near its goal
SPREAD = 80.0, 80.0, 1.0  # standard deviation of x, y (pixels) and angle (radians) around the goal, times up to 1.2
BLOCK_INSIDE, AGENT_INSIDE = (15.0, 497.0), (20.0, 492.0)  # pixels between which all corners, and the agent, are
REACH = 70.0  # pixels, at most, from the agent's centre to the block


def draw_midway(rng: np.random.Generator) -> list[float]:
    """Draw a start: agent x, y, block x, y (pixels), angle (radians)."""
    nearly_there = rng.random() < NEARLY_THERE
    while True:
        if nearly_there:
            pose = GOAL + rng.normal(size=3) * SPREAD * rng.uniform(0.05, 1.2)
        else:
            pose = np.array([*rng.uniform(0.0, 512.0, 2), rng.uniform(-np.pi, np.pi)])
        corners = to_world(pose, OUTLINE)
        agent = rng.uniform(corners.min(0) - REACH, corners.max(0) + REACH)
        apart = AGENT_RADIUS < block_distance(to_block(pose, agent)) < REACH
        if apart and _inside(corners, BLOCK_INSIDE) and _inside(agent, AGENT_INSIDE):
            return [*agent.tolist(), *pose.tolist()]


def as_reset_state(start: list[float]) -> list[float]:
    """Return what gym-pusht's `reset_to_state` must be given to bring about a start, five numbers as in `draw_midway`.

    It puts the block, not turned, at the place that it is given, and then turns it about its centre of gravity.
    """
    place = to_world(np.array(start[2:]), CENTRE_OF_GRAVITY) - CENTRE_OF_GRAVITY
    return [*start[:2], *place.tolist(), start[4]]


def _inside(points: np.ndarray, limits: tuple[float, float]) -> bool:
    return bool(((points > limits[0]) & (points < limits[1])).all())
