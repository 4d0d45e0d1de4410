"""Check which frames make a sample, and that the seed's mistaken windows are refused."""

from __future__ import annotations

import numpy as np
import pytest

from getiaction.data.windows import Windows, action_deltas, check_delta_timestamps, delta_timestamps, observation_deltas
from getiaction.errors import InputError

PUSHT = {"n_obs_steps": 2, "horizon": 16, "fps": 10}
ALOHA = {"n_obs_steps": 2, "horizon": 16, "fps": 50}


def spaced(first: float, step: float, count: int) -> list[float]:
    return [first + step * number for number in range(count)]


def test_actions_start_with_the_first_observation() -> None:
    assert observation_deltas(2) == [-1, 0]
    assert action_deltas(2, 4) == [-1, 0, 1, 2]
    assert observation_deltas(1) == [0]
    assert action_deltas(1, 4) == [0, 1, 2, 3]


def test_delta_timestamps_are_lerobots() -> None:
    assert delta_timestamps(["observation.state", "action"], n_obs_steps=2, horizon=4, fps=10) == {
        "observation.state": [-0.1, 0.0],
        "action": [-0.1, 0.0, 0.1, 0.2],
    }


@pytest.mark.parametrize("case", [PUSHT, ALOHA, {"n_obs_steps": 1, "horizon": 8, "fps": 30}])
def test_derived_delta_timestamps_pass(case: dict) -> None:
    check_delta_timestamps(delta_timestamps(["observation.image", "observation.state", "action"], **case), **case)


def test_delta_timestamps_written_by_hand_pass() -> None:
    check_delta_timestamps({"action": [round(value, 3) for value in spaced(-0.0333, 1 / 30, 4)]}, **{
        "n_obs_steps": 2, "horizon": 4, "fps": 30, "tolerance_s": 1e-3
    })  # fmt: skip


def test_integers_pass() -> None:
    check_delta_timestamps({"observation.state": [-1, 0]}, n_obs_steps=2, horizon=4, fps=1)


@pytest.mark.parametrize(
    ("given", "case", "right"),
    [
        pytest.param(spaced(0.0, 0.1, 16), PUSHT, "[-0.1, ..., 1.4] (16 steps, 0.1 s apart)", id="starts at now"),
        pytest.param(spaced(-0.2, 0.2, 16), PUSHT, "[-0.1, ..., 1.4] (16 steps, 0.1 s apart)", id="0.2 s on 10 Hz"),
        pytest.param(spaced(-0.1, 0.1, 16), ALOHA, "[-0.02, ..., 0.28] (16 steps, 0.02 s apart)", id="0.1 s on 50 Hz"),
        pytest.param(spaced(-0.1, 0.1, 10), PUSHT, "[-0.1, ..., 1.4] (16 steps, 0.1 s apart)", id="too short"),
        pytest.param([], PUSHT, "[-0.1, ..., 1.4] (16 steps, 0.1 s apart)", id="empty"),
        pytest.param([float("nan")] * 16, PUSHT, "[-0.1, ..., 1.4] (16 steps, 0.1 s apart)", id="not a number"),
    ],
)
def test_mistaken_action_windows_are_refused_with_the_right_list(given: list[float], case: dict, right: str) -> None:
    with pytest.raises(InputError) as caught:
        check_delta_timestamps({"action": given}, **case)
    assert "dataset.delta_timestamps.action" in str(caught.value)
    assert "policy.horizon=16" in str(caught.value)
    assert right in str(caught.value)


def test_mistaken_observation_window_is_refused_with_the_right_list() -> None:
    with pytest.raises(InputError) as caught:
        check_delta_timestamps({"observation.image": [-0.2, 0.0]}, **PUSHT)
    assert "dataset.delta_timestamps.observation.image" in str(caught.value)
    assert "[-0.1, 0.0] (2 steps, 0.1 s apart)" in str(caught.value)


def test_windows_repeat_the_edges_and_mark_them(toy_episodes) -> None:
    windows = Windows(toy_episodes((4, 3)), n_obs_steps=2, horizon=4, drop_n_last_frames=0)
    assert len(windows) == 7
    assert windows.observation_rows(np.array([0, 3, 4, 6])).tolist() == [[0, 0], [2, 3], [4, 4], [5, 6]]
    rows, is_pad = windows.action_rows(np.array([0, 3, 4]))
    assert rows.tolist() == [[0, 0, 1, 2], [2, 3, 3, 3], [4, 4, 5, 6]]
    assert is_pad.tolist() == [[True, False, False, False], [False, False, True, True], [True, False, False, False]]


def test_no_window_leaves_its_episode(toy_episodes) -> None:
    episodes = toy_episodes((4, 1, 6))
    windows = Windows(episodes, n_obs_steps=3, horizon=9, drop_n_last_frames=0)
    ids = np.arange(len(windows))
    owner = np.repeat([0, 1, 2], [4, 1, 6])
    assert (owner[windows.observation_rows(ids)] == owner[:, None]).all()
    assert (owner[windows.action_rows(ids)[0]] == owner[:, None]).all()


def test_no_episode_long_enough_is_an_error(toy_episodes) -> None:
    with pytest.raises(InputError, match=r"policy\.drop_n_last_frames=7"):
        Windows(toy_episodes((7, 5)), n_obs_steps=2, horizon=16, drop_n_last_frames=7)
