"""Episodes depend on their seeds and the policy only: not on how many run at once, nor where."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.replay_humans import HumanStart, People
from getiaction.simulation.environment import Observation
from getiaction.simulation.evaluation import Crowd
from getiaction.simulation.pusht import OBS_ENV_STATE, OBS_STATE, PushT
from getiaction.simulation.rollout import Episode, Moment, SerialPool, replay, rollout
from getiaction.simulation.workers import WorkerError, WorkerPool

KEYS = {"keys": [OBS_STATE, OBS_ENV_STATE], "n_obs_steps": 2}
QUICK = (51, 182, 205, 60, 185, 93)  # people who took less than 75 steps, and what they held onto succeeded at times


def chase(observations: Observation, moments: Sequence[Moment]) -> np.ndarray:
    """Push the block from wherever the agent is: actions that depend on everything seen, and on the moment."""
    agent, block = observations[OBS_STATE], observations[OBS_ENV_STATE]  # (B, To, 2), (B, To, 16)
    corners = block[:, -1].reshape(-1, 8, 2)
    rows = []
    for row, (seed, number) in enumerate(moments):
        aim = corners[row, (seed + number) % 8] + (agent[row, -1] - agent[row, 0])
        rows.append(np.linspace(agent[row, -1], aim, 8))
    return np.stack(rows).astype(np.float32)


def play(act: Any, make: Any, seeds: Sequence[int], *, envs: int, workers: int, batch: int) -> list[Episode]:
    size = {"num_envs": envs, "batch_size": batch}
    if not workers:
        return list(rollout(act, SerialPool(make, num_envs=envs, **KEYS), seeds, **size))
    with WorkerPool(make, num_envs=envs, num_workers=workers, **KEYS) as pool:
        return list(rollout(act, pool, seeds, **size))


def assert_same(ours: list[Episode], expected: list[Episode]) -> None:
    ours, expected = (sorted(episodes, key=lambda episode: episode.seed) for episodes in (ours, expected))
    assert ours == expected
    assert all(np.array_equal(one.actions, other.actions) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("envs", "workers", "batch"), [(3, 0, 2), (7, 0, 16), (4, 2, 2), (3, 2, 16)])
def test_how_many_run_at_once_changes_nothing(envs: int, workers: int, batch: int) -> None:
    make, seeds = partial(PushT, max_steps=21), range(1000, 1007)
    alone = [play(chase, make, [seed], envs=1, workers=0, batch=1)[0] for seed in seeds]
    assert [episode.length for episode in alone] == [21] * 7
    assert len({episode.actions.tobytes() for episode in alone}) == 7
    assert_same(play(chase, make, seeds, envs=envs, workers=workers, batch=batch), alone)


@pytest.mark.parametrize(("envs", "workers", "batch"), [(1, 0, 1), (3, 0, 2), (4, 2, 3)])
def test_each_episode_ends_when_it_is_over_and_the_next_one_starts(
    pusht_keypoints_root: Path, envs: int, workers: int, batch: int
) -> None:
    make = partial(HumanStart, pusht_keypoints_root, QUICK, more_steps=20)
    act = People(make().demonstrations)
    calls = []

    def noted(observations: Observation, moments: Sequence[Moment]) -> np.ndarray:
        assert len(moments) <= batch
        assert observations[OBS_ENV_STATE].shape == (len(moments), 2, 16)
        calls.extend(moments)
        return act(observations, moments)

    episodes = play(noted, make, QUICK, envs=envs, workers=workers, batch=batch)
    assert len(episodes) == len(QUICK)
    assert {episode.seed for episode in episodes} == set(QUICK)
    by_seed = {episode.seed: episode for episode in episodes}
    for seed, episode in by_seed.items():
        longest = len(act.demonstrations[seed].actions) + 20
        assert (episode.length < longest) if episode.success else (episode.length == longest)
        assert episode.success == (episode.final["coverage"] > 0.95) == (episode.score == 1.0)
        assert len(episode.actions) == episode.length
    assert len({episode.success for episode in episodes}) == 2
    chunks = [(seed, number) for seed, episode in by_seed.items() for number in range(-(-episode.length // 8))]
    assert sorted(calls) == sorted(chunks)  # every chunk is asked for once


def test_a_replay_takes_the_same_steps() -> None:
    (episode,) = play(chase, partial(PushT, max_steps=40), [1003], envs=1, workers=0, batch=1)
    steps = list(replay(PushT(), episode))
    assert len(steps) == episode.length == 40
    assert max(step.reward for step in steps) == episode.score > 0
    assert steps[-1].measures["coverage"] == episode.final["coverage"]


def test_the_policy_sees_the_last_steps_of_each_episode() -> None:
    seen: list[Observation] = []

    def watch(observations: Observation, moments: Sequence[Moment]) -> np.ndarray:
        seen.append(observations)
        return chase(observations, moments)

    (episode,) = play(watch, partial(PushT, max_steps=24), [1002], envs=1, workers=0, batch=1)
    environment = PushT()
    environment.reset(1002)
    track = [environment.observe(KEYS["keys"])]  # type: ignore[arg-type]
    for action in episode.actions:
        environment.step(action)
        track.append(environment.observe(KEYS["keys"]))  # type: ignore[arg-type]
    assert len(seen) == 3
    for number, observations in enumerate(seen):
        for key in (OBS_STATE, OBS_ENV_STATE):
            expected = np.stack([track[max(8 * number - 1, 0)][key], track[8 * number][key]])
            np.testing.assert_array_equal(observations[key][0], expected)


# --- where they run ---------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    make, calls = partial(PushT, max_steps=300), []
    with WorkerPool(make, num_envs=2, num_workers=2, **KEYS) as pool:  # type: ignore[arg-type]

        def act(observations: Observation, moments: Sequence[Moment]) -> np.ndarray:
            calls.append(moments)
            if len(calls) == 2:
                os.kill(pool.processes[1].pid, signal.SIGKILL)
            return chase(observations, moments)

        with pytest.raises(WorkerError, match="a simulator's process ended by itself: out of memory, or killed"):
            list(rollout(act, pool, range(4), num_envs=2, batch_size=2))
    assert 2 <= len(calls) < 10
    assert not any(process.is_alive() for process in pool.processes)


def test_what_fails_in_a_worker_is_told_here() -> None:
    with (
        pytest.raises(WorkerError, match=r"(?s)a simulator failed:.*Traceback.*KeyError: 'observation.touch'"),
        WorkerPool(PushT, num_envs=1, num_workers=1, keys=["observation.touch"], n_obs_steps=1) as pool,
    ):
        list(rollout(chase, pool, [0], num_envs=1, batch_size=1))


@pytest.fixture
def _no_processes_stay() -> Iterator[None]:
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= before


@pytest.mark.usefixtures("_no_processes_stay")
def test_an_interrupted_rollout_ends_its_workers() -> None:
    def interrupt(*_: Any) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(interrupt, PushT, range(4), envs=2, workers=1, batch=2)


def test_a_crowd_fits_the_machine_and_the_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert Crowd().resolve(64, 500) == (128, 6)
    assert Crowd().resolve(64, 5) == (5, 5)
    assert Crowd(num_workers=0).resolve(16, 500) == (16, 0)
    assert Crowd(num_envs=3, num_workers=8).resolve(16, 500) == (3, 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert Crowd().resolve(16, 500) == (16, 0)
