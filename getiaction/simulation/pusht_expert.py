"""A scripted expert for gym-pusht: plan pushes, walk to the first, push, and plan again at every control step."""

from __future__ import annotations

import numpy as np

from getiaction.simulation.pusht_geometry import rotate, to_block, to_world
from getiaction.simulation.pusht_planner import PUSH_SPEED, WALK_SPEED, Plan, Planner

LAG = 0.2  # seconds that gym-pusht's agent trails a moving target: damping over stiffness, 20 / 100
MAX_CHANGE = 130.0  # pixels per second that the velocity may change in one control step
LOOK_AHEAD = 14.0  # pixels along the way
SLOW_IN = 4.0  # pixels per second that a pixel before contact allows above `PUSH_SPEED`
SLOW_OUT = 7.0  # pixels per second that a pixel before the end of the push allows
CONTACT_ZONE = 5.0  # pixels before contact that are walked at `PUSH_SPEED`


class PushTExpert:
    """Push the block to the goal at a person's speed.

    Every step it plans anew from the state, aims at a point a little ahead on the planned way, and asks for the
    velocity towards it by a target `LAG` seconds ahead. All that it remembers is the contact that it was going to,
    which breaks near ties. It draws nothing: `seed` is there for experts that do.

    Example:
        >>> expert = PushTExpert()
        >>> target = expert.act(np.array([*agent.position, *agent.velocity, *block.position, block.angle]))
    """

    version = 2  # 1 was slower, and put off pushes near walls

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self._planner = Planner()
        self.reset()

    def reset(self) -> None:
        """Forget the last step: call it at the start of an episode."""
        self.plan = Plan(None, 0.0, np.inf)

    @property
    def done(self) -> bool:
        """Whether, at the last `act`, the block was where it should be and no quick push would have made it better."""
        return self.plan.contact is None and np.isfinite(self.plan.cost)

    def act(self, state: np.ndarray) -> np.ndarray:
        """Return the target (2,), float64 pixels in [0, 512].

        Args:
            state: (7,) agent x, y, vx, vy, block x, y, angle: pymunk's positions, velocity and angle (pixels, radians).
        """
        agent, velocity, pose = np.split(np.asarray(state, np.float64), (2, 4))
        self.plan = self._planner.plan(agent, pose, keep=self.plan.contact)
        wanted = np.zeros(2) if self.plan.contact is None else self._velocity(agent, pose, self.plan)
        change = wanted - velocity
        change *= min(1.0, MAX_CHANGE / max(float(np.linalg.norm(change)), 1e-9))
        return np.clip(agent + LAG * (velocity + change), 0.0, 512.0)

    def _velocity(self, agent: np.ndarray, pose: np.ndarray, plan: Plan) -> np.ndarray:
        """Return the velocity (2,) towards a point ahead on the way to the contact and along the push."""
        walk, push = self._way(to_block(pose, agent), pose, plan)
        way = to_world(pose, np.concatenate([walk, push]))
        reached = np.concatenate([[0.0], _lengths(way).cumsum()])  # (P,) pixels from the agent
        to_contact = _lengths(np.concatenate([walk, push[:1]])).sum()
        ahead = min(LOOK_AHEAD, reached[-1])
        offset = np.array([np.interp(ahead, reached, way[:, i]) for i in range(2)]) - agent
        speed = min(WALK_SPEED, PUSH_SPEED + SLOW_IN * max(to_contact - CONTACT_ZONE, 0.0), SLOW_OUT * reached[-1])
        return offset / max(float(np.linalg.norm(offset)), 1e-9) * speed

    def _way(self, agent: np.ndarray, pose: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Return the agent's way to contact (P, 2) and while it pushes (9, 2), in the block's frame of this step."""
        contacts, k = self._planner.contacts, plan.contact
        assert k is not None
        centre, pivot = contacts.centre[k], contacts.pivot[k]
        if self._planner.approach(agent)[k]:
            walk = agent[None]
            inside = float((agent - centre) @ contacts.normal[k])  # deeper than contact: that much is pushed already
        else:
            walk = self._planner.walks.path(agent, k, usable=self._planner.usable(pose))
            inside = 0.0
        pushed = np.linspace(min(max(inside, 0.0), plan.length), plan.length, 9)
        return walk, pivot + rotate(contacts.turn[k] * pushed, centre - pivot)


def _lengths(way: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.diff(way, axis=0), axis=1)
