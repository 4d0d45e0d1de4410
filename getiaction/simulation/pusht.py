"""PushT: push a T-shaped block onto its target. The simulator is gym-pusht; the metric, Chi et al., arXiv:2303.04137.

Score A is the maximum of clip(coverage / 0.95, 0, 1) over an episode; success B is coverage > 0.95 at any step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from getiaction.keys import OBS_ENV_STATE, OBS_STATE
from getiaction.simulation.environment import Observation, Step
from getiaction.simulation.pusht_expert import PushTExpert
from getiaction.simulation.pusht_starts import as_reset_state, draw_midway

OBS_IMAGE = "observation.image"


class PushT:
    """gym-pusht behind LeRobot's keys.

    `observation.state` (2,) is the agent's position, `observation.environment_state` (16,) the block's eight corners
    x, y in world pixels, `observation.image` (3, H, W) the rendered picture.

    Args:
        max_steps: control steps (10 Hz) until an episode ends without success.
        image_size: [height, width] of the pictures that a policy sees.

    Raises:
        ValueError: one of them is not possible.
    """

    name = "pusht"
    fps = 10
    action_dim = 2
    task = "Push the T-shaped block onto the T-shaped target."

    def __init__(self, *, max_steps: int = 300, image_size: Sequence[int] = (96, 96)) -> None:
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"env.max_steps={max_steps} must be a whole number of at least 1")
        if len(image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in image_size):
            raise ValueError(f"env.image_size={image_size} must be two positive numbers, [height, width]")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame needs no display
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pygame speaks of its packaging
            from gym_pusht.envs.pusht import PushTEnv, pymunk_to_shapely

        height, width = image_size
        self.max_steps = max_steps
        self.observation_shapes: Mapping[str, tuple[int, ...]] = {
            OBS_STATE: (2,),
            OBS_ENV_STATE: (16,),
            OBS_IMAGE: (3, height, width),
        }
        # obs_type="state" draws nothing: pictures are drawn in `observe`
        self.simulator: Any = PushTEnv(
            obs_type="state", render_mode="rgb_array", observation_width=width, observation_height=height
        )
        self._to_shapely = pymunk_to_shapely
        self.simulator._get_coverage = self._coverage

    def reset(self, seed: int) -> None:
        """Start an episode as `gymnasium`'s `reset(seed=seed)` does."""
        self.simulator.reset(seed=seed)

    def reset_to(self, state: Sequence[float]) -> None:
        """Start from a state, as gym-pusht does: agent x, y, block x, y before its turn (pixels), angle (radians)."""
        self.simulator.reset(seed=0, options={"reset_to_state": list(state)})

    def reset_midway(self, seed: int) -> None:
        """Start with the agent at the block, which is anywhere, or nearly at its goal."""
        self.reset_to(as_reset_state(draw_midway(np.random.default_rng(seed))))

    def step(self, action: np.ndarray) -> Step:
        """Move the agent's target to `action`, x, y in world pixels, for 0.1 s."""
        _, reward, success, _, info = self.simulator.step(np.asarray(action, np.float32))
        return Step(float(reward), bool(success), {"coverage": float(info["coverage"])})

    def _coverage(self) -> float:
        """Return what gym-pusht does, the same each time: it adds the block's parts in the order of their addresses."""
        simulator = self.simulator
        bodies = (simulator.get_goal_pose_body(simulator.goal_pose), simulator.block)
        goal, block = (self._to_shapely(body, simulator._block_shapes) for body in bodies)
        return goal.intersection(block).area / goal.area

    def observe(self, keys: Sequence[str]) -> Observation:
        """Return the observations of these keys."""
        return {key: self._observe(key) for key in keys}

    def _observe(self, key: str) -> np.ndarray:
        simulator = self.simulator
        if key == OBS_STATE:
            return np.array(simulator.agent.position, np.float32)
        if key == OBS_ENV_STATE:
            return simulator.get_keypoints(simulator._block_shapes).astype(np.float32).flatten()
        if key == OBS_IMAGE:
            return np.ascontiguousarray(simulator._render().transpose(2, 0, 1))  # H W C -> C H W
        raise KeyError(key)

    @property
    def position(self) -> np.ndarray:
        """Return where the robot is, in units of the action: the agent's x, y."""
        return np.array(self.simulator.agent.position)

    @property
    def state(self) -> np.ndarray:
        """Return the whole physical state (7,): agent x, y, its velocity x, y, block x, y, angle."""
        agent, block = self.simulator.agent, self.simulator.block
        return np.array([*agent.position, *agent.velocity, *block.position, block.angle])

    def make_expert(self, seed: int) -> PushTExpert:
        """Return the scripted expert."""
        return PushTExpert(seed=seed)

    def render(self, size: int) -> np.ndarray:
        """Draw the world with the agent's target as a red cross, (size, size, 3) uint8."""
        simulator = self.simulator
        return simulator._get_img(simulator._draw(), width=size, height=size, render_action=True)
