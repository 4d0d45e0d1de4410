"""Check how a dataset is found and what its metadata say, and that every mistake is answered with a fix."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from getiaction.data.cache import load_episodes
from getiaction.data.episodes import Episodes
from getiaction.data.metadata import find_dataset, image_shape
from getiaction.errors import InputError

Edit = Callable[[dict], object]


def edit_info(root: Path, edit: Edit) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    edit(info)
    (root / "meta/info.json").write_text(json.dumps(info))


def load_all(root: Path, **options) -> Episodes:
    metadata = find_dataset("test/data", str(root))
    return load_episodes(metadata, metadata.episode_indices, list(metadata.cameras), **options)


# --- what it says


def test_pusht_is_described(pusht_root: Path) -> None:
    metadata = find_dataset("lerobot/pusht", str(pusht_root))
    assert (metadata.fps, len(metadata.episodes), metadata.is_cache) == (10, 206, False)
    assert metadata.cameras == {"observation.image": (3, 96, 96)}
    assert metadata.vectors == {"observation.state": 2, "action": 2}
    assert metadata.episode_indices == list(range(206))
    assert sum(row["length"] for row in metadata.episodes) == 25650
    assert metadata.files_of([0, 205], ["observation.image"]) == [
        "data/chunk-000/file-000.parquet",
        "videos/observation.image/chunk-000/file-000.mp4",
    ]


def test_files_are_those_of_the_chosen_episodes(many_files_root: Path) -> None:
    metadata = find_dataset("test/many", str(many_files_root))
    files = metadata.files_of([1, 3], ["observation.image"])
    assert len(files) == 4
    assert all((many_files_root / file).exists() for file in files)
    assert set(files).isdisjoint(metadata.files_of([0, 2], ["observation.image"]))


def test_images_in_tables_need_no_video_files(image_root: Path) -> None:
    metadata = find_dataset("test/data", str(image_root))
    assert list(metadata.cameras) == ["observation.images.top", "observation.images.wrist"]
    assert all(file.startswith("data/") for file in metadata.files_of([0, 1, 2], list(metadata.cameras)))


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([48, 64, 3], ["height", "width", "channels"]),
        ([48, 64, 3], ["height", "width", "channel"]),
        ([3, 48, 64], ["channels", "height", "width"]),
        ([3, 48, 64], ["channel", "height", "width"]),
        ([48, 64, 3], None),
        ([3, 48, 64], None),
        ([3, 48, 64], []),
    ],
)
def test_image_shape_is_channels_height_width(shape: list[int], names: list[str] | None) -> None:
    assert image_shape({"dtype": "video", "shape": shape, "names": names}) == (3, 48, 64)


def test_image_shape_without_names_at_all() -> None:
    assert image_shape({"dtype": "image", "shape": [3, 48, 64]}) == (3, 48, 64)


def test_image_shape_of_one_channel() -> None:
    assert image_shape({"dtype": "image", "shape": [1, 48, 64]}) == (1, 48, 64)
    assert image_shape({"dtype": "image", "shape": [48, 64, 1]}) == (1, 48, 64)


def test_depth_maps_are_left_out(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_info(root, lambda info: info["features"]["observation.images.wrist"]["info"].update(is_depth_map=True))
    assert list(find_dataset("test/data", str(root)).cameras) == ["observation.images.top"]


def test_scalar_features_have_size_one(make_dataset) -> None:
    root = make_dataset(lengths=(4, 3), cameras=(), state_dim=1, action_dim=1)
    metadata = find_dataset("test/data", str(root))
    assert metadata.vectors == {"observation.state": 1, "action": 1}
    episodes = load_episodes(metadata, [0, 1], [])
    assert {key: values.shape for key, values in episodes.vectors.items()} == {
        "observation.state": (7, 1),
        "action": (7, 1),
    }


def test_vectors_are_writable(video_root: Path) -> None:
    metadata = find_dataset("test/data", str(video_root))
    for cameras in ([], list(metadata.cameras)):  # from the tables, from a cache: torch warns of read-only arrays
        episodes = load_episodes(metadata, [0, 1, 2], cameras)
        assert all(values.flags.writeable for values in episodes.vectors.values())


# --- where it is


def test_a_unicode_path_works(video_root: Path, damaged) -> None:
    root = damaged(video_root, "Дані з робота 机器人 ü")
    assert load_all(root, cache_dir=root.parent / "кеш").num_frames == 36


def test_a_home_relative_path_works(video_root: Path, damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    root = damaged(video_root)
    monkeypatch.setenv("HOME", str(root.parent))
    assert find_dataset("test/data", "~/copy").root == root


FIND_WITHOUT_LEROBOT = """
import sys
sys.modules["lerobot"] = None  # importing it is an error
from getiaction.data.cache import load_episodes
from getiaction.data.episodes import Episodes
from getiaction.data.metadata import find_dataset

metadata = find_dataset("someone/data")
print(metadata.root, load_episodes(metadata, [0, 1, 2], []).num_frames)
"""


def test_lerobots_local_folder_is_used_without_importing_it(run_python, video_root: Path, tmp_path: Path) -> None:
    shutil.copytree(video_root, tmp_path / "someone/data")
    printed = run_python(FIND_WITHOUT_LEROBOT, HF_LEROBOT_HOME=str(tmp_path))
    assert printed.split() == [str(tmp_path / "someone/data"), "36"]


def test_root_comes_before_lerobots_local_folder(video_root: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(video_root, tmp_path / "someone/data")
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    assert find_dataset("someone/data").root == tmp_path / "someone/data"
    assert find_dataset("someone/data", str(video_root)).root == video_root


def test_an_unreachable_hub_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    with pytest.raises(InputError) as caught:
        find_dataset("nobody/has-this")
    assert "dataset.repo_id=nobody/has-this" in str(caught.value)
    assert "dataset.root=" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- what is wrong with it


def test_a_missing_root_is_an_error_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset\.root=.*mistyped does not exist: set dataset\.root="):
        find_dataset("test/data", str(tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"dataset\.root=.*data\.zip"):
        find_dataset("test/data", str(tmp_path / "data.zip"))


def test_any_other_folder_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset\.root=.* is no LeRobotDataset: it has no meta/info\.json"):
        find_dataset("test/data", str(tmp_path))


def test_an_older_format_is_an_error_with_the_way_to_convert(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_info(root, lambda info: info.update(codebase_version="v2.1"))
    shutil.rmtree(root / "meta/episodes")
    with pytest.raises(InputError, match=r"dataset\.root=.* has format v2\.1, v3\.0 is needed: convert it") as caught:
        find_dataset("test/data", str(root))
    [script] = re.findall(r"python -m (lerobot\.[\w.]+)", str(caught.value))
    assert importlib.util.find_spec(script) is not None


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"codebase_version": "v3.0", "fps": 30, "fea', id="cut"),
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"\xff\xfe\x00\x01", id="not text"),
        pytest.param(b'{"fps": 30, "features": {}}', id="no version"),
        pytest.param(b'{"codebase_version": "v3.0", "features": {}}', id="no fps"),
        pytest.param(b'{"codebase_version": "v3.0", "fps": 30, "features": null}', id="no features"),
    ],
)
def test_a_damaged_info_json_is_an_error(content: bytes, video_root: Path, damaged) -> None:
    root = damaged(video_root)
    (root / "meta/info.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        find_dataset("test/data", str(root))
    assert f"{root}/meta" in str(caught.value)
    assert "fetch the dataset again" in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda info: info["features"]["observation.images.top"].update(shape=[48, 64]), id="flat picture"),
        pytest.param(lambda info: info["features"]["observation.images.top"].pop("shape"), id="no shape"),
        pytest.param(lambda info: info["features"]["observation.images.top"].update(shape=None), id="null shape"),
        pytest.param(lambda info: info.update(fps=0), id="fps is 0"),
        pytest.param(lambda info: info.pop("data_path"), id="no data_path"),
        pytest.param(lambda info: info.update(video_path=None), id="no video_path"),
    ],
)
def test_metadata_that_make_no_sense_are_an_error(edit: Edit, video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_info(root, edit)
    with pytest.raises(InputError) as caught:
        load_all(root, cache_dir=root.parent / "cache")
    assert f"{root}/meta" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table"])
def test_a_damaged_episode_table_is_an_error(content: bytes, video_root: Path, damaged) -> None:
    root = damaged(video_root)
    [table] = root.glob("meta/episodes/*/*.parquet")
    table.write_bytes(content)
    with pytest.raises(InputError, match=r"/meta.* is damaged.*fetch the dataset again"):
        find_dataset("test/data", str(root))


def test_a_missing_episode_table_is_an_error_that_names_it(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    shutil.rmtree(root / "meta/episodes")
    with pytest.raises(InputError, match="meta/episodes"):
        find_dataset("test/data", str(root))


def test_a_dataset_without_actions_is_an_error(video_root: Path, damaged) -> None:
    root = damaged(video_root)
    edit_info(root, lambda info: info["features"].pop("action"))
    with pytest.raises(InputError, match=r"has no 'action', only observation\.images\.top"):
        find_dataset("test/data", str(root))
