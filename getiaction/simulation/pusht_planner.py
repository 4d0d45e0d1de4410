"""Plan pushes for PushT: the fastest of all sequences of one or two pushes, judged by where they leave the block.

K contacts, F first pushes. Poses (..., 3) are x, y in pixels and the angle in radians, of the block in the world.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from getiaction.simulation.pusht_geometry import (
    CENTROID,
    GOAL,
    GYRATION2,
    OUTLINE,
    STAND_OFF,
    Walks,
    contacts,
    rotate,
    to_block,
    to_world,
)

WALK_SPEED, PUSH_SPEED = 220.0, 120.0  # pixels per second
WAY_SPEED = 75.0  # pixels per second that plans count on: half of what it makes, so that near contacts win clearly
SWITCH_TIME = 0.5  # seconds that a change of contact costs besides the way
LOYALTY = 0.3  # seconds by which another contact must be better than the one that the agent is walking to
TOUCHING = 6.0  # pixels from a contact within which the agent has arrived
PATIENCE = 0.1  # seconds that a push must save when the block may as well stay
CLOSE = 1.8  # pixels of misfit, a coverage of about 0.96, above which the block may not stay
SHORTEST, LONGEST = 0.7, 250.0  # pixels of one push
LENGTHS = np.array([4.0, 8, 14, 22, 32, 46, 64, 88, 120, 165])  # of the first of two pushes, before refining
BEAM = 48  # pairs of pushes to refine
INSIDE = 4.0, 508.0  # pixels between which the agent's centre stays
MARGIN = 12.0  # pixels that the block should keep from the edge of the world: the walls end at 7
GOAL_CENTROID = to_world(GOAL, CENTROID)


def misfit(pose: np.ndarray) -> np.ndarray:
    """Return the root mean square distance, over the block's area, of poses (..., 3) to the goal, in pixels."""
    offset = to_world(pose, CENTROID) - GOAL_CENTROID
    square = (offset**2).sum(-1) + 2 * GYRATION2 * (1 - np.cos(pose[..., 2] - GOAL[2]))
    return np.sqrt(np.maximum(square, 0.0))


def toll(error: np.ndarray) -> np.ndarray:
    """Return the seconds that it is worth to remove a misfit in pixels: mostly a further push's overhead."""
    return 4.0 * np.minimum(error / 3.0, 1.0) + 3.0 * np.minimum(error / 40.0, 1.0) + 0.05 * error


@dataclass(frozen=True)
class Plan:
    """What to do next: push `length` pixels at `contact` (None: nothing), for `cost` seconds to the goal."""

    contact: int | None
    length: float
    cost: float


class Planner:
    """Find the cheapest one or two pushes from a state."""

    def __init__(self) -> None:
        self.contacts = contacts()
        self.walks = Walks(self.contacts)

    def approach(self, agent: np.ndarray) -> np.ndarray:
        """Say which contacts (K,) the agent (2,), in the block's frame, may simply move to, pushing on the way."""
        offset = agent - self.contacts.centre
        along = (offset * self.contacts.normal).sum(-1)
        aside = np.abs(offset[:, 0] * self.contacts.normal[:, 1] - offset[:, 1] * self.contacts.normal[:, 0])
        return (along < 4) & (along > -40) & (aside < np.maximum(9, -0.5 * along))

    def usable(self, pose: np.ndarray) -> np.ndarray:
        """Say which corners (C,) the agent can reach inside the walls."""
        points = to_world(pose, self.walks.corners)
        return np.all((points > INSIDE[0]) & (points < INSIDE[1]), axis=-1)

    def plan(self, agent: np.ndarray, pose: np.ndarray, *, keep: int | None = None) -> Plan:
        """Return the best plan for the agent (2,) and the block's pose (3,), both in the world.

        `keep` is the contact of the plan before: until the agent is there, another must be better by `LOYALTY` seconds.
        (Where it pushes already, such a bonus is collected by pushing a pixel at each step, for ever.)
        """
        usable, every = self.usable(pose), np.arange(len(self.contacts.turn))
        ways = self._ways(agent, pose, usable)
        away = np.linalg.norm(to_block(pose, agent) - self.contacts.centre, axis=-1) > TOUCHING
        bonus = np.where((every == keep) & away, LOYALTY, 0.0)
        ways = ways - bonus
        length, cost = self._last(pose, every)
        cost = cost + ways
        k = int(np.argmin(cost))
        one = Plan(k, float(length[k]), float(cost[k]))
        change = self.walks.between(usable=usable) / WAY_SPEED + SWITCH_TIME
        best = min(one, self._two(pose, ways, change, one.cost), key=lambda p: p.cost)
        error = misfit(pose)
        if error < CLOSE and toll(error) < best.cost + bonus[best.contact] + PATIENCE:
            return Plan(None, 0.0, float(toll(error)))
        return best

    def _ways(self, agent: np.ndarray, pose: np.ndarray, usable: np.ndarray) -> np.ndarray:
        """Return the seconds (K,) to each contact."""
        local = to_block(pose, agent)
        walk = self.walks.from_agent(local, usable=usable) + STAND_OFF
        straight = np.linalg.norm(local - self.contacts.centre, axis=-1)
        return np.where(self.approach(local), straight / WAY_SPEED, walk / WAY_SPEED + SWITCH_TIME)

    def _two(self, pose: np.ndarray, ways: np.ndarray, change: np.ndarray, bound: float) -> Plan:
        """Return the best two pushes: lengths of the first from a grid, then refined for the best pairs of contacts.

        `change` (K, K) is the seconds from contact to contact.
        """
        reach = ways[:, None] + LENGTHS / PUSH_SPEED
        first, index = np.nonzero(reach < bound)
        first, length, second = first[:, None], LENGTHS[index][:, None], np.arange(len(ways))[None]  # (F, 1), (1, K)
        best = Plan(None, 0.0, np.inf)
        for spread in (0.3, 0.1, 0.03, 0.0):
            if not len(first):
                break
            cost = self._pair_cost(pose, ways, change, first, length, second)
            order = _smallest(cost, BEAM)
            first, length, second = (np.broadcast_to(x, cost.shape).ravel()[order] for x in (first, length, second))
            k = int(np.argmin(cost.ravel()[order]))
            best = min(best, Plan(int(first[k]), float(length[k]), float(cost.ravel()[order][k])), key=lambda p: p.cost)
            first, second = first[:, None], second[:, None]
            length = length[:, None] * (1 + spread * np.linspace(-1, 1, 7))
        return best

    def _pair_cost(
        self,
        pose: np.ndarray,
        ways: np.ndarray,
        change: np.ndarray,
        first: np.ndarray,
        length: np.ndarray,
        second: np.ndarray,
    ) -> np.ndarray:
        """Return the seconds of pushing `length` at `first` and then as well as possible at `second`."""
        after = self._push(pose, first, length)
        cost = ways[first] + length / PUSH_SPEED + self._blocked(pose, after, first) + _crowded(after)
        return cost + change[first, second] + self._last(after, second)[1]

    def _last(self, pose: np.ndarray, contact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the length and the cost of the push that brings poses (..., 3) nearest the goal.

        The pushes turn the poses about fixed points, so the angle of the least misfit is known (Procrustes).
        """
        pivot = to_world(pose, self.contacts.pivot[contact])
        u, w = to_world(pose, CENTROID) - pivot, GOAL_CENTROID - pivot
        left = GOAL[2] - pose[..., 2]
        sine = u[..., 0] * w[..., 1] - u[..., 1] * w[..., 0] + GYRATION2 * np.sin(left)
        cosine = (u * w).sum(-1) + GYRATION2 * np.cos(left)
        length = np.clip(np.arctan2(sine, cosine) / self.contacts.turn[contact], 0.0, LONGEST)
        after = self._push(pose, contact, length)
        cost = length / PUSH_SPEED + toll(misfit(after)) + self._blocked(pose, after, contact)
        return length, np.where(length < SHORTEST, np.inf, cost)

    def _push(self, pose: np.ndarray, contact: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Return the poses (..., 3) after pushes of lengths (...) at contacts (...)."""
        angle = length * self.contacts.turn[contact]
        pivot = to_world(pose, self.contacts.pivot[contact])
        place = pivot + rotate(angle, pose[..., :2] - pivot)
        return np.concatenate([place, (pose[..., 2] + angle)[..., None]], -1)

    def _blocked(self, before: np.ndarray, after: np.ndarray, contact: np.ndarray) -> np.ndarray:
        """Return infinity where the agent would have to leave the walls, else 0."""
        inside = np.array(True)
        for pose in (before, after):
            place = to_world(pose, self.contacts.centre[contact])
            inside = inside & ((place > INSIDE[0]) & (place < INSIDE[1])).all(-1)
        return np.where(inside, 0.0, np.inf)


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the flat indices, in order, of about the `count` smallest values."""
    count = min(count, values.size)
    return np.flatnonzero(values <= np.partition(values, count - 1, axis=None)[count - 1])[:count]


def _crowded(pose: np.ndarray) -> np.ndarray:
    """Return a cost in seconds for how far poses (..., 3) put the block into a wall."""
    place = to_world(pose[..., None, :], OUTLINE)
    return 0.1 * np.maximum(np.abs(place - 256.0) - (256.0 - MARGIN), 0.0).max((-2, -1))
