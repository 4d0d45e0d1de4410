"""Check what a dataset says of itself before anything is read by it: it may be damaged, or made to mislead."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from getiaction.errors import InputError
from getiaction.keys import ACTION

if TYPE_CHECKING:
    from getiaction.data.metadata import DatasetMetadata

PLACE = re.compile(r"\{(\w+)(:0?\d{1,2}d)?\}")  # what a path may leave open: {chunk_index:03d}, and no attributes
AGAIN = "fetch the dataset again"


def check_metadata(metadata: DatasetMetadata) -> None:
    """Check that the metadata say what reading the dataset needs, and lead to no file outside it.

    Raises:
        InputError: something is missing, or cannot be.
    """
    if not metadata.episodes:
        raise InputError(f"{metadata.root} has no episodes: its meta/episodes holds no table with rows; {AGAIN}")
    check_features(metadata)
    if not (math.isfinite(metadata.fps) and metadata.fps > 0):
        raise InputError(f"{metadata.file}: fps={metadata.fps} must be positive: {AGAIN}")
    if not metadata.is_cache:  # which holds all that it needs
        check_path(metadata, "data_path", ("chunk_index", "file_index"))
        if metadata.videos:
            check_path(metadata, "video_path", ("video_key", "chunk_index", "file_index"))
    check_rows(metadata)


def check_features(metadata: DatasetMetadata) -> None:
    """Check the names and shapes of the features that can be used."""
    if ACTION not in metadata.features:
        shown = ", ".join(metadata.features)
        raise InputError(f"{metadata.root} has no 'action', only {shown}: there is nothing to learn")
    for key in (*metadata.camera_features, *metadata.vector_keys):
        shape = metadata.features[key].get("shape")
        sizes = shape if isinstance(shape, list) and all(is_whole(size, 1) for size in shape) else []
        if not sizes or (key in metadata.camera_features and len(sizes) != 3):
            raise InputError(f"{metadata.file}: {key} has the shape {shape}, which cannot be: {AGAIN}")
        if "/" in key:
            raise InputError(f"{metadata.file}: {key} has a / in its name, which LeRobot does not allow: {AGAIN}")


def check_path(metadata: DatasetMetadata, name: str, places: tuple[str, ...]) -> None:
    """Check that a path leaves open only what is known, and stays below the dataset's folder."""
    path = metadata.info.get(name)
    if not path:
        raise InputError(f"{metadata.file} has no {name}: {AGAIN}")
    if not isinstance(path, str) or re.search("[{}]", PLACE.sub(lambda m: "" if m[1] in places else m[0], path)):
        raise InputError(f"{metadata.file}: {name}={path} may leave open {', '.join(places)} and nothing else: {AGAIN}")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise InputError(f"{metadata.file}: {name}={path} leads out of the dataset's folder: nothing of it is read")


def check_rows(metadata: DatasetMetadata) -> None:
    """Check what the episode tables say of each episode: its index, its length, and where it lies."""
    least = {"episode_index": 0, "length": 1}
    if not metadata.is_cache:
        files = ["data", *(f"videos/{camera}" for camera in metadata.videos)]
        least |= {f"{file}/{name}": 0 for file in files for name in ("chunk_index", "file_index")}
    times = [] if metadata.is_cache else [f"videos/{camera}/from_timestamp" for camera in metadata.videos]
    for row in metadata.episodes:
        wrong = [name for name, number in least.items() if not is_whole(row.get(name), number)]
        wrong += [name for name in times if not is_time(row.get(name))]
        if wrong:
            shown = f"{metadata.episode_file}: episode {row.get('episode_index')} has {wrong[0]}={row.get(wrong[0])}"
            raise InputError(f"{shown}, which cannot be: {AGAIN}")
    if twice := [index for index, count in Counter(metadata.episode_indices).items() if count > 1]:
        raise InputError(f"{metadata.episode_file} names the episodes {twice[:5]} twice: {AGAIN}")


def is_whole(value: Any, least: int) -> bool:
    """Tell whether a value is a whole number that is not too small, nor more than a file can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**48


def is_time(value: Any) -> bool:
    """Tell whether a value is a time in seconds."""
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
