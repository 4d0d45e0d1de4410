"""Check that memory-mapped pictures may be larger than memory, and are held by nobody once they were used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import xxhash
from safetensors.numpy import save_file

from getiaction.data import cache
from getiaction.data.batches import Share, TrainingBatches
from getiaction.data.episodes import Episodes
from getiaction.data.gather import Gatherer
from getiaction.data.mapped import maps_of
from getiaction.data.metadata import read_metadata
from getiaction.data.mixture import Mixture, Source
from getiaction.data.order import Order
from getiaction.data.windows import Windows

TOP = "observation.images.top"
SHAPE = (1024, 1024, 3)
EPISODE = 64


def make_cache(folder: Path, frames: int) -> Path:
    """Write a frame cache of black pictures that take no room on the disk: the file is a hole."""
    folder.mkdir()
    save_file({"action": np.zeros((frames, 2), np.float32)}, folder / cache.VECTORS)
    features = {TOP: {"dtype": "video", "shape": list(SHAPE), "names": ["height", "width", "channels"]}}
    features["action"] = {"dtype": "float32", "shape": [2], "names": None}
    rows = [{"episode_index": index, "length": EPISODE} for index in range(frames // EPISODE)]
    shapes = {TOP: (frames, *SHAPE)}
    cache.write_description(
        folder, repo_id="test/large", info={"fps": 10, "features": features}, rows=rows, shapes=shapes
    )
    size = int(np.prod(shapes[TOP]))
    with (folder / f"{TOP}.frames").open("wb") as file:
        file.truncate(size)
    content = json.loads((folder / cache.CACHE_FILE).read_text())
    whole, rest = divmod(size, cache.BLOCK)
    content["checksums"][f"{TOP}.frames"] = [xxhash.xxh3_64_hexdigest(bytes(cache.BLOCK))] * whole
    if rest:
        content["checksums"][f"{TOP}.frames"].append(xxhash.xxh3_64_hexdigest(bytes(rest)))
    (folder / cache.CACHE_FILE).write_text(json.dumps(content))
    return folder


def open_all(folder: Path) -> Episodes:
    metadata = read_metadata(folder, "test/large")
    return cache.load_episodes(metadata, metadata.episode_indices, [TOP])


def make_batches(episodes: Episodes, drop: int = 7) -> TrainingBatches:
    windows = Windows(episodes, n_obs_steps=2, horizon=16, drop_n_last_frames=drop)
    gatherer = Gatherer(
        episodes, windows, device=torch.device("cpu"), resident=False, observations=(TOP,), crop_shape=(8, 8)
    )
    return TrainingBatches(gatherer, Order(len(windows), 8, 0), Share(8), crop_is_random=True, prefetch=True)


def test_several_datasets_are_read_ahead_and_let_go_of_like_one(tmp_path: Path) -> None:
    metadata = [read_metadata(make_cache(tmp_path / name, 2 * EPISODE), f"test/{name}") for name in ("a", "b")]
    mixture = Mixture.of(*(Source(one) for one in metadata))
    frames = mixture.concatenate([open_all(one.root) for one in metadata]).frames[TOP]
    assert [(first, stop) for first, stop, _ in maps_of(frames)] == [(0, 2 * EPISODE), (2 * EPISODE, 4 * EPISODE)]


def test_pictures_may_be_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SAMPLED", 2)
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    frames = -(-(memory + (1 << 30)) // int(np.prod(SHAPE)) // EPISODE) * EPISODE
    episodes = open_all(make_cache(tmp_path / "large", frames))
    assert episodes.nbytes > memory
    assert [len(batch[TOP]) for [batch] in make_batches(episodes).iterate(0, 3)] == [8, 8, 8]


def test_what_was_read_is_not_held(tmp_path: Path) -> None:
    """Reads all of 600 MB in the order of training; the process grows by a small part of that."""
    batches = make_batches(open_all(make_cache(tmp_path / "some", 192)))
    steps = batches.order.num_samples // 8
    process = psutil.Process()
    held = []
    for number, _ in enumerate(batches.iterate(0, 3 * steps)):
        if number % 4 == 0:
            held.append(process.memory_info().rss)
    assert max(held) - held[0] < 100e6


def test_reading_ahead_changes_no_batch(toy_episodes) -> None:
    batches = make_batches(toy_episodes(), drop=1)
    expected = [batches.step(step) for step in range(4, 9)]
    for got, wanted in zip(batches.iterate(4, 9), expected, strict=True):
        assert all(torch.equal(got[0][key], wanted[0][key]) for key in wanted[0])
