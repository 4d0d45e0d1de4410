"""The expert's picture of the physics is gym-pusht's; it succeeds, stays at a person's speed, and repeats itself."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import shapely
from gym_pusht.envs.pusht import pymunk_to_shapely

from getiaction.simulation.pusht import PushT
from getiaction.simulation.pusht_expert import PushTExpert
from getiaction.simulation.pusht_geometry import (
    CENTROID,
    GOAL,
    OUTLINE,
    block_distance,
    is_free,
    step_back,
    to_block,
    to_world,
)
from getiaction.simulation.pusht_planner import CLOSE, Planner, misfit
from getiaction.simulation.pusht_starts import as_reset_state, draw_midway

HUMAN_STEP_99, HUMAN_GAP_99 = 40.4, 73.5  # pixels, of lerobot/pusht_keypoints


@pytest.fixture
def env() -> Any:
    import gym_pusht  # noqa: F401  registers it

    return gym.make("gym_pusht/PushT-v0", obs_type="state").unwrapped


def state_of(env: Any) -> np.ndarray:
    return np.array([*env.agent.position, *env.agent.velocity, *env.block.position, env.block.angle])


def roll(env: Any, expert: PushTExpert, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return states (N, 7), actions (N, 2) and coverages (N,) until the expert is done."""
    env.reset(seed=seed)
    expert.reset()
    states, actions, coverages = [], [], []
    for _ in range(300):
        state = state_of(env)
        action = expert.act(state)
        if expert.done:
            break
        coverages.append(env.step(action)[4]["coverage"])
        states.append(state)
        actions.append(action)
    return np.array(states), np.array(actions), np.array(coverages)


def test_outline_and_goal_are_those_of_gym_pusht(env: Any) -> None:
    env.reset(seed=3)
    pose = state_of(env)[4:]
    vertices = np.concatenate([[env.block.local_to_world(v) for v in s.get_vertices()] for s in env._block_shapes])
    for corner in to_world(pose, OUTLINE):
        assert np.linalg.norm(vertices - corner, axis=1).min() < 1e-9
    np.testing.assert_allclose(env.goal_pose, GOAL)
    np.testing.assert_allclose(env.block.center_of_gravity, (0, 45))
    assert env.block.moment == pytest.approx(3000)
    np.testing.assert_allclose(to_block(pose, to_world(pose, CENTROID)), CENTROID, atol=1e-9)


def test_midway_starts_have_the_agent_at_the_block_and_both_inside_the_walls(env: Any) -> None:
    rng, near = np.random.default_rng(0), 0
    for _ in range(100):
        agent_x, agent_y, *pose = start = draw_midway(rng)
        env.reset(options={"reset_to_state": as_reset_state(start)})
        np.testing.assert_allclose(state_of(env)[4:], pose, atol=1e-6)
        np.testing.assert_allclose(env.agent.position, (agent_x, agent_y), atol=0.01)  # nothing pushed it away
        block, agent = pymunk_to_shapely(env.block, env._block_shapes), shapely.Point(agent_x, agent_y)
        assert 15 < block.distance(agent) < 70
        np.testing.assert_allclose(
            block_distance(to_block(np.array(pose), np.array([agent_x, agent_y]))), block.distance(agent), atol=0.05
        )
        assert block.bounds[0] > 15
        assert block.bounds[3] < 497
        near += bool(np.linalg.norm(np.array(pose[:2]) - GOAL[:2]) < 60)
    assert 20 < near < 60


@pytest.mark.parametrize("contact", range(0, 60, 5))
def test_a_push_turns_the_block_as_predicted(env: Any, contact: int) -> None:
    planner = Planner()
    places, length = planner.contacts, 30.0
    env.reset(options={"reset_to_state": [20, 20, 256, 256, 0.3]})
    pose = state_of(env)[4:]
    env.agent.position = tuple(to_world(pose, places.stand[contact]))
    for pushed in np.linspace(-3.0, length, 67):  # the agent is kinematic: carry it along the predicted arc
        moved = planner._push(pose, np.array(contact), np.array(max(pushed, 0.0)))
        place = to_world(moved, places.centre[contact] + min(pushed, 0.0) * places.normal[contact])
        env.agent.velocity = tuple((place - np.array(env.agent.position)) / 0.01)
        env.space.step(0.01)
    env.agent.velocity = (0, 0)
    for _ in range(10):
        env.space.step(0.01)
    predicted = planner._push(pose, np.array(contact), np.array(length))
    np.testing.assert_allclose(state_of(env)[4:6], predicted[:2], atol=0.7)
    np.testing.assert_allclose(state_of(env)[6], predicted[2], atol=0.01)


def test_the_last_push_has_the_least_misfit() -> None:
    planner = Planner()
    pose = np.array([262.0, 240.0, 0.6])
    every = np.arange(len(planner.contacts.turn))
    length, cost = planner._last(pose, every)
    for k in every[np.isfinite(cost)]:
        near = planner._push(pose, k, length[k] + np.array([-1.0, 0.0, 1.0]))
        assert misfit(near).argmin() == 1


def test_ways_around_the_block_do_not_touch_it() -> None:
    planner, rng = Planner(), np.random.default_rng(0)
    for _ in range(50):
        agent = step_back(rng.uniform(-200, 200, 2))
        contact = int(rng.integers(len(planner.contacts.turn)))
        way = planner.walks.path(agent, contact, usable=np.ones(6, bool))
        assert is_free(way[:-1], way[1:], clearance=1.0).all()


def test_succeeds_at_a_persons_speed_and_does_not_stop_short(env: Any) -> None:
    expert = PushTExpert(seed=0)
    for seed in range(6):
        states, actions, coverages = roll(env, expert, seed)
        assert expert.done
        assert coverages.max() > 0.95
        assert coverages[-1] > 0.955
        assert np.linalg.norm(np.diff(actions, axis=0), axis=1).max() < HUMAN_STEP_99
        assert np.linalg.norm(actions - states[:, :2], axis=1).max() < HUMAN_GAP_99


def test_goes_on_where_a_wall_shuts_the_shorter_way() -> None:
    """It pushed a pixel at each step there, for seconds: the plan was always to do the next push afterwards."""
    simulator, expert = PushT(max_steps=300), PushTExpert()
    simulator.reset_to([359.2, 504.1, 423.15, 378.27, 0.48])
    places = []
    for _ in range(40):
        places.append(simulator.position)
        simulator.step(expert.act(simulator.state))
    for start in range(0, 40 - 8, 4):
        reached = np.linalg.norm(np.array(places[start : start + 8]) - places[start], axis=1).max()
        assert reached > 10.0, f"from step {start} on it stays within {reached:.0f} pixels for 0.8 s"


def test_the_same_start_gives_the_same_actions_bit_for_bit(env: Any) -> None:
    expert = PushTExpert(seed=0)
    first = roll(env, expert, 11)[1]
    roll(env, expert, 12)
    assert np.array_equal(first, roll(env, expert, 11)[1])
    assert np.array_equal(first, roll(env, PushTExpert(seed=0), 11)[1])


def test_stays_where_it_is_at_the_goal() -> None:
    expert = PushTExpert()
    target = expert.act(np.array([100.0, 100.0, 0.0, 0.0, *GOAL]))
    assert expert.done
    np.testing.assert_array_equal(target, (100.0, 100.0))
    assert misfit(GOAL) < CLOSE
