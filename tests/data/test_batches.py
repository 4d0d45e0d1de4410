"""Check the order of samples, the shares of processes, crops, prefetching and where data live."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop

from getiaction.data.batches import Share, TrainingBatches, is_resident, prefetched
from getiaction.data.episodes import Episodes
from getiaction.data.gather import Batch, Gatherer, crop_on_device, crop_on_host, frames_to_device
from getiaction.data.order import Order
from getiaction.data.windows import Windows
from getiaction.errors import InputError

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
CPU = torch.device("cpu")
CROP = (8, 8)  # of (10, 12): 3 x 5 places


def make_gatherer(episodes: Episodes, crop_shape: tuple[int, int] | None = CROP) -> Gatherer:
    windows = Windows(episodes, n_obs_steps=2, horizon=6, drop_n_last_frames=1)
    keys = (STATE, *episodes.frames)
    return Gatherer(episodes, windows, device=CPU, resident=False, observations=keys, crop_shape=crop_shape)


def make_batches(gatherer: Gatherer, *, seed: int = 5, prefetch: bool = False, **share: int) -> TrainingBatches:
    part = Share(**share)
    order = Order(len(gatherer.windows), part.global_batch_size, seed)
    return TrainingBatches(gatherer, order, part, crop_is_random=True, prefetch=prefetch)


def joined(batches: list[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(left: Batch, right: Batch) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


# --- order


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (10, 10), (7, 16), (1, 3), (101, 8)])
def test_every_epoch_shows_each_sample_once(samples: int, batch: int) -> None:
    order = Order(samples, batch, seed=3)
    seen = np.concatenate([order.ids(step) for step in range(-(-4 * samples // batch))])
    for epoch in range(4):
        assert sorted(seen[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_batches_straddle_epochs() -> None:
    order = Order(10, 4, seed=3)
    assert [len(order.ids(step)) for step in range(6)] == [4] * 6
    first_epoch = np.concatenate([order.ids(0), order.ids(1), order.ids(2)[:2]])
    assert sorted(first_epoch) == list(range(10))


def test_epochs_and_seeds_differ() -> None:
    assert Order(50, 50, seed=3).ids(0).tolist() != Order(50, 50, seed=3).ids(1).tolist()
    assert Order(50, 50, seed=3).ids(0).tolist() != Order(50, 50, seed=4).ids(0).tolist()


def test_order_is_a_pure_function_of_the_step() -> None:
    forward = [Order(30, 8, seed=3).ids(step).tolist() for step in range(20)]
    torch.manual_seed(99)
    torch.rand(7)
    backward = [Order(30, 8, seed=3).ids(step).tolist() for step in reversed(range(20))]
    assert forward == backward[::-1]


def test_what_a_caller_does_to_ids_does_not_reach_the_order() -> None:
    order = Order(8, 8, seed=3)
    expected = order.ids(0).tolist()
    order.ids(0)[:] = 0
    assert order.ids(0).tolist() == expected


# --- shares


@pytest.mark.parametrize(("processes", "accumulation"), itertools.product([1, 2, 4], [1, 2, 4]))
def test_shares_tile_the_global_batch(processes: int, accumulation: int) -> None:
    shares = [Share(3, accumulation, processes, rank) for rank in range(processes)]
    assert shares[0].global_batch_size == 3 * processes * accumulation
    taken = [np.arange(shares[0].global_batch_size)[part] for share in shares for part in share.slices()]
    assert sorted(np.concatenate(taken)) == list(range(shares[0].global_batch_size))
    assert {len(part) for part in taken} == {3}


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_any_split_gives_the_same_samples_and_crops(toy_episodes, processes: int, accumulation: int) -> None:
    gatherer = make_gatherer(toy_episodes())
    size = 16 // processes // accumulation
    for step in (0, 1, 7):
        [whole] = make_batches(gatherer, batch_size=16).step(step)
        parts = [
            make_batches(gatherer, batch_size=size, accumulation=accumulation, processes=processes, rank=rank).step(
                step
            )
            for rank in range(processes)
        ]
        in_order = [parts[rank][micro] for micro in range(accumulation) for rank in range(processes)]
        assert_same(joined(in_order), whole)


# --- crops


def corners(batch: Batch, camera: str = TOP) -> torch.Tensor:
    """Read (B, 2) top and left of the crops out of their pixels, which are coloured (row, y, x)."""
    return batch[camera][:, 0, 1:, 0, 0].int() - (100 if camera == WRIST else 0)


def test_random_crops_reach_every_place_and_no_other(toy_episodes) -> None:
    batches = make_batches(make_gatherer(toy_episodes()), batch_size=32)
    for camera in (TOP, WRIST):
        seen = {tuple(corner) for step in range(10) for corner in corners(batches.step(step)[0], camera).tolist()}
        assert seen == set(itertools.product(range(3), range(5)))


def test_random_crops_differ_per_sample_and_camera(toy_episodes) -> None:
    [batch] = make_batches(make_gatherer(toy_episodes()), batch_size=32).step(0)
    assert len(corners(batch).unique(dim=0)) > 5
    assert not torch.equal(corners(batch, TOP), corners(batch, WRIST))


def test_all_steps_of_a_sample_are_cropped_alike(toy_episodes) -> None:
    [batch] = make_batches(make_gatherer(toy_episodes()), batch_size=32).step(0)
    assert torch.equal(batch[TOP][:, 0, 1:], batch[TOP][:, 1, 1:])


def test_crops_are_windows_of_the_picture(toy_episodes) -> None:
    episodes = toy_episodes()
    gatherer = make_gatherer(episodes)
    [batch] = make_batches(gatherer, batch_size=8).step(2)
    rows = gatherer.windows.observation_rows(Order(len(gatherer.windows), 8, 5).ids(2))
    for sample, (top, left) in enumerate(corners(batch, WRIST).tolist()):
        for step in range(2):
            expected = episodes.frames[WRIST][rows[sample, step], top : top + 8, left : left + 8]
            assert np.array_equal(batch[WRIST][sample, step].permute(1, 2, 0).numpy(), expected)


def test_random_crops_depend_on_seed_and_step_alone(toy_episodes) -> None:
    gatherer = make_gatherer(toy_episodes())
    batches = make_batches(gatherer, batch_size=16)
    expected = corners(batches.step(4)[0])
    batches.step(0)
    torch.manual_seed(1)
    assert torch.equal(corners(make_batches(gatherer, batch_size=16).step(4)[0]), expected)
    assert not torch.equal(corners(batches.step(5)[0]), expected)
    assert not torch.equal(corners(make_batches(gatherer, batch_size=16, seed=6).step(4)[0]), expected)


@pytest.mark.parametrize("size", [(10, 12), (9, 11), (11, 9), (8, 8), (13, 15), (8, 17)])
def test_centre_crop_is_torchvisions(toy_episodes, size: tuple[int, int]) -> None:
    episodes = toy_episodes(size=size)
    gatherer = make_gatherer(episodes)
    ids = np.array([0, 5, 11])
    pictures = torch.from_numpy(episodes.frames[TOP][gatherer.windows.observation_rows(ids)]).permute(0, 1, 4, 2, 3)
    assert torch.equal(gatherer.gather(ids)[TOP], center_crop(pictures, list(CROP)))


def test_without_a_crop_pictures_are_whole(toy_episodes) -> None:
    episodes = toy_episodes()
    gatherer = make_gatherer(episodes, crop_shape=None)
    assert gatherer.margins == (1, 1)
    [batch] = make_batches(gatherer, batch_size=4).step(0)
    assert batch[TOP].shape == (4, 2, 3, 10, 12)


@pytest.mark.parametrize("shape", [CROP, None])
def test_crop_on_device_equals_crop_on_host(toy_episodes, shape: tuple[int, int] | None) -> None:
    frames, draw = toy_episodes().frames[WRIST], np.random.default_rng(0)
    rows = draw.integers(0, len(frames), (16, 2))
    places = np.stack([draw.integers(0, 3, 16), draw.integers(0, 5, 16)], axis=-1)
    on_host = crop_on_host(frames, rows, places, shape)
    on_device = crop_on_device(torch.from_numpy(frames), torch.from_numpy(rows), places, shape)
    assert on_device.dtype == torch.uint8
    assert np.array_equal(on_device.numpy(), on_host)


def test_whoever_crops_faster_is_asked_on_the_device_alone(toy_episodes) -> None:
    given: list[Any] = []

    def crop(frames: Tensor, rows: Tensor, corners: Tensor, shape: tuple[int, int]) -> Tensor:
        given.append((frames.shape, rows.shape, corners.tolist(), shape))
        return frames[rows]

    gatherer = make_gatherer(toy_episodes())
    gatherer.crop = crop
    gatherer.gather(np.arange(4))
    assert not given
    gatherer.on_device, gatherer.frames_on_device = True, {TOP: torch.zeros(9, 10, 12, 3, dtype=torch.uint8)}
    gatherer.cameras = (TOP,)
    pictures = gatherer.gather(np.arange(4), np.array([[[1, 2]]] * 4))[TOP]
    assert given == [((9, 10, 12, 3), (4, 2), [[1, 2]] * 4, CROP)]
    assert pictures.shape == (4, 2, 3, 10, 12)


# --- batches


def test_a_batch_has_the_shapes_that_its_docstring_says(toy_episodes) -> None:
    batch = make_gatherer(toy_episodes()).gather(np.arange(4))
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        STATE: ((4, 2, 3), torch.float32),
        "action": ((4, 6, 2), torch.float32),
        "action_is_pad": ((4, 6), torch.bool),
        TOP: ((4, 2, 3, 8, 8), torch.uint8),
        WRIST: ((4, 2, 3, 8, 8), torch.uint8),
    }


@pytest.mark.parametrize("crop_shape", [CROP, None])
def test_pictures_are_channels_last_in_memory(toy_episodes, crop_shape: tuple[int, int] | None) -> None:
    pictures = make_gatherer(toy_episodes(), crop_shape).gather(np.arange(4))[TOP]
    assert pictures.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_compacted_episodes_give_the_same_batches(toy_episodes) -> None:
    kept = toy_episodes().select([2, 0])
    compact = kept.in_memory()
    assert kept.indices.tolist() == compact.indices.tolist() == [0, 2]
    assert (kept.num_rows, compact.num_rows) == (21, 16)
    assert kept.nbytes == compact.nbytes
    for step in range(4):
        [expected] = make_batches(make_gatherer(kept), batch_size=8).step(step)
        [found] = make_batches(make_gatherer(compact), batch_size=8).step(step)
        assert_same(found, expected)


def test_chosen_episodes_go_to_the_device_without_a_copy_on_the_host(toy_episodes) -> None:
    kept = toy_episodes().select([2, 0])
    laid, compact = kept.compacted(), kept.in_memory()
    assert all(np.shares_memory(part, kept.frames[TOP]) for part in laid.frames[TOP].parts)
    assert (laid.num_rows, laid.starts.tolist()) == (compact.num_rows, compact.starts.tolist())
    assert np.array_equal(laid.vectors["action"], compact.vectors["action"])
    pictures = torch.from_numpy(compact.frames[TOP])
    assert torch.equal(frames_to_device(laid.frames[TOP], torch.device("cpu")), pictures)
    again = laid.select([2]).compacted()  # of what lies in parts already
    assert torch.equal(frames_to_device(again.frames[TOP], torch.device("cpu")), pictures[-again.num_rows :])


def test_whole_episodes_in_memory_are_a_copy(toy_episodes) -> None:
    episodes = toy_episodes()
    copy = episodes.in_memory()
    assert not np.shares_memory(copy.frames[TOP], episodes.frames[TOP])
    assert np.array_equal(copy.frames[TOP], episodes.frames[TOP])
    assert copy.starts.tolist() == episodes.starts.tolist()


def test_other_windows_over_the_same_arrays_give_the_same_batches(toy_episodes) -> None:
    episodes = toy_episodes()
    own = make_gatherer(episodes.select([1]))
    shared = make_gatherer(episodes.select([0, 2])).with_windows(own.windows)
    ids = np.arange(len(own.windows))
    assert_same(shared.gather(ids), own.gather(ids))


# --- prefetching


def test_prefetching_gives_the_same_batches(toy_episodes) -> None:
    gatherer = make_gatherer(toy_episodes())
    plain = list(make_batches(gatherer, batch_size=4, accumulation=2).iterate(3, 9))
    ahead = list(make_batches(gatherer, batch_size=4, accumulation=2, prefetch=True).iterate(3, 9))
    assert len(plain) == len(ahead) == 6
    for expected, found in zip(plain, ahead, strict=True):
        assert_same(joined(found), joined(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA GPU has streams")
def test_prefetching_on_a_stream_of_its_own_gives_the_same_batches() -> None:
    """However late its kernels come, and however soon the batches before are let go."""
    device, steps = torch.device("cuda", 0), range(30)

    def items() -> Iterator[list[Batch]]:
        for step in steps:
            torch.cuda._sleep(10**6)
            yield [{"action": torch.full((1000, 1000), step, device=device)}]

    found = []
    for [batch] in prefetched(items(), 2, device):
        torch.cuda._sleep(10**6)
        found.append(batch["action"].float().mean())
        del batch
    assert [float(one) for one in found] == list(steps)


def test_prefetching_raises_errors_where_items_are_used() -> None:
    def items() -> Iterator[list[Batch]]:
        yield []
        raise OSError("the disk is gone")

    stream = prefetched(items(), 2)
    assert next(stream) == []
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_prefetching_ends_its_thread_when_the_consumer_stops() -> None:
    before = set(threading.enumerate())
    stream = prefetched(([] for _ in itertools.count()), 1)
    next(stream)
    [thread] = set(threading.enumerate()) - before
    stream.close()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_prefetching_takes_a_gpu_without_a_number() -> None:
    """Accelerate names the only GPU of a process so, and `torch.cuda.set_device` refuses that."""
    assert list(prefetched(iter([[], []]), 1, torch.device("cuda"))) == [[], []]


def test_prefetching_ends_its_thread_at_the_end() -> None:
    before = set(threading.enumerate())
    assert len(list(prefetched(([] for _ in range(5)), 2))) == 5
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


# --- placement


def test_data_are_resident_up_to_half_of_the_free_memory(toy_episodes, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = toy_episodes()
    for free, expected in [(2 * episodes.nbytes, True), (2 * episodes.nbytes - 1, False)]:
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert is_resident(episodes, CPU, "auto") is expected


def test_size_counts_the_chosen_episodes_alone(toy_episodes) -> None:
    row = 3 * 4 + 2 * 4 + 2 * 10 * 12 * 3
    assert toy_episodes().nbytes == 21 * row
    assert toy_episodes().select([1]).nbytes == 5 * row


def test_a_placement_that_is_asked_for_is_obeyed(toy_episodes) -> None:
    assert is_resident(toy_episodes(), CPU, "device")
    assert not is_resident(toy_episodes(), CPU, "host")


def test_an_unknown_placement_is_an_error(toy_episodes) -> None:
    with pytest.raises(InputError, match=r"hardware\.data_placement='gpu' must be auto, device or host"):
        is_resident(toy_episodes(), CPU, "gpu")


# --- noise on states


def test_noise_on_states_is_of_the_size_asked_for_and_the_same_for_any_share(toy_episodes) -> None:
    gatherer, deviation = make_gatherer(toy_episodes()), torch.tensor([0.0, 0.1, 10.0])

    def states(deviations: dict[str, torch.Tensor], **share: int) -> torch.Tensor:
        plain = make_batches(gatherer, **share)
        return joined([replace(plain, observation_noise=deviations).step(step)[0] for step in range(20)])[STATE]

    noise = states({STATE: deviation}, batch_size=8) - states({}, batch_size=8)  # (160, To, Ds)
    assert torch.equal(noise[..., 0], torch.zeros(160, 2))
    torch.testing.assert_close(noise.std((0, 1))[1:], deviation[1:], rtol=0.1, atol=0)
    whole = replace(make_batches(gatherer, batch_size=8), observation_noise={STATE: deviation}).step(3)[0]
    parts = [
        replace(make_batches(gatherer, batch_size=4, processes=2, rank=rank), observation_noise={STATE: deviation})
        for rank in (0, 1)
    ]
    assert_same(whole, joined([part.step(3)[0] for part in parts]))
