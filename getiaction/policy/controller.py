"""Run a policy step by step: remember observations, queue actions."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from getiaction.policy.features import Features


class ChunkPolicy(Protocol):
    """Say what a controller needs of a policy: `DiffusionPolicy` has it, and so has an exported file's."""

    n_obs_steps: int
    features: Features

    @property
    def device(self) -> torch.device:
        """Return where observations must lie."""

    def eval(self) -> ChunkPolicy:
        """Return the policy, which learns no more."""

    def predict_action_chunk(self, observations: Mapping[str, Tensor], *, generator: torch.Generator) -> Tensor:
        """Map `observation.*` (B, To, ...) to actions (B, Ta, Da), both in raw units."""


class Controller:
    """Turn one observation per control step into one action.

    Every Ta steps it denoises a new chunk from the last To observations; in between it plays the queue. Until To
    observations have been seen, the first one is repeated.

    Args:
        policy: its device and dtype are used as they are.
        seed: seed of the denoising noise; the same seed and observations give the same actions.

    Example:
        >>> controller = Controller(policy, seed=0)
        >>> controller.reset()
        >>> action = controller.act({"observation.image": image, "observation.state": state})
    """

    def __init__(self, policy: ChunkPolicy, *, seed: int = 0) -> None:
        self.policy = policy.eval()
        self.device = policy.device
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget everything: call it at the start of an episode."""
        self._history: deque[dict[str, Tensor]] = deque(maxlen=self.policy.n_obs_steps)
        self._queue: deque[Tensor] = deque()
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    def act(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Return the next action.

        Args:
            observation: one step, raw units: `observation.image*` (C, H, W) uint8 or float in [0, 1],
                `observation.state` (Ds,), ... A leading batch dimension B is kept, if all have one.

        Returns:
            (Da,), or (B, Da).

        Raises:
            ValueError: an observation that the policy needs is missing, or has another shape.
        """
        step, batched = self._check(observation)
        history = self._history.copy()
        history.append(step)
        while len(history) < self.policy.n_obs_steps:
            history.append(step)
        if not self._queue:
            stacked = {key: torch.stack([past[key] for past in history], dim=1) for key in step}  # (B, To, ...)
            chunk = self.policy.predict_action_chunk(stacked, generator=self._generator)
            self._queue.extend(chunk.unbind(1))  # Ta x (B, Da)
        self._history = history  # not if the policy refused it
        action = self._queue.popleft()
        return action if batched else action[0]

    def _check(self, observation: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        step, batch_sizes = {}, {}
        for key in self.policy.features.observation_keys:
            if key not in observation:
                raise ValueError(f"the policy needs {key}; the observation has {', '.join(observation) or 'nothing'}")
            value, shape = torch.as_tensor(observation[key], device=self.device), self.policy.features.shapes[key]
            value = value if value.dtype == torch.uint8 else value.float()
            if tuple(value.shape[-len(shape) :]) != tuple(shape) or value.ndim > len(shape) + 1:
                raise ValueError(f"{key} must have shape {tuple(shape)} (or (B, ...)), got {tuple(value.shape)}")
            batch_sizes[key] = len(value) if value.ndim > len(shape) else None
            step[key] = value[None] if batch_sizes[key] is None else value
        if len(set(batch_sizes.values())) > 1:
            raise ValueError(f"a leading batch dimension must be everywhere or nowhere, and equal, got {batch_sizes}")
        return step, batch_sizes[key] is not None
