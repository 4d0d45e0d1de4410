"""Keep decoded pictures on disk as plain memory-mapped arrays, and never decode them twice.

A cache is a folder: `cache.json` (what it was made from and how, with checksums), `vectors.safetensors` and one
`<camera>.frames` of raw uint8 (F, H, W, C) per camera. It is self-sufficient: copied to another machine and given as
`dataset.root=`, it trains there without the dataset and without a video decoder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from getiaction.data.cache_folder import make_room, publish, reserve
from getiaction.data.episodes import Episodes, back_to_back, read_low_dimensional
from getiaction.data.frames import decode_camera
from getiaction.data.metadata import CACHE_FILE, DatasetMetadata, fetch_files, image_shape
from getiaction.errors import InputError
from getiaction.files import default_cache_dir, is_full, replace_text
from getiaction.progress import redraw_seconds

FORMAT = 1
BLOCK = 64 << 20  # bytes per checksum
VERIFY_ALL = 2 << 30  # caches up to this size are checked whole on opening, larger ones in SAMPLED blocks
SAMPLED = 32
RACY = 2_000_000_000  # nanoseconds in which a file may be written to twice with one time

VECTORS = "vectors.safetensors"
AGAIN = "copy it again, or delete it"

Size = tuple[int, int]


def load_episodes(
    metadata: DatasetMetadata,
    episodes: list[int],
    cameras: list[str],
    *,
    resize: Size | None = None,
    cache_dir: Path | None = None,
    announce: Callable[[str], Any] = print,
) -> Episodes:
    """Load episodes: vectors into memory, pictures as memory maps, decoding them first if no cache has them.

    Args:
        episodes: dataset indices.
        cameras: camera keys; empty reads no pictures and needs no cache.
        resize: (H, W) of the pictures to keep; None keeps their size.
        cache_dir: where caches lie; None means `default_cache_dir()`.
        announce: called with one line when pictures are about to be decoded.

    Raises:
        InputError: the dataset is damaged or incomplete, or the cache folder cannot be written.
    """
    if metadata.is_cache:
        return open_cache(metadata.root, cameras, resize).select(episodes)
    fetch_files(metadata, metadata.files_of(episodes, cameras))
    if not cameras:
        return read_low_dimensional(metadata, episodes)
    place = cache_dir or default_cache_dir()
    folder = place / "frames"
    everything, wanted = metadata.episode_indices, sorted(episodes)
    choices = [wanted]
    if everything != wanted and not missing_files(metadata, everything, cameras):
        choices.insert(0, everything)  # a cache of all episodes serves any choice of them
    for chosen in choices:
        path = folder / remembered_name(metadata, chosen, cameras, resize, place / "names")
        if path.exists() and (cached := try_open(path, cameras, resize, announce)) is not None:
            return cached.select(episodes)
    build_cache(path, metadata, wanted, cameras, resize, announce)
    return open_cache(path, cameras, resize)


def missing_files(metadata: DatasetMetadata, episodes: list[int], cameras: list[str]) -> bool:
    """Tell whether a file of these episodes is not on this machine."""
    return any(not (metadata.root / file).exists() for file in metadata.files_of(episodes, cameras))


def cache_name(metadata: DatasetMetadata, episodes: list[int], cameras: list[str], resize: Size | None) -> str:
    """Name a cache after the content of its source files and the parameters of decoding."""
    digest = xxhash.xxh3_128()
    parameters = [FORMAT, cameras, resize, metadata.rows_of(episodes)]
    digest.update(json.dumps(parameters).encode())
    for file in ["meta/info.json", *metadata.files_of(episodes, cameras)]:
        digest.update(file.encode())
        for block in read_blocks(metadata.root / file):
            digest.update(block)
    return f"{metadata.repo_id.replace('/', '--')}-{digest.hexdigest()}"


def remembered_name(
    metadata: DatasetMetadata, episodes: list[int], cameras: list[str], resize: Size | None, memory: Path
) -> str:
    """Return `cache_name`; where no source file was written to since, without reading them all again.

    Args:
        memory: folder that keeps each name under sizes and times of its source files.
    """
    files = source_files(metadata, episodes, cameras)
    marks = [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files)]
    parameters = [FORMAT, cameras, resize, metadata.rows_of(episodes), list(map(str, files)), marks]
    note = memory / xxhash.xxh3_128_hexdigest(json.dumps(parameters).encode())
    if note.exists():
        return note.read_text()
    name = cache_name(metadata, episodes, cameras, resize)
    if time.time_ns() - max(written for _, written in marks) > RACY:
        with contextlib.suppress(OSError):  # a cache that is only read serves all the same
            memory.mkdir(parents=True, exist_ok=True)
            replace_text(note, name)
    return name


def source_files(metadata: DatasetMetadata, episodes: list[int], cameras: list[str]) -> list[Path]:
    """Return the files that decide what a cache holds."""
    return [metadata.root.resolve() / file for file in ["meta/info.json", *metadata.files_of(episodes, cameras)]]


def read_blocks(path: Path) -> Iterator[bytes]:
    """Yield a file in blocks of `BLOCK` bytes."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def build_cache(
    path: Path,
    metadata: DatasetMetadata,
    episodes: list[int],
    cameras: list[str],
    resize: Size | None,
    announce: Callable[[str], Any],
) -> None:
    """Decode into a temporary folder, then rename it to `path`: a cache is whole or not there."""
    source = read_low_dimensional(metadata, episodes)
    shapes = {camera: (source.num_frames, *frame_shape(metadata, camera, resize)) for camera in cameras}
    need = sum(int(np.prod(shape)) for shape in shapes.values())
    temporary, held = make_room(path.parent, need)
    try:
        announce(f"decoding {source.num_frames} frames of {', '.join(cameras)} into {path} ({need / 1e9:.2f} GB), once")
        with tqdm(
            total=source.num_frames * len(cameras), desc="decoding", unit=" frames", mininterval=redraw_seconds()
        ) as bar:
            for camera, shape in shapes.items():
                out = reserve(temporary / f"{camera}.frames", shape)
                decode_camera(metadata, episodes, camera, out, progress=bar.update)
                out.flush()
        save_file(dict(source.vectors), temporary / VECTORS)
        rows = [{key: row[key] for key in ("episode_index", "length")} for row in metadata.rows_of(episodes)]
        write_description(temporary, repo_id=metadata.repo_id, info=metadata.info, rows=rows, shapes=shapes)
        publish(temporary, path)
    except OSError as error:
        if not is_full(error):
            raise
        raise InputError(
            f"no room for the frame cache of {need / 1e9:.1f} GB in {path.parent} ({error}): make room, or set "
            "dataset.cache_dir=<folder>"
        ) from error
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


def write_description(
    folder: Path,
    *,
    repo_id: str,
    info: dict[str, Any],
    rows: list[dict[str, int]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Write `cache.json`, which makes a cache of a folder that holds vectors and pictures.

    Args:
        info: `meta/info.json` of the dataset.
        rows: `episode_index` and `length` of each episode, in the order in which they lie.
        shapes: camera key -> (F, H, W, C) of `<camera>.frames`.
    """
    checksums = {file.name: list(map(xxhash.xxh3_64_hexdigest, read_blocks(file))) for file in folder.iterdir()}
    content = {"format": FORMAT, "repo_id": repo_id, "frames": shapes, "checksums": checksums}
    (folder / CACHE_FILE).write_text(json.dumps({**content, "info": info, "episodes": rows}, indent=1))


def frame_shape(metadata: DatasetMetadata, camera: str, resize: Size | None) -> tuple[int, int, int]:
    """Return the (H, W, C) that a camera's pictures are kept in."""
    channels, height, width = metadata.cameras[camera]
    return (*(resize or (height, width)), channels)


def try_open(path: Path, cameras: list[str], resize: Size | None, announce: Callable[[str], Any]) -> Episodes | None:
    """Open a cache; set a damaged one aside, with a line, and return None."""
    try:
        return open_cache(path, cameras, resize)
    except InputError as error:
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.damaged-"))
        announce(f"{error}; moved to {aside}, decoding again")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            path.rename(aside / path.name)
        return None


def open_cache(path: Path, cameras: list[str], resize: Size | None) -> Episodes:
    """Open and verify a frame cache.

    Raises:
        InputError: it is damaged, or lacks these cameras at this size.
    """
    try:
        content = json.loads((path / CACHE_FILE).read_text())
        if content["format"] != FORMAT:
            raise InputError(f"frame cache {path} has format {content['format']}, {FORMAT} is needed: make it again")
        if missing := [camera for camera in cameras if camera not in content["frames"]]:
            has = ", ".join(content["frames"]) or "no pictures"
            raise InputError(f"frame cache {path} has no {', '.join(missing)}; it has {has}")
        shapes = {camera: tuple(content["frames"][camera]) for camera in cameras}
        for camera, shape in shapes.items():
            check_size(path, camera, shape[1:3], resize or image_shape(content["info"]["features"][camera])[1:])
        for name in (*(f"{camera}.frames" for camera in cameras), VECTORS):
            verify(path / name, content["checksums"][name])
        frames = {
            camera: np.memmap(path / f"{camera}.frames", dtype=np.uint8, mode="r", shape=shape)
            for camera, shape in shapes.items()
        }
        indices, lengths = (
            np.array([row[name] for row in content["episodes"]]) for name in ("episode_index", "length")
        )
        vectors = load_file(path / VECTORS)
        return back_to_back(indices, lengths, fps=content["info"]["fps"], vectors=vectors, frames=frames)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"frame cache {path} is damaged ({type(error).__name__}: {error}): {AGAIN}") from error


def check_size(path: Path, camera: str, has: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Check that a cache holds pictures of the size that is asked for.

    Raises:
        InputError: it does not; the message says which `backbone.resize_shape` fits it.
    """
    if tuple(has) != tuple(wanted):
        fix = str(list(has)).replace(" ", "")
        raise InputError(
            f"frame cache {path} holds {camera} at {list(has)}, {list(wanted)} is needed: set "
            f"backbone.resize_shape='{fix}', or make a cache of the other size"
        )


def verify(file: Path, checksums: list[str]) -> None:
    """Compare a file's blocks with their checksums: all of them, or a spread of `SAMPLED` in a large file."""
    if not file.exists():
        raise InputError(f"frame cache {file.parent} is damaged: {file.name} is missing; {AGAIN}")
    blocks = np.arange(len(checksums))
    if file.stat().st_size > VERIFY_ALL:
        blocks = np.unique(np.linspace(0, len(checksums) - 1, SAMPLED).astype(int))
    with file.open("rb") as handle:
        for block in blocks.tolist():
            handle.seek(block * BLOCK)
            if xxhash.xxh3_64_hexdigest(handle.read(BLOCK)) != checksums[block]:
                raise InputError(
                    f"frame cache {file.parent} is damaged: {file.name} does not match its checksum; {AGAIN}"
                )
