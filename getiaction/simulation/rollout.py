"""Roll a policy out in many environments at once: one batched call for all that wait for actions.

An episode depends on its seed and the policy only. Environments whose episode ended take the next seed; when no seed is
left they drop out. Shape letters: B rows, To observation steps, Ta executed action steps, Da action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from getiaction.simulation.environment import Environment, Observation, Step

MakeEnvironment = Callable[[], Environment]
Moment = tuple[int, int]
"""The episode's seed and the number of the chunk in it: what a policy may derive its noise from."""


class Act(Protocol):
    """What acts: observations (B, To, ...) by key, and each row's moment, to actions (B, Ta, Da)."""

    def __call__(self, observations: Observation, moments: Sequence[Moment]) -> np.ndarray:
        """Return one chunk for each row."""


@dataclass(frozen=True)
class Episode:
    """Hold a finished episode.

    Args:
        seed: its start.
        score: the largest reward.
        length: control steps until success or the time limit.
        largest: the largest value of each measure.
        final: the last value of each measure.
        actions: (length, Da), enough to play it again.
    """

    seed: int
    success: bool
    score: float
    length: int
    largest: dict[str, float]
    final: dict[str, float]
    actions: np.ndarray = field(repr=False, compare=False)


class Runner:
    """Run one environment, chunk by chunk.

    Args:
        environment: used by nobody else.
        keys: the observations to make.
        n_obs_steps: To.
    """

    def __init__(self, environment: Environment, *, keys: Sequence[str], n_obs_steps: int) -> None:
        self.environment, self.keys = environment, list(keys)
        self.history: deque[Observation] = deque(maxlen=n_obs_steps)

    def start(self, seed: int) -> Observation:
        """Start an episode; return its first observation, repeated: (To, ...) by key."""
        self.environment.reset(seed)
        self.seed = seed
        self.steps: list[Step] = []
        self.actions: list[np.ndarray] = []
        self.history.extend([self.environment.observe(self.keys)] * (self.history.maxlen or 1))
        return self._stacked()

    def execute(self, actions: np.ndarray) -> Observation | Episode:
        """Execute a chunk (Ta, Da); return the last To observations, or the episode if it ended."""
        for left, action in zip(reversed(range(len(actions))), actions, strict=True):
            self.steps.append(self.environment.step(action))
            self.actions.append(action)
            if self.steps[-1].success or len(self.steps) == self.environment.max_steps:
                return finished(self.seed, self.steps, self.actions)
            if left < (self.history.maxlen or 1):  # earlier ones would be forgotten again
                self.history.append(self.environment.observe(self.keys))
        return self._stacked()

    def _stacked(self) -> Observation:
        return {key: np.stack([past[key] for past in self.history]) for key in self.keys}


def finished(seed: int, steps: Sequence[Step], actions: Sequence[np.ndarray]) -> Episode:
    """Sum up the steps of an episode."""
    measures = steps[-1].measures
    return Episode(
        seed=seed,
        success=any(step.success for step in steps),
        score=max(step.reward for step in steps),
        length=len(steps),
        largest={name: max(step.measures[name] for step in steps) for name in measures},
        final=dict(measures),
        actions=np.array(actions),
    )


class Pool(Protocol):
    """Hold several runners; what they do comes back in `wait`."""

    def start(self, slot: int, seed: int) -> None:
        """Start an episode in one environment."""

    def execute(self, slot: int, actions: np.ndarray) -> None:
        """Execute a chunk in one environment."""

    def wait(self) -> list[tuple[int, Observation | Episode]]:
        """Return what has come, by slot; wait for one at least."""
        ...


class SerialPool:
    """Run all environments in this process, one after the other."""

    def __init__(self, make: MakeEnvironment, *, num_envs: int, keys: Sequence[str], n_obs_steps: int) -> None:
        self.runners = [Runner(make(), keys=keys, n_obs_steps=n_obs_steps) for _ in range(num_envs)]
        self.done: list[tuple[int, Observation | Episode]] = []

    def start(self, slot: int, seed: int) -> None:
        """Start an episode in one environment."""
        self.done.append((slot, self.runners[slot].start(seed)))

    def execute(self, slot: int, actions: np.ndarray) -> None:
        """Execute a chunk in one environment."""
        self.done.append((slot, self.runners[slot].execute(actions)))

    def wait(self) -> list[tuple[int, Observation | Episode]]:
        """Return what has come since."""
        done, self.done = self.done, []
        return done


def rollout(act: Act, pool: Pool, seeds: Sequence[int], *, num_envs: int, batch_size: int) -> Iterator[Episode]:
    """Run one episode per seed; yield each as it ends, in no fixed order.

    Args:
        act: called with at most `batch_size` rows.
        pool: at least `num_envs` runners.
        seeds: one per episode.
        num_envs: environments that run at once.
        batch_size: rows that wait before `act` is called, unless nothing else runs.
    """
    left = deque(seeds)
    moments: dict[int, Moment] = {}  # of the slots that run
    ready: deque[tuple[int, Observation]] = deque()

    def start(slot: int) -> None:
        moments[slot] = (left.popleft(), 0)
        pool.start(slot, moments[slot][0])

    for slot in range(min(num_envs, len(seeds))):
        start(slot)
    while moments:
        for slot, result in pool.wait():
            if isinstance(result, Episode):
                del moments[slot]
                if left:
                    start(slot)
                yield result
            else:
                ready.append((slot, result))
        if ready and (len(ready) >= batch_size or len(ready) == len(moments)):
            rows = [ready.popleft() for _ in range(min(batch_size, len(ready)))]
            observations = {key: np.stack([row[key] for _, row in rows]) for key in rows[0][1]}
            chunks = act(observations, [moments[slot] for slot, _ in rows])  # (B, Ta, Da)
            for (slot, _), chunk in zip(rows, chunks, strict=True):
                seed, number = moments[slot]
                moments[slot] = (seed, number + 1)
                pool.execute(slot, chunk)


def replay(environment: Environment, episode: Episode) -> Iterator[Step]:
    """Play an episode again, step by step; between the steps the environment can be drawn."""
    environment.reset(episode.seed)
    for action in episode.actions:
        yield environment.step(action)
