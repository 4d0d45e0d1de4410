"""Read what a LeRobotDataset v3.0 says of itself, and find it: a folder, LeRobot's cache, or the Hub."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from getiaction.data.metadata_checks import check_metadata
from getiaction.errors import InputError, first_line
from getiaction.keys import ACTION, OBS_ENV_STATE, OBS_STATE, is_camera

INFO_FILE = "meta/info.json"
EPISODES = "meta/episodes"
CACHE_FILE = "cache.json"  # marks a frame cache, which is a dataset of its own: see data/cache.py


@dataclass(frozen=True)
class DatasetMetadata:
    """Describe a dataset without opening its data.

    Args:
        root: folder of the dataset, or of a frame cache made from it.
        repo_id: its name on the Hub, for messages and downloads.
        fps: frames per second.
        features: feature key -> {"dtype", "shape", ...}, as `meta/info.json` has them.
        episodes: one row per episode: `episode_index`, `length`, and the files and times where it lies.
        info: the whole of `meta/info.json`.
        revision: Hub revision, or None for the one that this LeRobot wants.
    """

    root: Path
    repo_id: str
    fps: float
    features: dict[str, dict[str, Any]]
    episodes: list[dict[str, Any]]
    info: dict[str, Any]
    revision: str | None = None

    @property
    def is_cache(self) -> bool:
        """Tell whether this is a frame cache: self-sufficient, with pictures already decoded and resized."""
        return (self.root / CACHE_FILE).exists()

    @property
    def file(self) -> Path:
        """Return the file that holds `info`."""
        return self.root / (CACHE_FILE if self.is_cache else INFO_FILE)

    @property
    def episode_file(self) -> Path:
        """Return the file or folder that holds `episodes`."""
        return self.root / (CACHE_FILE if self.is_cache else EPISODES)

    @property
    def camera_features(self) -> dict[str, dict[str, Any]]:
        """Return camera key -> its entry in `features`, depth maps left out."""
        pictures = {key: spec for key, spec in self.features.items() if spec["dtype"] in ("image", "video")}
        return {key: spec for key, spec in pictures.items() if is_camera(key) and not is_depth(spec)}

    @property
    def cameras(self) -> dict[str, tuple[int, int, int]]:
        """Return camera key -> recorded (C, H, W)."""
        return {key: image_shape(spec) for key, spec in self.camera_features.items()}

    @property
    def videos(self) -> list[str]:
        """Return the cameras whose pictures are in videos, not in the tables."""
        return [key for key, spec in self.camera_features.items() if spec["dtype"] == "video"]

    @property
    def vector_keys(self) -> list[str]:
        """Return the states and the action that the dataset has."""
        return [key for key in (OBS_STATE, OBS_ENV_STATE, ACTION) if key in self.features]

    @property
    def vectors(self) -> dict[str, int]:
        """Return key -> size of the states and the action."""
        return {key: math.prod(self.features[key]["shape"]) for key in self.vector_keys}

    @property
    def episode_indices(self) -> list[int]:
        """Return the index of every episode, ascending."""
        return [int(row["episode_index"]) for row in self.episodes]

    def rows_of(self, episodes: Collection[int]) -> list[dict[str, Any]]:
        """Return the rows of some episodes, ascending."""
        chosen = set(episodes)
        return [row for row in self.episodes if row["episode_index"] in chosen]

    def data_file(self, row: dict[str, Any]) -> str:
        """Return the path below `root` of the table that holds an episode."""
        return self.info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])

    def video_file(self, row: dict[str, Any], camera: str) -> str:
        """Return the path below `root` of the video that holds an episode of one camera."""
        place = {name: row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index")}
        return self.info["video_path"].format(video_key=camera, **place)

    def files_of(self, episodes: list[int], cameras: list[str]) -> list[str]:
        """Return the files that hold these episodes of these cameras, sorted, relative to `root`."""
        rows = self.rows_of(episodes)
        videos = [camera for camera in cameras if self.features[camera]["dtype"] == "video"]
        files = {self.data_file(row) for row in rows}
        return sorted(files | {self.video_file(row, camera) for row in rows for camera in videos})


def image_shape(spec: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of a camera feature, whichever order its `names` say."""
    shape, names = [int(size) for size in spec["shape"]], spec.get("names")
    if isinstance(names, list) and names:
        channels_first = names[0] in ("channel", "channels")
    else:
        channels_first = shape[0] in (1, 3) and shape[2] not in (1, 3)
    return (shape[0], shape[1], shape[2]) if channels_first else (shape[2], shape[0], shape[1])


def is_depth(spec: dict[str, Any]) -> bool:
    """Tell whether a camera feature is a depth map, which this package does not read."""
    info = {**spec, **(spec.get("video_info") or {}), **(spec.get("info") or {})}  # old and new places of the mark
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def read_metadata(root: Path, repo_id: str, revision: str | None = None) -> DatasetMetadata:
    """Read the metadata of a dataset folder or frame cache.

    Raises:
        InputError: the folder is missing, is no LeRobotDataset v3.0, or its metadata cannot be read.
    """
    fix = "set dataset.root= to the folder that holds meta/, data/ and videos/"
    if not root.is_dir():
        raise InputError(f"dataset.root={root} does not exist: {fix}, or leave it out to use the Hub's {repo_id}")
    try:
        if (root / CACHE_FILE).exists():
            content = json.loads((root / CACHE_FILE).read_text())
            info, rows, repo_id = content["info"], content["episodes"], content["repo_id"]
        elif (root / INFO_FILE).exists():
            info = json.loads((root / INFO_FILE).read_text())
            version = str(info["codebase_version"])
            if not version.startswith("v3"):
                raise InputError(
                    f"dataset.root={root} has format {version}, v3.0 is needed: convert it with "
                    "`python -m lerobot.scripts.convert_dataset_v21_to_v30`"
                )
            rows = read_episode_rows(root)
        else:
            raise InputError(f"dataset.root={root} is no LeRobotDataset: it has no {INFO_FILE}; {fix}")
        metadata = DatasetMetadata(root, repo_id, float(info["fps"]), info["features"], rows, info, revision)
        check_metadata(metadata)
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, OSError, RuntimeError) as error:
        file = CACHE_FILE if (root / CACHE_FILE).exists() else "meta"
        raise InputError(
            f"{root / file} is damaged ({type(error).__name__}: {error}): fetch the dataset again"
        ) from error
    return metadata


def read_episode_rows(root: Path) -> list[dict[str, Any]]:
    """Read the episode tables, statistics left out, sorted by episode."""
    rows: list[dict[str, Any]] = []
    for path in sorted((root / EPISODES).glob("*/*.parquet")):
        names = [name for name in pq.read_schema(path).names if not name.startswith(("stats/", "tasks"))]
        rows += pq.read_table(path, columns=names).to_pylist()
    return sorted(rows, key=lambda row: row["episode_index"])


def find_dataset(repo_id: str, root: str | None = None, revision: str | None = None) -> DatasetMetadata:
    """Find a dataset: `root`, else LeRobot's local cache, else the Hub (metadata only; `fetch_files` brings the rest).

    Raises:
        InputError: nowhere to be found; the message names `dataset.root=`.
    """
    if root is not None:
        return read_metadata(Path(root).expanduser(), repo_id)
    local = lerobot_home() / repo_id
    if revision is None and (local / INFO_FILE).exists():
        return read_metadata(local, repo_id)
    from huggingface_hub.constants import is_offline_mode
    from lerobot.datasets.dataset_metadata import CODEBASE_VERSION, LeRobotDatasetMetadata  # slow: only for the Hub

    cached = find_snapshot(repo_id, revision or CODEBASE_VERSION)
    if cached is not None and is_offline_mode():
        return read_metadata(cached, repo_id, revision or CODEBASE_VERSION)
    try:
        found = LeRobotDatasetMetadata(repo_id, revision=revision)
    except Exception as error:  # requests, huggingface_hub and LeRobot each raise their own
        if cached is not None:
            return read_metadata(cached, repo_id, revision or CODEBASE_VERSION)
        asked = f"dataset.repo_id={repo_id}" + (f" with dataset.revision={revision}" if revision else "")
        raise InputError(
            f"{asked} is not in {lerobot_home()} and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {first_line(error)}): give a local "
            "folder with dataset.root=<folder>, or take the demonstrations in the box: dataset=pusht_demo, or for "
            "keypoints dataset=pusht_demo_keypoints"
        ) from error
    return read_metadata(Path(found.root), repo_id, str(found.revision))


def find_snapshot(repo_id: str, revision: str) -> Path | None:
    """Return the folder of a dataset that LeRobot has fetched from the Hub before, without asking the Hub; or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    try:
        found = snapshot_download(
            repo_id, repo_type="dataset", revision=revision, cache_dir=HF_LEROBOT_HUB_CACHE, local_files_only=True
        )
    except (LocalEntryNotFoundError, ValueError):  # the second: a name that cannot be on the Hub
        return None
    return Path(found) if (Path(found) / INFO_FILE).exists() else None


def fetch_files(metadata: DatasetMetadata, files: list[str]) -> None:
    """Make sure that `files` are there, fetching from the Hub what can be fetched.

    Raises:
        InputError: a file is missing and the dataset did not come from the Hub.
    """
    missing = [file for file in files if not (metadata.root / file).exists()]
    if not missing:
        return
    if metadata.revision is None:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{metadata.root / missing[0]}{more} is missing: copy the whole dataset, or choose other dataset.episodes"
        )
    from huggingface_hub import snapshot_download
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    try:
        snapshot_download(
            metadata.repo_id,
            repo_type="dataset",
            revision=metadata.revision,
            cache_dir=HF_LEROBOT_HUB_CACHE,
            allow_patterns=["meta/*", *files],
        )
    except Exception as error:  # requests and huggingface_hub each raise their own
        raise InputError(
            f"{missing[0]} of dataset.repo_id={metadata.repo_id} could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}): try again, or give a local folder with dataset.root=<folder>"
        ) from error
    if gone := [file for file in files if not (metadata.root / file).exists()]:
        raise InputError(f"dataset.repo_id={metadata.repo_id} has no {gone[0]} on the Hub: its metadata name it")


def lerobot_home() -> Path:
    """Return LeRobot's local dataset folder, by its own environment variables, without importing LeRobot."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_LEROBOT_HOME", Path(HF_HOME) / "lerobot")).expanduser()
