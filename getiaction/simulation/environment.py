"""Say what a simulated environment is: LeRobot's observation keys in, actions out, one score per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Observation = dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """Hold what one control step brought.

    Args:
        reward: in [0, 1]; an episode's score is its maximum.
        success: the task is done; the episode ends.
        measures: further numbers by name, such as `coverage`.
    """

    reward: float
    success: bool
    measures: Mapping[str, float]


class Environment(Protocol):
    """One simulated robot. Observations are made when they are asked for: pictures nobody looks at cost nothing."""

    name: str
    fps: int
    max_steps: int
    action_dim: int
    observation_shapes: Mapping[str, tuple[int, ...]]
    """Key -> shape: pictures (C, H, W) uint8, vectors (D,) float32."""

    def reset(self, seed: int) -> None:
        """Start an episode: the same seed, the same start."""

    def step(self, action: np.ndarray) -> Step:
        """Act for one control step; action (Da,), in the dataset's units."""

    def observe(self, keys: Sequence[str]) -> Observation:
        """Return the current observation: pictures (C, H, W) uint8, vectors (D,) float32."""

    def render(self, size: int) -> np.ndarray:
        """Return a picture for people, (size, size, 3) uint8."""


class Expert(Protocol):
    """A script that knows how to do the task; it sees the whole state."""

    version: int
    """Another number, other motions: recordings of two versions do not mix."""

    def reset(self) -> None:
        """Start an episode."""

    def act(self, state: np.ndarray) -> np.ndarray:
        """Return the next action (Da,) in a state of `Demonstrable.state`."""

    @property
    def done(self) -> bool:
        """Tell whether nothing is left to improve."""


class Demonstrable(Environment, Protocol):
    """An environment that has a scripted expert."""

    task: str
    """What the expert does, in words."""

    @property
    def state(self) -> np.ndarray:
        """Return the whole physical state."""

    @property
    def position(self) -> np.ndarray:
        """Return where the robot is (Da,), in units of the action."""

    def reset_midway(self, seed: int) -> None:
        """Start in the middle of the task: the same seed, the same start."""

    def make_expert(self, seed: int) -> Expert:
        """Return a new expert; the same seed, the same behaviour."""
