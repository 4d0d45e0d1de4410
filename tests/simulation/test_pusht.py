"""PushT is gym-pusht, step by step; and its metric is the one that people were measured by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from benchmarks.replay_humans import HumanStart, People, strays
from getiaction.simulation.environment import Step
from getiaction.simulation.pusht import OBS_ENV_STATE, OBS_IMAGE, OBS_STATE, PushT
from getiaction.simulation.rollout import Runner

KEYS = {OBS_STATE: "agent_pos", OBS_ENV_STATE: "environment_state", OBS_IMAGE: "pixels"}
SUCCEEDED = (20, 32, 51, 124, 131, 160, 195)  # the people of all 206 whose block was on target for a moment


def make_gym(obs_type: str, **more: Any) -> Any:
    import gym_pusht  # noqa: F401  registers it

    return gymnasium.make("gym_pusht/PushT-v0", obs_type=obs_type, **more).unwrapped


def walk(seed: int, steps: int) -> np.ndarray:
    """Return actions that push the block about: towards random places, (steps, 2)."""
    places = np.random.default_rng(seed).uniform(100, 400, size=(steps // 5 + 1, 2))
    return np.repeat(places, 5, axis=0)[:steps].astype(np.float32)


# --- the simulator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obs_type", "keys", "steps"),
    [
        ("environment_state_agent_pos", (OBS_STATE, OBS_ENV_STATE), 120),
        ("pixels_agent_pos", (OBS_STATE, OBS_IMAGE), 30),
    ],
)
def test_every_step_is_gym_pushts(obs_type: str, keys: tuple[str, ...], steps: int) -> None:
    ours, theirs = PushT(), make_gym(obs_type)
    coverages = set()
    for seed in (0, 1000):
        ours.reset(seed)
        expected, _ = theirs.reset(seed=seed)
        for action in [None, *walk(seed, steps)]:
            if action is not None:
                step = ours.step(action)
                expected, reward, success, _, info = theirs.step(action)
                theirs_step = Step(
                    pytest.approx(reward, rel=1e-14), success, {"coverage": pytest.approx(info["coverage"], rel=1e-14)}
                )
                assert step == theirs_step
                coverages.add(info["coverage"])
            observed = ours.observe(keys)
            assert set(observed) == set(keys)
            for key in keys:
                value = expected[KEYS[key]]
                value = value.transpose(2, 0, 1) if key == OBS_IMAGE else value.astype(np.float32)
                assert observed[key].dtype == value.dtype
                assert observed[key].shape == ours.observation_shapes[key]
                np.testing.assert_array_equal(observed[key], value)
    assert len(coverages) > 5  # the block was pushed, not only looked at


def test_the_score_is_the_same_to_the_last_bit_in_each_simulator() -> None:
    environments = [PushT() for _ in range(12)]  # gym-pusht's own differ: it goes by the addresses of the block's parts
    coverages = set()
    for environment in environments:
        environment.reset(0)
        coverages.add(tuple(environment.step(action).measures["coverage"] for action in walk(0, 12)))
    assert len(coverages) == 1


def test_pictures_have_the_size_that_is_asked_for() -> None:
    ours, theirs = PushT(image_size=(48, 64)), make_gym("pixels", observation_height=48, observation_width=64)
    ours.reset(3)
    expected, _ = theirs.reset(seed=3)
    np.testing.assert_array_equal(ours.observe([OBS_IMAGE])[OBS_IMAGE], expected.transpose(2, 0, 1))


def test_what_was_observed_stays_as_it_was() -> None:
    environment = PushT()
    environment.reset(0)
    before = environment.observe(list(KEYS))
    copies = {key: value.copy() for key, value in before.items()}
    for action in walk(0, 20):
        environment.step(action)
    after = environment.observe(list(KEYS))
    assert all(np.array_equal(before[key], copies[key]) for key in KEYS)
    assert not any(np.array_equal(after[key], copies[key]) for key in (OBS_STATE, OBS_IMAGE))


def test_looking_changes_nothing() -> None:
    ends = []
    for looks in (False, True):
        environment = PushT()
        environment.reset(5)
        for action in walk(5, 40):
            environment.step(action)
            if looks:
                environment.observe(list(KEYS))
                assert environment.render(120).shape == (120, 120, 3)
        ends.append(environment.state)
    np.testing.assert_array_equal(*ends)


def test_the_only_end_besides_success_is_the_time_limit() -> None:
    runner = Runner(PushT(max_steps=19), keys=[OBS_STATE], n_obs_steps=2)
    runner.start(0)
    for first in (0, 8):
        seen = runner.execute(walk(0, 24)[first : first + 8])
        assert isinstance(seen, dict)
        assert seen[OBS_STATE].shape == (2, 2)
    episode: Any = runner.execute(walk(0, 24)[16:])
    assert (episode.length, episode.success, len(episode.actions)) == (19, False, 19)


# --- the metric, against people ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(pusht_keypoints_root: Path) -> HumanStart:
    return HumanStart(pusht_keypoints_root)


@pytest.mark.parametrize("episode", [0, 20, 43, 128, 205])
def test_a_replayed_demonstration_follows_the_recorded_one(people: HumanStart, episode: int) -> None:
    agent, block = strays(people, episode)
    assert agent < 1e-4  # pixels; recorded numbers are rounded to 2e-5
    assert block < 1e-3


def test_the_recorded_rewards_are_ours(people: HumanStart) -> None:
    environment = PushT()
    environment.reset(0)
    simulator, compared = environment.simulator, []
    for demonstration in (people.demonstrations[number] for number in (0, 60, 174)):
        for (x, y, angle), reward in zip(demonstration.recorded, demonstration.rewards, strict=True):
            simulator.block.angle = angle
            simulator.block.position = (x, y)
            compared.append((min(simulator._get_coverage() / 0.95, 1.0), reward))
    ours, recorded = np.array(compared).T
    np.testing.assert_allclose(ours, recorded, atol=5e-7)
    assert recorded.min() < 0.1 < 0.9 < recorded.max()


def test_people_score_and_succeed_as_their_demonstrations_do(people: HumanStart) -> None:
    act = People(people.demonstrations)
    runner = Runner(people, keys=[OBS_STATE], n_obs_steps=1)
    for number in (*SUCCEEDED[:4], 0, 174):
        demonstration = people.demonstrations[number]
        result: Any = runner.start(number)
        chunk = 0
        while isinstance(result, dict):
            result = runner.execute(act({}, [(number, chunk)])[0])
            chunk += 1
        assert result.success == (number in SUCCEEDED)
        assert (result.score == 1.0) == result.success
        assert (result.largest["coverage"] > 0.95) == result.success
        assert result.length <= len(demonstration.actions)
        assert result.score >= demonstration.rewards[1:].max() - 0.07  # recorded blocks are displaced by the quirk
