"""Check statistics against NumPy on the raw tables, and the split of episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from getiaction.data.cache import load_episodes
from getiaction.data.metadata import find_dataset
from getiaction.data.statistics import compute_statistics, split_episodes
from getiaction.errors import InputError

INDICES = list(range(10, 30))


def raw(root: Path, key: str, episodes: list[int]) -> np.ndarray:
    """Read a feature of some episodes with pyarrow alone, as float64."""
    tables = [pq.read_table(path, columns=[key, "episode_index"]) for path in sorted(root.glob("data/*/*.parquet"))]
    chosen = [table.filter(np.isin(table["episode_index"].to_numpy(), episodes)) for table in tables]
    return np.concatenate([np.array(table[key].to_pylist(), dtype=np.float64) for table in chosen])


@pytest.mark.parametrize("key", ["observation.state", "action"])
def test_statistics_equal_numpy_on_the_raw_table(pusht_root: Path, key: str) -> None:
    metadata = find_dataset("lerobot/pusht", str(pusht_root))
    episodes = load_episodes(metadata, metadata.episode_indices, [])
    training = [205, 3, 77]
    found = compute_statistics(episodes.select(training), "imagenet")[key]
    values = raw(pusht_root, key, training)
    assert found["min"].tolist() == values.min(0).tolist()
    assert found["max"].tolist() == values.max(0).tolist()
    torch.testing.assert_close(found["mean"], torch.from_numpy(values.mean(0)).float())
    torch.testing.assert_close(found["std"], torch.from_numpy(values.std(0)).float())


def test_held_out_episodes_change_nothing(toy_episodes) -> None:
    episodes = toy_episodes()
    before = compute_statistics(episodes.select([0, 2]), "dataset")
    held_out = episodes.select([1]).rows
    for values in (*episodes.vectors.values(), *episodes.frames.values()):
        values[held_out] = 99
    after = compute_statistics(episodes.select([0, 2]), "dataset")
    for key, summary in before.items():
        for name, value in summary.items():
            assert torch.equal(after[key][name], value)


@pytest.mark.parametrize(
    ("image_stats", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_fixed_image_statistics(toy_episodes, image_stats: str, mean: tuple, std: tuple) -> None:
    found = compute_statistics(toy_episodes(), image_stats)["observation.images.top"]
    assert {name: value.shape for name, value in found.items()} == dict.fromkeys(
        ("min", "max", "mean", "std"), (3, 1, 1)
    )
    assert found["mean"].flatten().tolist() == pytest.approx(mean)
    assert found["std"].flatten().tolist() == pytest.approx(std)
    assert found["min"].flatten().tolist() == [0, 0, 0]
    assert found["max"].flatten().tolist() == [1, 1, 1]


def test_measured_image_statistics_equal_numpy(toy_episodes) -> None:
    episodes = toy_episodes()
    found = compute_statistics(episodes, "dataset")["observation.images.wrist"]
    pixels = episodes.frames["observation.images.wrist"].reshape(-1, 3) / 255
    assert found["mean"].shape == (3, 1, 1)
    assert found["mean"].flatten().tolist() == pytest.approx(pixels.mean(0))
    assert found["std"].flatten().tolist() == pytest.approx(pixels.std(0), rel=1e-5)


def test_measured_image_statistics_spread_over_many_pictures(toy_episodes) -> None:
    episodes = toy_episodes((900, 1300), size=(2, 2), cameras=1)
    pixels = episodes.frames["observation.images.top"]
    pixels[...] = np.where(np.arange(2200) < 900, 50, 200)[:, None, None, None]
    found = compute_statistics(episodes, "dataset")["observation.images.top"]
    assert found["mean"].flatten().tolist() == pytest.approx(pixels.reshape(-1, 3).mean(0) / 255, abs=0.002)


def test_split_is_of_whole_episodes() -> None:
    training, held_out = split_episodes(INDICES, val_fraction=0.2, val_episodes=None, seed=1)
    assert len(held_out) == 4
    assert sorted(training + held_out) == INDICES
    assert training == sorted(training)
    assert held_out == sorted(held_out)


def test_split_depends_on_the_seed_alone() -> None:
    split = lambda indices, seed: split_episodes(indices, val_fraction=0.2, val_episodes=None, seed=seed)  # noqa: E731
    torch.manual_seed(123)
    assert split(INDICES, 1) == split(INDICES, 1) == split(INDICES[::-1], 1)
    assert split(INDICES, 1) != split(INDICES, 2)


def test_a_small_fraction_holds_out_one_episode() -> None:
    assert len(split_episodes(INDICES, val_fraction=0.001, val_episodes=None, seed=1)[1]) == 1
    assert len(split_episodes([4, 5], val_fraction=0.1, val_episodes=None, seed=1)[1]) == 1


def test_nothing_is_held_out_for_fraction_0_or_a_single_episode() -> None:
    assert split_episodes(INDICES, val_fraction=0, val_episodes=None, seed=1) == (INDICES, [])
    assert split_episodes([7], val_fraction=0.5, val_episodes=None, seed=1) == ([7], [])


def test_val_episodes_are_taken_exactly() -> None:
    training, held_out = split_episodes([0, 1, 2, 3], val_fraction=0.9, val_episodes=[3, 1], seed=1)
    assert (training, held_out) == ([0, 2], [1, 3])
    assert split_episodes([0, 1], val_fraction=0.9, val_episodes=[], seed=1) == ([0, 1], [])


def test_unknown_val_episodes_are_an_error() -> None:
    with pytest.raises(InputError, match=r"dataset.val_episodes=\[7, 9\].*dataset.episodes"):
        split_episodes([0, 1, 2], val_fraction=0.1, val_episodes=[9, 1, 7], seed=1)


@pytest.mark.parametrize(
    "how", [{"val_fraction": 1.0, "val_episodes": None}, {"val_fraction": 0, "val_episodes": [0, 1]}]
)
def test_holding_out_everything_is_an_error(how: dict) -> None:
    with pytest.raises(InputError, match=r"all 2 episodes are held out.*dataset\.val_fraction"):
        split_episodes([0, 1], seed=1, **how)
