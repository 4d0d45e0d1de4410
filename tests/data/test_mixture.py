"""Check that several datasets train as one: numbers, shares, agreement, and pictures that are not copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from getiaction.data.batches import Share, TrainingBatches
from getiaction.data.cache import load_episodes
from getiaction.data.episodes import Episodes
from getiaction.data.gather import Gatherer
from getiaction.data.metadata import read_metadata
from getiaction.data.mixture import Mixture, Source
from getiaction.data.order import Order, share_out
from getiaction.data.stacked import Stacked
from getiaction.data.windows import Windows
from getiaction.errors import InputError

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def roots(make_dataset) -> tuple[Path, Path]:
    """Return two datasets of the same features: of 4 and of 3 episodes."""
    return make_dataset(lengths=(12, 9, 15, 8)), make_dataset(lengths=(7, 11, 10), use_videos=False)


@pytest.fixture
def source(roots: tuple[Path, Path]) -> Callable[..., Source]:
    """Return a function that takes something of one of the two: `source(1, weight=2.0)`."""

    def make(number: int, **given: object) -> Source:
        return Source(read_metadata(roots[number], "test/data"), f"dataset.sources[{number}]", **given)  # type: ignore[arg-type]

    return make


def load(mixture: Mixture, cache_dir: Path) -> Episodes:
    parts = [load_episodes(s.metadata, s.chosen, [TOP], cache_dir=cache_dir, announce=str) for s in mixture.sources]
    return mixture.concatenate(parts)


def gather_all(episodes: Episodes) -> dict[str, torch.Tensor]:
    windows = Windows(episodes, n_obs_steps=2, horizon=6, drop_n_last_frames=1)
    gatherer = Gatherer(episodes, windows, device=CPU, resident=False, observations=(STATE, TOP), crop_shape=(40, 40))
    return gatherer.gather(np.arange(len(windows)))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_samples_of_a_mixture_are_those_of_its_sources(source, tmp_path: Path) -> None:
    both = Mixture.of(source(0, episodes=[1, 2]), source(1))
    alone = [Mixture.of(source(0, episodes=[1, 2])), Mixture.of(source(1))]
    together = gather_all(load(both, tmp_path))
    apart = [gather_all(load(one, tmp_path)) for one in alone]
    for key, values in together.items():
        assert torch.equal(values, torch.cat([one[key] for one in apart])), key


def test_every_episode_has_a_number_of_its_own(source, tmp_path: Path) -> None:
    both = Mixture.of(source(0, episodes=[1, 2]), source(1))
    assert [one.offset for one in both.sources] == [0, 4]
    assert load(both, tmp_path).indices.tolist() == [1, 2, 4, 5, 6]


def test_what_a_source_holds_out_does_not_depend_on_the_others(source) -> None:
    alone = [Mixture.of(source(number)).split(0.3, seed=3) for number in (0, 1)]
    training, held_out = Mixture.of(source(0), source(1)).split(0.3, seed=3)
    assert training == alone[0][0] + [4 + index for index in alone[1][0]]
    assert held_out == alone[0][1] + [4 + index for index in alone[1][1]]
    assert len(held_out) == 2


def test_a_source_may_say_what_it_holds_out(source) -> None:
    mixture = Mixture.of(source(0, val_episodes=[3]), source(1, val_episodes=[0, 2]))
    assert mixture.split(0.3, seed=3) == ([0, 1, 2, 5], [3, 4, 6])
    with pytest.raises(InputError, match=r"dataset\.sources\[1\]\.val_episodes=\[9\] are not among"):
        Mixture.of(source(0), source(1, val_episodes=[9])).split(0.3, seed=3)


def test_the_checksum_tells_mixtures_apart(source, tmp_path: Path) -> None:
    one, other = (load(Mixture.of(*order), tmp_path) for order in ((source(0), source(1)), (source(1), source(0))))
    assert one.fingerprint() != other.fingerprint()


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((1.0, 1.0), (50, 50)), ((3.0, 1.0), (75, 25)), ((1.0, 1.0, 1.0), (34, 33, 33)), ((1e-9, 1.0), (1, 99))],
)
def test_weights_share_an_epoch_out(weights: tuple[float, ...], shares: tuple[int, ...]) -> None:
    assert share_out(100, weights) == shares


@pytest.mark.parametrize("seed", range(20))
def test_any_weights_share_out_everything(seed: int) -> None:
    draw = np.random.default_rng(seed)
    weights = tuple(draw.exponential(size=draw.integers(1, 9)) ** 4)
    count = int(draw.integers(len(weights), 200))
    shares = share_out(count, weights)
    assert sum(shares) == count
    assert min(shares) >= 1


@pytest.mark.parametrize(("sizes", "weights"), [((30, 10), (1.0, 1.0)), ((7, 50, 3), (1.0, 2.0, 5.0))])
def test_each_epoch_shows_each_source_its_share(sizes: tuple[int, ...], weights: tuple[float, ...]) -> None:
    count = sum(sizes)
    order, starts = Order(count, 8, seed=3, sizes=sizes, weights=weights), np.cumsum([0, *sizes])
    seen = np.concatenate([order.ids(step) for step in range(10 * count // 8)])
    for epoch in range(9):
        owners = np.searchsorted(starts, seen[epoch * count : (epoch + 1) * count], side="right") - 1
        assert tuple(np.bincount(owners, minlength=len(sizes)).tolist()) == share_out(count, weights)


def test_none_is_seen_again_before_all_others_of_its_source_were() -> None:
    order = Order(40, 8, seed=3, sizes=(30, 10), weights=(1.0, 3.0))
    seen = np.concatenate([order.epoch(epoch) for epoch in range(12)])
    for first, stop in ((0, 30), (30, 40)):
        counts = Counter(seen[(seen >= first) & (seen < stop)].tolist())
        assert len(counts) == stop - first
        assert max(counts.values()) - min(counts.values()) <= 1


def test_samples_of_a_source_are_shuffled_anew_in_each_pass() -> None:
    order = Order(40, 8, seed=3, sizes=(20, 20), weights=(1.0, 1.0))
    epochs = [order.epoch(epoch) for epoch in range(2)]
    passes = [epoch[epoch < 20].tolist() for epoch in epochs] + [(epoch[epoch >= 20] - 20).tolist() for epoch in epochs]
    assert len({tuple(one) for one in passes}) == 4


def test_without_weights_a_mixture_is_seen_as_one_dataset() -> None:
    plain, mixed = Order(40, 8, seed=3), Order(40, 8, seed=3, sizes=(30, 10))
    assert all(np.array_equal(plain.ids(step), mixed.ids(step)) for step in range(20))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_sees_the_same(processes: int, source, tmp_path: Path) -> None:
    mixture = Mixture.of(source(0, weight=1.0), source(1, weight=3.0))
    episodes = load(mixture, tmp_path)
    windows = Windows(episodes, n_obs_steps=2, horizon=6, drop_n_last_frames=1)
    sizes = mixture.count_samples(windows)
    assert sizes == (40, 25)
    gatherer = Gatherer(episodes, windows, device=CPU, resident=False, observations=(STATE, TOP), crop_shape=(40, 40))

    def step(share: Share) -> torch.Tensor:
        order = Order(len(windows), share.global_batch_size, 5, sizes, mixture.weights)
        [batch] = TrainingBatches(gatherer, order, share, crop_is_random=True, prefetch=True).step(3)
        return batch[TOP]

    parts = [step(Share(8 // processes, 1, processes, rank)) for rank in range(processes)]
    assert torch.equal(torch.cat(parts), step(Share(8)))


# --- agreement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fps": 10}, "were recorded at 20 and 10 Hz"),
        ({"state_dim": 4}, f"disagree about {STATE}: 3 and 4"),
        ({"image_size": (48, 48)}, f"disagree about {TOP}: (3, 48, 64) and (3, 48, 48)"),
        ({"cameras": (WRIST,)}, f"disagree about {TOP}: (3, 48, 64) and missing"),
    ],
    ids=str,
)
def test_what_sources_disagree_about_is_said(changed: dict, message: str, source, make_dataset) -> None:
    other = Source(read_metadata(make_dataset(**changed), "other"), "dataset.sources[1]")
    [line] = Mixture.of(source(0), other).disagreements([STATE, TOP, "action"])
    assert message in line
    assert str(source(0).metadata.root) in line
    assert str(other.metadata.root) in line


def test_what_the_policy_does_not_use_may_differ(source, make_dataset) -> None:
    other = Source(read_metadata(make_dataset(cameras=(TOP,)), "other"), "dataset.sources[1]")
    assert not list(Mixture.of(source(0), other).disagreements([STATE, TOP, "action"]))


def test_numbers_of_other_names_are_pointed_out(source) -> None:
    def named(number: int, names: list[str]) -> Source:
        metadata = source(number).metadata
        features = {**metadata.features, "action": {**metadata.features["action"], "names": names}}
        return replace(source(number), metadata=replace(metadata, features=features))

    same, other = Mixture.of(named(0, ["x", "y"]), named(1, ["x", "y"])), Mixture.of(named(0, ["x"]), named(1, ["y"]))
    assert not list(same.other_names([STATE, "action"]))
    [line] = other.other_names([STATE, "action"])
    assert "name the numbers of action differently, ['x'] and ['y']" in line


def test_an_episode_may_be_there_only_once(source) -> None:
    assert not list(Mixture.of(source(0, episodes=[0, 1]), source(0, episodes=[2, 3])).overlaps())
    [line] = Mixture.of(source(0, episodes=[0, 1]), source(0)).overlaps()
    assert "share 2 episodes (0, ...)" in line


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stacked() -> tuple[Stacked, np.ndarray]:
    parts = [np.random.default_rng(0).integers(0, 255, (count, 4, 5, 3), np.uint8) for count in (3, 1, 6)]
    return Stacked(parts), np.concatenate(parts)


@pytest.mark.parametrize(
    "index",
    [
        0,
        3,
        np.int64(9),
        np.array([9, 0, 3, 2, 4]),
        np.array([[0, 9], [3, 4]]),
        (4, slice(1, 3), slice(0, 2)),
        (2, ..., 1),
        (np.array([9, 0, 3]), slice(1, 3)),
    ],
    ids=str,
)
def test_stacked_arrays_read_as_one(index: object, stacked: tuple[Stacked, np.ndarray]) -> None:
    assert np.array_equal(stacked[0][index], stacked[1][index])  # type: ignore[index]


def test_stacked_arrays_are_no_copies(stacked: tuple[Stacked, np.ndarray]) -> None:
    view, whole = stacked
    assert (len(view), view.shape, view.nbytes, view.dtype) == (len(whole), whole.shape, whole.nbytes, whole.dtype)
    assert np.shares_memory(view[4], view.parts[2])
    assert np.array_equal(np.asarray(view), whole)


def test_a_mixture_in_memory_holds_what_was_chosen(source, tmp_path: Path) -> None:
    episodes = load(Mixture.of(source(0, episodes=[1, 2]), source(1)), tmp_path).select([2, 5])
    copy = episodes.in_memory()
    assert copy.num_rows == copy.num_frames == 15 + 11
    assert np.array_equal(copy.frames[TOP][copy.rows], episodes.frames[TOP][episodes.rows])
