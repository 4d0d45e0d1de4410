"""Geometry of PushT in the block's frame: where to push, what a push does, how far to walk around the block.

The block is a T: a 120 x 30 bar (y from 0 to 30) on a 30 x 90 stem (y from 30 to 120). gym-pusht sets no friction and
a damping of 0, so the block moves only while it is pushed, along the contact's normal: a push at a fixed contact turns
the block about a fixed point. Lengths are pixels, angles radians. K contacts, C corners to walk around.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AGENT_RADIUS = 15.0
GOAL = np.array([256.0, 256.0, np.pi / 4])  # the goal pose of gym-pusht: x, y, angle
CENTRE_OF_GRAVITY = np.array([0.0, 45.0])
INERTIA = 3000.0  # per unit mass: gym-pusht gives both rectangles the bar's inertia
CENTROID = np.array([0.0, 285.0 / 7.0])  # of the T's area
GYRATION2 = (3600 * (1275 + (CENTROID[1] - 15) ** 2) + 2700 * (750 + (CENTROID[1] - 75) ** 2)) / 6300
OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (-60, 30), (15, 120), (-15, 120)], float)  # its outer corners
# Who imitates this misses by 10 pixels or more at first: with clearances of 3 and 8 it bumps into the block on its way.
STAND_OFF = 12.0  # clearance between agent and block while walking to a contact
CORNER_OFF = 22.0  # clearance at the corners that the agent walks around


def rotate(angle: np.ndarray | float, points: np.ndarray) -> np.ndarray:
    """Turn points (..., 2) by angles (...)."""
    c, s = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([c * x - s * y, s * x + c * y], -1)


def to_world(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Move points (..., 2) of the block's frame to the world; poses (..., 3) are x, y, angle."""
    return pose[..., :2] + rotate(pose[..., 2], points)


def to_block(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Move points (..., 2) of the world to the block's frame."""
    return rotate(-pose[..., 2], points - pose[..., :2])


def block_distance(points: np.ndarray) -> np.ndarray:
    """Return the distances (...) of points (..., 2) of the block's frame to the block, 0 inside it."""
    boxes = np.array([[(-60.0, 0.0), (60.0, 30.0)], [(-15.0, 30.0), (15.0, 120.0)]])
    low, high = boxes[:, 0], boxes[:, 1]  # (2, 2)
    outside = np.maximum(np.maximum(low - points[..., None, :], points[..., None, :] - high), 0.0)  # (..., 2, 2)
    return np.linalg.norm(outside, axis=-1).min(-1)


@dataclass(frozen=True)
class Contacts:
    """Places to push at, each with the motion that it gives the block.

    Attributes:
        centre: (K, 2) the agent's centre in contact.
        normal: (K, 2) the direction of the push, into the block.
        stand: (K, 2) the agent's centre about `STAND_OFF` before contact.
        pivot: (K, 2) the point about which the block turns.
        turn: (K,) radians per pixel of push.
    """

    centre: np.ndarray
    normal: np.ndarray
    stand: np.ndarray
    pivot: np.ndarray
    turn: np.ndarray


EDGES = (  # start and end of an edge's usable part, and the normal into the block
    ((-56, 0), (56, 0), (0, 1)),
    ((60, 4), (60, 26), (-1, 0)),
    ((-60, 4), (-60, 26), (1, 0)),
    ((34, 30), (56, 30), (0, -1)),
    ((-34, 30), (-56, 30), (0, -1)),
    ((15, 49), (15, 116), (-1, 0)),
    ((-15, 49), (-15, 116), (1, 0)),
    ((-11, 120), (11, 120), (0, -1)),
)


def contacts(*, spacing: float = 6.5) -> Contacts:
    """Return contacts about `spacing` pixels apart on all eight edges, away from the corners."""
    points, normals = [], []
    for start, end, normal in EDGES:
        count = 1 + round(float(np.linalg.norm(np.subtract(end, start))) / spacing)
        points.append(np.linspace(start, end, count))
        normals.append(np.tile(np.array(normal, float), (count, 1)))
    point, n = np.concatenate(points), np.concatenate(normals)
    r = point - CENTRE_OF_GRAVITY
    arm = r[:, 0] * n[:, 1] - r[:, 1] * n[:, 0]
    arm = np.where(np.abs(arm) < 1e-3, 1e-3, arm)  # a pure translation turns about a very far point
    pivot = CENTRE_OF_GRAVITY + np.stack([-n[:, 1], n[:, 0]], -1) * (INERTIA / arm)[:, None]
    centre = point - AGENT_RADIUS * n
    stand = np.array([step_back(place) for place in centre - STAND_OFF * n])  # in the inner corners, off the other edge
    return Contacts(centre, n, stand, pivot, arm / (INERTIA + arm**2))


def is_free(a: np.ndarray, b: np.ndarray, *, clearance: float) -> np.ndarray:
    """Say which segments from a (..., 2) to b (..., 2) keep the agent's centre clear of the block (square corners)."""
    grow = AGENT_RADIUS + clearance
    free = np.ones(np.broadcast_shapes(a.shape, b.shape)[:-1], bool)
    delta = b - a
    delta = np.where(np.abs(delta) < 1e-9, 1e-9, delta)
    for low, high in (((-60, 0), (60, 30)), ((-15, 30), (15, 120))):
        t0, t1 = (np.array(low) - grow - a) / delta, (np.array(high) + grow - a) / delta
        enter = np.minimum(t0, t1).max(-1)
        leave = np.maximum(t0, t1).min(-1)
        free &= ~((enter < leave) & (enter < 1) & (leave > 0))
    return free


def corners() -> np.ndarray:
    """Return the points (C, 2) around which the agent walks: the six outer corners, moved out."""
    m = AGENT_RADIUS + CORNER_OFF
    right = np.array([(60 + m, -m), (60 + m, 30 + m), (15 + m, 120 + m)])
    return np.concatenate([right, right * (-1, 1)])


def step_back(point: np.ndarray) -> np.ndarray:
    """Return the nearest place to point (2,) with `STAND_OFF` clearance (the point itself if it has it)."""
    if is_free(point, point, clearance=STAND_OFF - 0.1):
        return point
    m = AGENT_RADIUS + STAND_OFF
    walls = [(0, 60 + m), (0, -60 - m), (1, -m), (1, 30 + m), (0, 15 + m), (0, -15 - m), (1, 120 + m)]
    exits = np.tile(point, (len(walls), 1))
    for i, (axis, value) in enumerate(walls):
        exits[i, axis] = value
    exits = exits[is_free(exits, exits, clearance=STAND_OFF - 0.1)]
    return exits[np.argmin(np.linalg.norm(exits - point, axis=1))] if len(exits) else point


class Walks:
    """Shortest ways around the block: straight lines from corner to corner."""

    def __init__(self, places: Contacts) -> None:
        self.contacts = places
        self.corners = corners()
        self._last = _direct(self.corners, places.stand)  # (C, K)
        self._hop = _direct(self.corners, self.corners)  # (C, C)
        self._step = _direct(places.stand, places.stand)  # (K, K)

    def between(self, *, usable: np.ndarray) -> np.ndarray:
        """Return the shortest way's length (K, K) from contact to contact over the usable corners (C,) bool."""
        around = (self._last.T[:, :, None] + self._onward(usable)[None]).min(1)
        return np.minimum(self._step, around) + 2 * STAND_OFF

    def _onward(self, usable: np.ndarray) -> np.ndarray:
        """Return the shortest way (C, K) from each corner to each stand over the usable corners (C,) bool."""
        shut = np.where(usable, 0.0, np.inf)
        onward = self._last + shut[:, None]
        for _ in range(3):  # at most four corners in a row
            onward = np.minimum(onward, (self._hop[:, :, None] + onward[None]).min(1) + shut[:, None])
        return onward

    def from_agent(self, agent: np.ndarray, *, usable: np.ndarray) -> np.ndarray:
        """Return the way's length (K,) from the agent (2,) to each stand over the usable corners (C,) bool."""
        start = step_back(agent)
        first = _direct(start[None], self.corners)[0]
        around = (first[:, None] + self._onward(usable)).min(0)
        direct = _direct(start[None], self.contacts.stand)[0]
        return np.minimum(direct, around) + np.linalg.norm(agent - start)

    def path(self, agent: np.ndarray, contact: int, *, usable: np.ndarray) -> np.ndarray:
        """Return the shortest way's points (P, 2) from the agent (2,) to the contact's stand, both included."""
        onward = self._onward(usable)[:, contact]
        here, stand = step_back(agent), self.contacts.stand[contact]
        points = [agent, here]
        for _ in range(len(self.corners)):
            way = _direct(here[None], self.corners)[0] + onward
            nearest = int(np.argmin(way))
            if _direct(here[None], stand[None])[0, 0] <= way[nearest]:
                break
            here = self.corners[nearest]
            onward = np.where(np.arange(len(onward)) == nearest, np.inf, onward)
            points.append(here)
        return np.stack([*points, stand])


def _direct(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distances (A, B) between points (A, 2) and (B, 2), infinite where the block is in the way."""
    free = is_free(a[:, None], b[None], clearance=STAND_OFF - 0.5)
    return np.where(free, np.linalg.norm(a[:, None] - b[None], axis=-1), np.inf)
