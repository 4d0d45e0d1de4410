"""Check that damaged or incomplete data are answered with the file, the place and a fix, never with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from getiaction.data.cache import load_episodes
from getiaction.data.metadata import fetch_files, find_dataset
from getiaction.errors import InputError

TOP, WRIST = "observation.images.top", "observation.images.wrist"
FETCH = "fetch the dataset again"


def load(root: Path, episodes: tuple[int, ...] = (0, 1, 2), cameras: tuple[str, ...] = (TOP, WRIST)):
    metadata = find_dataset("test/data", str(root))
    return load_episodes(
        metadata, list(episodes), list(cameras), cache_dir=root.parent / "cache", announce=lambda line: None
    )


def message(root: Path, **options) -> str:
    """Return what loading is refused with."""
    with pytest.raises(InputError) as caught:
        load(root, **options)
    return str(caught.value)


def table_of(root: Path) -> Path:
    [path] = root.glob("data/*/*.parquet")
    return path


def video_of(root: Path, camera: str) -> Path:
    [path] = root.glob(f"videos/{camera}/*/*.mp4")
    return path


def edit_column(path: Path, name: str, edit: Callable[[list], list]) -> None:
    """Rewrite one column of a table."""
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(edit(table[name].to_pylist()))), path)


# --- videos


def test_a_missing_video(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    video_of(root, WRIST).unlink()
    found = message(root)
    assert f"videos/{WRIST}" in found
    assert "is missing: copy the whole dataset, or choose other dataset.episodes" in found
    assert load(root, cameras=(TOP,)).num_frames == 36


def test_several_missing_files_are_counted(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    for path in (video_of(root, TOP), video_of(root, WRIST), table_of(root)):
        path.unlink()
    assert "and 2 more is missing" in message(root)


@pytest.mark.parametrize("left", [0, 10, 0.5, 0.99])
def test_a_video_that_was_cut(left: float, video_root: Path, damaged) -> None:
    root = damaged(video_root)
    path = video_of(root, TOP)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    found = message(root)
    assert str(path) in found
    assert FETCH in found


def test_a_video_that_is_none(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    video_of(root, TOP).write_text("<html>404: not found</html>")
    assert str(video_of(root, TOP)) in message(root)


def test_a_file_with_sound_alone(video_root: Path, damaged) -> None:
    import av

    root = damaged(video_root)
    path = video_of(root, TOP)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    found = message(root)
    assert str(path) in found
    assert FETCH in found


def test_a_video_that_is_shorter_than_its_table(video_root: Path, many_files_root: Path, damaged) -> None:
    root = damaged(video_root)
    short = next(iter(sorted(many_files_root.glob("videos/*/*/*.mp4"))))
    video_of(root, TOP).write_bytes(short.read_bytes())
    found = message(root)
    assert str(video_of(root, TOP)) in found
    assert "has no frame at" in found


def test_times_that_the_video_does_not_have(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_column(table_of(root), "timestamp", lambda times: [time + 0.01 for time in times])
    found = message(root)
    assert str(video_of(root, TOP)) in found
    assert "has no frame at 0.010 s" in found


# --- stored images


def test_an_image_that_is_none(image_root: Path, damaged) -> None:
    root = damaged(image_root)
    edit_column(table_of(root), WRIST, lambda cells: [*cells[:5], {"bytes": b"no image", "path": None}, *cells[6:]])
    found = message(root)
    assert WRIST in found
    assert str(root) in found


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": "images/gone.png"}], ids=["null", "elsewhere"])
def test_an_image_that_is_missing(cell: dict | None, image_root: Path, damaged) -> None:
    root = damaged(image_root)
    edit_column(table_of(root), WRIST, lambda cells: [*cells[:5], cell, *cells[6:]])
    found = message(root)
    assert WRIST in found
    assert str(root) in found


def test_an_image_outside_the_dataset_is_not_read(image_root: Path, damaged) -> None:
    root = damaged(image_root)
    edit_column(table_of(root), WRIST, lambda cells: [{"bytes": None, "path": "../secret.png"}, *cells[1:]])
    assert "leads out of the dataset's folder" in message(root)


@pytest.mark.parametrize("root", ["video_root", "image_root"])
def test_pictures_of_another_size_than_the_metadata_say(root: str, damaged, request: pytest.FixtureRequest) -> None:
    copy = damaged(request.getfixturevalue(root))
    edit_info(copy, lambda info: info["features"][WRIST].update(shape=[8, 8, 3]))
    assert f"{WRIST} has a picture of" in message(copy, cameras=(WRIST,))


# --- tables


def edit_info(root: Path, edit: Callable[[dict], object]) -> None:
    """Change `meta/info.json`."""
    path = root / "meta/info.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "path", ["../{chunk_index}.parquet", "/etc/{file_index}.parquet", "data/{chunk_index.__class__}.parquet"]
)
def test_a_path_that_leads_out_or_asks_for_more_than_numbers(path: str, video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_info(root, lambda info: info.update(data_path=path))
    assert f"data_path={path}" in message(root)


def test_a_frame_that_is_there_twice(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_column(table_of(root), "frame_index", lambda numbers: [0, *numbers[:1], *numbers[2:]])
    assert "episode 0 has no frame_index=1" in message(root)


def test_a_missing_table(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    path = table_of(root)
    path.unlink()
    found = message(root, cameras=())
    assert str(path) in found
    assert "copy the whole dataset" in found


@pytest.mark.parametrize("left", [0, 3, 0.5, 0.99])
def test_a_table_that_was_cut(left: float, video_root: Path, damaged) -> None:
    root = damaged(video_root)
    path = table_of(root)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    for cameras in ((), (TOP,)):
        found = message(root, cameras=cameras)
        assert str(path) in found
        assert FETCH in found


def test_a_table_whose_pages_are_damaged(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    path = table_of(root)
    footer, content = pq.read_metadata(path), bytearray(path.read_bytes())
    for column in range(footer.num_columns):
        chunk = footer.row_group(0).column(column)
        first = chunk.dictionary_page_offset or chunk.data_page_offset
        content[first : first + chunk.total_compressed_size] = b"\xee" * chunk.total_compressed_size
    path.write_bytes(content)
    found = message(root, cameras=())
    assert str(path) in found
    assert FETCH in found


@pytest.mark.parametrize("key", ["observation.state", "action"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(key: str, value: float, video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_column(table_of(root), key, lambda rows: [*rows[:15], [0.0, value, 0.0], *rows[16:]])
    found = message(root)
    assert f"{key} is not finite in episode 1, frame 3" in found
    assert "leave it out of dataset.episodes" in found
    assert load(root, episodes=(0, 2), cameras=()).num_frames == 27


def test_a_row_without_an_action(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_column(table_of(root), "action", lambda rows: [*rows[:15], None, *rows[16:]])
    found = message(root, cameras=())
    assert "action" in found
    assert str(root) in found


def test_a_scalar_row_without_an_action(make_dataset, damaged) -> None:
    root = damaged(make_dataset(lengths=(4, 3), cameras=(), state_dim=1, action_dim=1))
    edit_column(table_of(root), "action", lambda rows: [*rows[:5], None, *rows[6:]])
    assert "action is not finite in episode 1, frame 1" in message(root, episodes=(0, 1), cameras=())


def test_actions_of_another_size_than_the_metadata_say(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_column(table_of(root), "action", lambda rows: [row[:2] for row in rows])
    found = message(root, cameras=())
    assert "action" in found
    assert str(root) in found


@pytest.mark.parametrize("column", ["action", "frame_index", "episode_index"])
def test_a_table_without_a_column(column: str, video_root: Path, damaged) -> None:
    root = damaged(video_root)
    path = table_of(root)
    pq.write_table(pq.read_table(path).drop_columns(column), path)
    found = message(root, cameras=())
    assert column in found
    assert str(root) in found


def test_an_episode_whose_length_is_not_what_the_metadata_say(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    pq.write_table(pq.read_table(table_of(root)).slice(0, 35), table_of(root))
    found = message(root)
    assert "episode 2 has 14 rows, its metadata says 15" in found
    assert "leave it out of dataset.episodes" in found
    assert load(root, episodes=(0, 1), cameras=()).num_frames == 21


def test_an_episode_that_the_table_lacks(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    pq.write_table(pq.read_table(table_of(root)).slice(0, 21), table_of(root))
    assert "episode 2 has 0 rows, its metadata says 15" in message(root)


# --- the Hub


def test_files_that_only_the_hub_has(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    video_of(root, TOP).unlink()
    metadata = replace(find_dataset("nobody/has-this", str(root)), revision="v3.0")  # as if it came from the Hub
    with pytest.raises(InputError) as caught:
        fetch_files(metadata, metadata.files_of([0], [TOP]))
    assert "nobody/has-this" in str(caught.value)
    assert "dataset.root=" in str(caught.value)


# --- what is not an error


def test_tables_with_long_lists_or_doubles_are_read(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    expected = load(video_root, cameras=()).vectors["action"]
    edit_column(table_of(root), "action", lambda rows: rows)  # float32 of fixed size becomes float64 of any
    found = load(root, cameras=()).vectors["action"]
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()


def test_unknown_keys_in_info_json_are_read_over(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"a_later_key": {"x": 1}}))
    assert load(root, cameras=()).num_frames == 36


@pytest.mark.parametrize("storage", ["video_root", "image_root"])
def test_rows_in_any_order_are_put_in_order(storage: str, request: pytest.FixtureRequest, damaged) -> None:
    source = request.getfixturevalue(storage)
    expected, root = load(source), damaged(source)
    table = pq.read_table(table_of(root))
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), table_of(root))
    found = load(root)
    for key in ("action", "observation.state"):
        assert np.array_equal(found.vectors[key], expected.vectors[key])
    for camera in (TOP, WRIST):
        assert np.array_equal(found.frames[camera], expected.frames[camera])
