"""Describe what a policy sees and does: which keys, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from getiaction.keys import ACTION, OBS_ENV_STATE, OBS_STATE


@dataclass(frozen=True)
class Features:
    """Hold the sizes of a policy's inputs and output.

    Args:
        action_dim: Da.
        state_dim: Ds, the robot's own state, or None.
        env_state_dim: size of `observation.environment_state`, or None.
        cameras: camera key -> (C, H, W) as recorded; order is the order of encoding.
    """

    action_dim: int
    state_dim: int | None = None
    env_state_dim: int | None = None
    cameras: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cameras and self.env_state_dim is None and self.state_dim is None:
            raise ValueError(
                "a policy needs an observation: a camera, observation.state or observation.environment_state"
            )
        if len(set(self.cameras.values())) > 1:
            raise ValueError(f"all cameras must have one shape, got {dict(self.cameras)}: leave some out")

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Return the (C, H, W) that all cameras share, or None without cameras."""
        return next(iter(self.cameras.values()), None)

    @property
    def vectors(self) -> dict[str, int]:
        """Return key -> size of every input that is a vector, in the order of conditioning."""
        sizes = {OBS_STATE: self.state_dim, OBS_ENV_STATE: self.env_state_dim}
        return {key: size for key, size in sizes.items() if size is not None}

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """Return every key that `predict_action_chunk` reads."""
        return (*self.vectors, *self.cameras)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return key -> shape of one step, inputs and action."""
        vectors = {key: (size,) for key, size in self.vectors.items()}
        return {**vectors, **dict(self.cameras), ACTION: (self.action_dim,)}
