"""Compare samples with LeRobotDataset's, key by key and bit by bit, on real and on generated data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from getiaction.data.cache import load_episodes
from getiaction.data.gather import Gatherer
from getiaction.data.metadata import find_dataset
from getiaction.data.windows import Windows, delta_timestamps
from getiaction.errors import InputError

N_OBS_STEPS, HORIZON = 2, 16
PUSHT_EPISODES = [0, 3, 4, 57, 205]  # neighbours, gaps, the first and the last


def spread(windows: Windows, count: int) -> list[int]:
    """Choose samples at the starts, ends and middles of episodes, and `count` at random."""
    ends = windows.ends - 1
    starts = np.array([0, *windows.ends[:-1]])
    special = [starts, starts + 1, (starts + ends) // 2, ends - HORIZON + N_OBS_STEPS, ends - 7, ends - 1, ends]
    drawn = np.random.default_rng(0).choice(len(windows), count, replace=False)
    chosen = np.unique(np.concatenate([*special, drawn]))
    return chosen[(chosen >= 0) & (chosen < len(windows))].tolist()


def pairs(repo_id: str, root: Path, chosen: list[int] | None, count: int) -> Iterator[tuple[dict, dict]]:
    """Yield LeRobot's item and ours, sample by sample; both count the samples of the chosen episodes from 0."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    metadata = find_dataset(repo_id, str(root))
    keys = [*metadata.vectors, *metadata.cameras]
    episodes = load_episodes(metadata, chosen or metadata.episode_indices, list(metadata.cameras))
    windows = Windows(episodes, n_obs_steps=N_OBS_STEPS, horizon=HORIZON, drop_n_last_frames=0)
    gatherer = Gatherer(
        episodes, windows, device=torch.device("cpu"), resident=False, observations=tuple(keys), crop_shape=None
    )
    deltas = delta_timestamps(keys, n_obs_steps=N_OBS_STEPS, horizon=HORIZON, fps=metadata.fps)
    theirs = LeRobotDataset(repo_id, root=root, episodes=chosen, delta_timestamps=deltas, video_backend="pyav")
    assert len(theirs) == len(windows)
    ids = spread(windows, count)
    ours = gatherer.gather(np.array(ids))
    for number, index in enumerate(ids):
        yield theirs[index], {key: value[number] for key, value in ours.items()}


def assert_same(theirs: dict, ours: dict) -> None:
    assert "action_is_pad" in ours
    for key, value in ours.items():
        if value.dtype == torch.uint8:
            assert torch.equal(value, (theirs[key] * 255).round().to(torch.uint8)), key
        else:
            assert value.dtype == theirs[key].dtype
            assert torch.equal(value, theirs[key]), key


def test_pusht_equals_lerobot(pusht_root: Path) -> None:
    compared = 0
    for theirs, ours in pairs("lerobot/pusht", pusht_root, PUSHT_EPISODES, 20):
        assert set(ours) == {"observation.state", "observation.image", "action", "action_is_pad"}
        assert_same(theirs, ours)
        compared += 1
    assert compared > 40


def test_keypoints_equal_lerobot(pusht_keypoints_root: Path) -> None:
    for theirs, ours in pairs("lerobot/pusht_keypoints", pusht_keypoints_root, list(range(5, 206, 8)), 50):
        assert set(ours) == {"observation.state", "observation.environment_state", "action", "action_is_pad"}
        assert_same(theirs, ours)


@pytest.mark.parametrize("storage", ["video_root", "image_root"])
@pytest.mark.parametrize("chosen", [None, [0, 2], [1]], ids=str)
def test_two_cameras_equal_lerobot(storage: str, chosen: list[int] | None, request: pytest.FixtureRequest) -> None:
    for theirs, ours in pairs("test/data", request.getfixturevalue(storage), chosen, 3):
        assert {"observation.images.top", "observation.images.wrist"} < set(ours)
        assert_same(theirs, ours)


def test_many_files_equal_lerobot(many_files_root: Path) -> None:
    assert len(list(many_files_root.glob("data/*/*.parquet"))) > 1
    assert len(list(many_files_root.glob("videos/*/*/*.mp4"))) > 1
    for theirs, ours in pairs("test/many", many_files_root, None, 3):
        assert_same(theirs, ours)


@pytest.mark.parametrize("lengths", [(6, 4), (1, 3, 1)], ids=str)
def test_scalar_features_equal_lerobot(make_dataset: Callable[..., Path], lengths: tuple[int, ...]) -> None:
    root = make_dataset(lengths=lengths, cameras=(), state_dim=1, action_dim=1)
    for theirs, ours in pairs("test/data", root, None, 2):
        assert ours["action"].shape == (HORIZON, 1)
        assert torch.equal(ours["action"], theirs["action"].reshape(HORIZON, 1))
        assert torch.equal(ours["observation.state"], theirs["observation.state"].reshape(N_OBS_STEPS, 1))
        assert torch.equal(ours["action_is_pad"], theirs["action_is_pad"])


@pytest.mark.parametrize("drop", [0, 7, 120])
@pytest.mark.parametrize("chosen", [None, PUSHT_EPISODES], ids=["all", "some"])
def test_sample_anchors_are_lerobots(pusht_root: Path, drop: int, chosen: list[int] | None) -> None:
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.sampler import EpisodeAwareSampler

    metadata = find_dataset("lerobot/pusht", str(pusht_root))
    episodes = load_episodes(metadata, chosen or metadata.episode_indices, [])
    assert drop < 100 or (episodes.lengths <= drop).any()
    windows = Windows(episodes, n_obs_steps=N_OBS_STEPS, horizon=HORIZON, drop_n_last_frames=drop)

    table = LeRobotDatasetMetadata("lerobot/pusht", root=pusht_root).episodes
    starts = np.array(table["dataset_from_index"])
    sampler = EpisodeAwareSampler(starts, table["dataset_to_index"], chosen, drop_n_last_frames=drop)
    owner, frames = windows.locate(np.arange(len(windows)))
    anchors = starts[episodes.indices[owner]] + frames
    assert anchors.tolist() == sampler.indices


def test_dropping_more_than_every_episode_is_an_error_as_lerobots(pusht_root: Path) -> None:
    from lerobot.datasets.sampler import EpisodeAwareSampler

    metadata = find_dataset("lerobot/pusht", str(pusht_root))
    episodes = load_episodes(metadata, metadata.episode_indices, [])
    with pytest.raises(ValueError, match="No valid frames"):
        EpisodeAwareSampler(episodes.starts, episodes.starts + episodes.lengths, drop_n_last_frames=1000)
    with pytest.raises(InputError, match=r"policy\.drop_n_last_frames=1000"):
        Windows(episodes, n_obs_steps=N_OBS_STEPS, horizon=HORIZON, drop_n_last_frames=1000)
