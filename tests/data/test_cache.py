"""Check that frames are decoded once, and that a cache is whole, its own key, and repaired when damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.transforms.v2.functional import resize as torchvision_resize

from getiaction.data import cache
from getiaction.data.cache import load_episodes
from getiaction.data.cache_folder import make_room, reserve
from getiaction.data.episodes import Episodes
from getiaction.data.frames import resize
from getiaction.data.metadata import find_dataset
from getiaction.errors import InputError

TOP, WRIST = "observation.images.top", "observation.images.wrist"


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def load(cache_dir: Path, announced: list[str]) -> Callable[..., Episodes]:
    """Return `load_episodes` of both cameras with a cache of the test's own."""

    def load(root: Path, episodes: tuple[int, ...] = (0, 1, 2), cameras: tuple[str, ...] = (TOP, WRIST), **options):
        metadata = find_dataset("test/data", str(root))
        return load_episodes(
            metadata, list(episodes), list(cameras), cache_dir=cache_dir, announce=announced.append, **options
        )

    return load


def only(paths) -> Path:
    [path] = paths
    return path


def assert_same(left: Episodes, right: Episodes) -> None:
    """Compare episodes wherever their rows lie."""
    assert left.indices.tolist() == right.indices.tolist()
    assert left.lengths.tolist() == right.lengths.tolist()
    assert left.fps == right.fps
    for arrays, others in ((left.vectors, right.vectors), (left.frames, right.frames)):
        assert arrays.keys() == others.keys()
        for key in arrays:
            assert np.array_equal(arrays[key][left.rows], others[key][right.rows]), key


# --- once


@pytest.mark.parametrize("storage", ["video_root", "image_root"])
def test_decoding_is_done_once(storage: str, load, announced: list[str], request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(storage)
    first = load(root)
    assert len(announced) == 1
    assert "decoding 36 frames" in announced[0]
    second = load(root)
    assert len(announced) == 1
    assert_same(first, second)


def test_without_cameras_nothing_is_decoded_or_written(load, announced: list[str], cache_dir: Path, video_root) -> None:
    episodes = load(video_root, cameras=())
    assert episodes.num_frames == 36
    assert not episodes.frames
    assert not announced
    assert not cache_dir.exists()


def test_the_same_dataset_elsewhere_is_not_decoded_again(load, announced: list[str], video_root, damaged) -> None:
    expected = load(video_root)
    assert_same(load(damaged(video_root)), expected)
    assert len(announced) == 1


def test_a_cache_of_all_episodes_serves_some(load, announced: list[str], video_root: Path) -> None:
    everything = load(video_root)
    some = load(video_root, episodes=(2, 0))
    assert len(announced) == 1
    assert some.indices.tolist() == [0, 2]
    assert_same(some, everything.select([0, 2]))


def test_a_cache_of_some_episodes_holds_what_one_of_all_holds(load, announced: list[str], video_root: Path) -> None:
    some = load(video_root, episodes=(2, 1))
    assert some.num_rows == 24
    assert_same(some, load(video_root).select([1, 2]))
    assert len(announced) == 2
    load(video_root, episodes=(1, 2))
    assert len(announced) == 2


def test_files_of_other_episodes_need_not_be_there(load, announced: list[str], many_files_root, damaged) -> None:
    root = damaged(many_files_root)
    rows = find_dataset("test/many", str(root)).episodes
    kept = find_dataset("test/many", str(root)).video_file(rows[2], "observation.image")
    for path in root.glob("videos/*/*/*.mp4"):
        if path != root / kept:
            path.unlink()
    some = load(root, episodes=(2,), cameras=("observation.image",))
    whole = load(many_files_root, episodes=(0, 1, 2, 3), cameras=("observation.image",))
    assert_same(some, whole.select([2]))


# --- key


def test_another_size_is_another_cache(load, announced: list[str], video_root: Path) -> None:
    assert load(video_root).frames[TOP].shape == (36, 48, 64, 3)
    assert load(video_root, resize=(24, 32)).frames[TOP].shape == (36, 24, 32, 3)
    assert load(video_root, resize=(24, 40)).frames[WRIST].shape == (36, 24, 40, 3)
    assert len(announced) == 3


def test_other_cameras_are_another_cache(load, announced: list[str], video_root: Path) -> None:
    both = load(video_root)
    assert list(load(video_root, cameras=(WRIST,)).frames) == [WRIST]
    assert len(announced) == 2
    assert not np.array_equal(both.frames[TOP], both.frames[WRIST])


def test_another_value_is_another_cache(load, announced: list[str], video_root: Path, damaged) -> None:
    load(video_root)
    root = damaged(video_root)
    file = only(root.glob("data/*/*.parquet"))
    table = pq.read_table(file)
    values = table["action"].to_pylist()
    values[4] = [7.0, 8.0, 9.0]
    place = table.schema.get_field_index("action")
    pq.write_table(table.set_column(place, "action", pa.array(values, table["action"].type)), file)
    assert load(root).vectors["action"][4].tolist() == [7, 8, 9]
    assert len(announced) == 2


def test_another_video_is_another_cache(load, announced: list[str], video_root: Path, damaged) -> None:
    before = load(video_root)
    root = damaged(video_root)
    (root / "videos" / TOP).rename(root / "top")
    (root / "videos" / WRIST).rename(root / "videos" / TOP)
    (root / "top").rename(root / "videos" / WRIST)
    after = load(root)
    assert len(announced) == 2
    assert np.array_equal(after.frames[TOP], before.frames[WRIST])
    assert np.array_equal(after.frames[WRIST], before.frames[TOP])


# --- whole or not there


def test_a_build_that_fails_half_way_leaves_nothing(load, announced: list[str], cache_dir, video_root, damaged) -> None:
    root = damaged(video_root)
    video = only(root.glob(f"videos/{WRIST}/*/*.mp4"))
    video.write_bytes(video.read_bytes()[:-600])
    with pytest.raises(InputError, match=video.name):
        load(root)
    assert len(announced) == 1
    assert list((cache_dir / "frames").iterdir()) == []


BUILD_TOGETHER = """
import sys, time
from pathlib import Path
from getiaction.data.cache import load_episodes
from getiaction.data.metadata import find_dataset

root, cache_dir, me, other = sys.argv[1:]

def meet(line):  # called once no cache was found: now both build
    print(line, file=sys.stderr)
    Path(me).touch()
    for _ in range(1200):
        if Path(other).exists():
            return
        time.sleep(0.05)
    raise SystemExit("the other process never came")

metadata = find_dataset("test/data", root)
episodes = load_episodes(metadata, [0, 1, 2], list(metadata.cameras), cache_dir=Path(cache_dir), announce=meet)
print({key: int(frames.sum()) for key, frames in episodes.frames.items()})
"""


def test_two_processes_build_at_once(load, announced: list[str], python, cache_dir, video_root, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    processes = [python(BUILD_TOGETHER, video_root, cache_dir, *pair) for pair in ((one, two), (two, one))]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    episodes = load(video_root)
    assert not announced
    expected = {key: int(frames.sum()) for key, frames in episodes.frames.items()}
    assert [out.strip() for out, _ in printed] == [str(expected)] * 2
    assert len(list((cache_dir / "frames").iterdir())) == 1


# --- damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [cut, flip_a_bit, remove])
@pytest.mark.parametrize("name", [f"{WRIST}.frames", "vectors.safetensors"])
def test_damage_is_seen_and_repaired(damage, name: str, load, announced, cache_dir: Path, image_root: Path) -> None:
    expected = load(image_root).in_memory()
    path = only((cache_dir / "frames").iterdir())
    damage(path / name)
    assert_same(load(image_root), expected)
    assert name in announced[1]
    assert "damaged" in announced[1]
    assert "decoding again" in announced[1]
    assert "decoding 36 frames" in announced[2]
    assert sorted(folder.name.split(".damaged-")[0] for folder in (cache_dir / "frames").iterdir()) == [path.name] * 2
    load(image_root)
    assert len(announced) == 3


def test_damage_twice_is_repaired_twice(load, announced: list[str], cache_dir: Path, image_root: Path) -> None:
    expected = load(image_root).in_memory()
    path = only((cache_dir / "frames").iterdir())
    for _ in range(2):
        cut(path / f"{TOP}.frames")
        assert_same(load(image_root), expected)


def test_a_cache_json_that_was_cut_is_repaired(load, announced: list[str], cache_dir: Path, image_root: Path) -> None:
    expected = load(image_root).in_memory()
    cut(only((cache_dir / "frames").iterdir()) / "cache.json")
    assert_same(load(image_root), expected)
    assert "damaged" in announced[1]


def test_a_cache_without_its_cache_json_is_built_again(load, announced, cache_dir: Path, image_root: Path) -> None:
    expected = load(image_root).in_memory()
    remove(only((cache_dir / "frames").iterdir()) / "cache.json")
    assert_same(load(image_root), expected)


def test_a_cache_of_another_format_is_made_again(load, announced: list[str], cache_dir: Path, image_root: Path) -> None:
    expected = load(image_root).in_memory()
    file = only((cache_dir / "frames").iterdir()) / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))
    assert_same(load(image_root), expected)
    assert "format 0" in announced[1]


@pytest.mark.parametrize("below", ["", "caches"])
def test_a_cache_that_cannot_be_written_is_an_error(below: str, tmp_path: Path, image_root: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    metadata = find_dataset("test/data", str(image_root))
    with pytest.raises(InputError, match=r"cannot be written.*dataset\.cache_dir=") as caught:
        load_episodes(metadata, [0], [TOP], cache_dir=tmp_path / "file" / below)
    assert str(tmp_path / "file") in str(caught.value)


# --- on its own


@pytest.fixture
def lone_cache(load, cache_dir: Path, tmp_path: Path, video_root: Path) -> Callable[..., Path]:
    """Return a function that builds a cache and moves it to where no dataset is."""

    def make(**options) -> Path:
        load(video_root, **options)
        return shutil.move(only((cache_dir / "frames").iterdir()), tmp_path / "elsewhere")

    return make


TRAIN_ALONE = """
import sys
sys.modules["av"] = sys.modules["lerobot"] = sys.modules["torchcodec"] = None  # importing them is an error
from getiaction.data.cache import load_episodes
from getiaction.data.metadata import find_dataset

metadata = find_dataset("test/data", sys.argv[1])
assert metadata.is_cache
cameras = list(metadata.cameras)
episodes = load_episodes(metadata, metadata.episode_indices, cameras, announce=sys.exit)
print({key: int(frames.sum()) for key, frames in episodes.frames.items()})
"""


def test_a_copied_cache_needs_no_dataset_and_no_decoder(load, lone_cache, run_python, damaged, video_root) -> None:
    root = damaged(video_root, "gone")
    expected = {key: int(frames.sum()) for key, frames in load(root).frames.items()}
    path = lone_cache()
    shutil.rmtree(root)
    assert run_python(TRAIN_ALONE, path).strip() == str(expected)


def test_a_copied_cache_is_the_dataset(load, lone_cache, video_root: Path) -> None:
    expected = load(video_root).in_memory()
    path = lone_cache()
    source, copy = find_dataset("test/data", str(video_root)), find_dataset("any/name", str(path))
    assert (copy.repo_id, copy.fps, copy.info) == (source.repo_id, source.fps, source.info)
    assert (copy.cameras, copy.vectors, copy.episode_indices) == (
        source.cameras,
        source.vectors,
        source.episode_indices,
    )
    assert_same(load(path), expected)
    assert_same(load(path, episodes=(1,), cameras=(WRIST,)), load(video_root, episodes=(1,), cameras=(WRIST,)))


def test_a_copied_cache_of_some_episodes_has_these(load, lone_cache) -> None:
    path = lone_cache(episodes=(0, 2))
    assert find_dataset("test/data", str(path)).episode_indices == [0, 2]
    assert load(path, episodes=(2,)).indices.tolist() == [2]


def test_a_resized_cache_serves_its_size_alone(load, lone_cache) -> None:
    path = lone_cache(resize=(24, 32))
    assert load(path, resize=(24, 32)).frames[TOP].shape == (36, 24, 32, 3)
    with pytest.raises(InputError, match=r"at \[24, 32\], \[20, 20\] is needed: set backbone.resize_shape='\[24,32\]'"):
        load(path, resize=(20, 20))


def test_a_resized_cache_does_not_pass_for_the_recorded_size(load, lone_cache) -> None:
    path = lone_cache(resize=(24, 32))
    assert find_dataset("test/data", str(path)).cameras[TOP] == (3, 48, 64)  # what the policy will be built for
    with pytest.raises(InputError, match=r"at \[24, 32\].*backbone\.resize_shape"):
        load(path)


def test_a_camera_that_a_copied_cache_lacks_is_an_error(load, lone_cache) -> None:
    path = lone_cache(cameras=(TOP,))
    with pytest.raises(InputError, match=f"has no {WRIST}; it has {TOP}"):
        load(path)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, remove])
@pytest.mark.parametrize("name", [f"{WRIST}.frames", "vectors.safetensors"])
def test_a_damaged_copied_cache_is_an_error(damage, name: str, load, lone_cache) -> None:
    path = lone_cache()
    damage(path / name)
    with pytest.raises(InputError, match="damaged") as caught:
        load(path)
    assert name in str(caught.value)
    assert path.exists()


def test_a_copied_cache_whose_cache_json_was_cut_is_an_error(lone_cache) -> None:
    path = lone_cache()
    cut(path / "cache.json")
    with pytest.raises(InputError, match=r"cache\.json"):
        find_dataset("test/data", str(path))


# --- resizing


@pytest.mark.parametrize("size", [(24, 32), (31, 45), (96, 96), (120, 40)])
def test_resize_is_close_to_torchvisions(size: tuple[int, int], load, video_root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    pictures = np.concatenate([load(video_root).frames[TOP][:6], noise])
    exact = torchvision_resize(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), list(size), antialias=True)
    expected, found = exact.permute(0, 2, 3, 1).numpy(), resize(pictures, size).astype(np.float32)
    assert np.abs(found - expected.round()).max() <= 1
    assert np.abs(found - expected).mean() < 0.5


def test_resize_to_the_same_size_changes_nothing() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    assert resize(pictures, (48, 64)) is pictures


def test_a_resized_cache_holds_the_whole_cache_resized(load, video_root: Path) -> None:
    whole = load(video_root).frames[WRIST]
    assert np.array_equal(load(video_root, resize=(24, 40)).frames[WRIST], resize(np.array(whole), (24, 40)))


# --- room


def test_a_full_disk_is_one_message_and_leaves_nothing(load, cache_dir: Path, image_root: Path, monkeypatch) -> None:
    """Without the room reserved beforehand, writing to the map would end the process with SIGBUS."""

    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"no room for the frame cache .* make room, or set dataset\.cache_dir"):
        load(image_root)
    assert list((cache_dir / "frames").iterdir()) == []


def test_pictures_have_their_room_before_they_are_decoded(tmp_path: Path) -> None:
    pictures = reserve(tmp_path / "frames", (64, 32, 32, 3))
    assert (tmp_path / "frames").stat().st_blocks * 512 >= pictures.nbytes == 64 * 32 * 32 * 3
    assert not pictures.any()


def test_what_a_killed_build_left_goes_and_a_living_one_stays(tmp_path: Path) -> None:
    living, held = make_room(tmp_path, 1)
    killed, left = make_room(tmp_path, 1)
    fresh, also = make_room(tmp_path, 1)
    for handle in (left, also):
        os.close(handle)  # as the system does for a process that dies
    for folder in (living, killed):
        os.utime(folder, (0, 0))  # an age after which it would have been taken for dead, had nobody held it
    mine, own = make_room(tmp_path, 1)
    assert {path for path in tmp_path.iterdir() if path.name.startswith(".building-")} == {living, fresh, mine}
    os.close(held)
    os.close(own)


# --- reopening


def test_files_that_nobody_wrote_to_are_not_read_again(
    load, announced: list[str], video_root: Path, damaged, monkeypatch
) -> None:
    root = damaged(video_root)
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    first = load(root)

    def read(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_blocks", read)
        assert_same(load(root), first)
        video = next(root.rglob("*.mp4"))
        os.utime(video, (1e9, 1e9 + 1))
        with pytest.raises(AssertionError, match=r"was read"):
            load(root)
    assert_same(load(root), first)  # the content is the same: so is the cache
    assert len(announced) == 1
