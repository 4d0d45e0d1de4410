"""Keep decoded pictures on disk as plain memory-mapped arrays, and never decode them twice.

A cache is a folder: `cache.json` (what it was made from and how, with checksums), `vectors.safetensors` and one
`<camera>.frames` of raw uint8 (F, H, W, C) per camera. It is self-sufficient: copied to another machine and given as
`dataset.root=`, it trains there without the dataset and without a video decoder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from getiaction.data.episodes import Episodes, back_to_back, read_low_dimensional
from getiaction.data.frames import decode_camera
from getiaction.data.metadata import CACHE_FILE, DatasetMetadata, fetch_files
from getiaction.errors import InputError

FORMAT = 1
BLOCK = 64 << 20  # bytes per checksum
VERIFY_ALL = 2 << 30  # caches up to this size are checked whole on opening, larger ones in SAMPLED blocks
SAMPLED = 32

Size = tuple[int, int]


def default_cache_dir() -> Path:
    """Return `$GETIACTION_CACHE`, or `~/.cache/getiaction`."""
    return Path(os.environ.get("GETIACTION_CACHE", Path.home() / ".cache" / "getiaction")).expanduser()


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
    folder = (cache_dir or default_cache_dir()) / "frames"
    everything = metadata.episode_indices
    for chosen in (everything, sorted(episodes)):  # a cache of all episodes serves any choice of them
        if chosen is everything and missing_files(metadata, chosen, cameras):
            continue
        path = folder / cache_name(metadata, chosen, cameras, resize)
        if (path / CACHE_FILE).exists() and (cached := try_open(path, cameras, resize, announce)) is not None:
            return cached.select(episodes)
    path = folder / cache_name(metadata, sorted(episodes), cameras, resize)
    build_cache(path, metadata, sorted(episodes), cameras, resize, announce)
    return open_cache(path, cameras, resize)


def missing_files(metadata: DatasetMetadata, episodes: list[int], cameras: list[str]) -> bool:
    """Tell whether a file of these episodes is not on this machine."""
    return any(not (metadata.root / file).exists() for file in metadata.files_of(episodes, cameras))


def cache_name(metadata: DatasetMetadata, episodes: list[int], cameras: list[str], resize: Size | None) -> str:
    """Name a cache after the content of its source files and the parameters of decoding."""
    digest = xxhash.xxh3_128()
    parameters = [FORMAT, cameras, resize, episodes]
    digest.update(json.dumps(parameters).encode())
    for file in ["meta/info.json", *metadata.files_of(episodes, cameras)]:
        digest.update(file.encode())
        for block in read_blocks(metadata.root / file):
            digest.update(block)
    return f"{metadata.repo_id.replace('/', '--')}-{digest.hexdigest()}"


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
    shapes = {camera: frame_shape(metadata, camera, resize) for camera in cameras}
    need = sum(source.num_frames * int(np.prod(shape)) for shape in shapes.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < need:
            raise InputError(
                f"the frame cache needs {need / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f}: set dataset.cache_dir="
            )
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".building-"))
    except OSError as error:
        raise InputError(
            f"the frame cache {path.parent} cannot be written ({error}): set dataset.cache_dir=<folder>"
        ) from error
    announce(f"decoding {source.num_frames} frames of {', '.join(cameras)} into {path} ({need / 1e9:.2f} GB), once")
    try:
        checksums = {}
        with tqdm(
            total=source.num_frames * len(cameras),
            desc="decoding",
            unit=" frames",
            mininterval=0.1 if sys.stderr.isatty() else 30,
        ) as bar:
            for camera in cameras:
                file = temporary / f"{camera}.frames"
                out = np.memmap(file, dtype=np.uint8, mode="w+", shape=(source.num_frames, *shapes[camera]))
                decode_camera(metadata, episodes, camera, out, progress=bar.update)
                out.flush()
                checksums[file.name] = [xxhash.xxh3_64_hexdigest(block) for block in read_blocks(file)]
        save_file(dict(source.vectors), temporary / "vectors.safetensors")
        checksums["vectors.safetensors"] = [
            xxhash.xxh3_64_hexdigest(block) for block in read_blocks(temporary / "vectors.safetensors")
        ]
        chosen = set(episodes)
        content = {
            "format": FORMAT,
            "repo_id": metadata.repo_id,
            "resize": resize,
            "frames": {camera: [source.num_frames, *shape] for camera, shape in shapes.items()},
            "checksums": checksums,
            "info": metadata.info,
            "episodes": [
                {"episode_index": row["episode_index"], "length": row["length"]}
                for row in metadata.episodes
                if row["episode_index"] in chosen
            ],
        }
        (temporary / CACHE_FILE).write_text(json.dumps(content, indent=1))
        publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Move a finished folder to its place; one that another process finished first stays."""
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        temporary.rename(path)
    except OSError:
        if not (path / CACHE_FILE).exists():
            raise


def frame_shape(metadata: DatasetMetadata, camera: str, resize: Size | None) -> tuple[int, int, int]:
    """Return the (H, W, C) that a camera's pictures are kept in."""
    channels, height, width = metadata.cameras[camera]
    return (*(resize or (height, width)), channels)


def try_open(path: Path, cameras: list[str], resize: Size | None, announce: Callable[[str], Any]) -> Episodes | None:
    """Open a cache; set a damaged one aside, with a line, and return None."""
    try:
        return open_cache(path, cameras, resize)
    except InputError as error:
        aside = path.with_name(f"{path.name}.damaged-{os.getpid()}")
        announce(f"{error}; moved to {aside.name}, decoding again")
        path.rename(aside)
        return None


def open_cache(path: Path, cameras: list[str], resize: Size | None) -> Episodes:
    """Open and verify a frame cache.

    Raises:
        InputError: it is damaged, or lacks these cameras at this size.
    """
    content = json.loads((path / CACHE_FILE).read_text())
    if content.get("format") != FORMAT:
        raise InputError(f"frame cache {path} has format {content.get('format')}, {FORMAT} is needed: make it again")
    if missing := [camera for camera in cameras if camera not in content["frames"]]:
        raise InputError(
            f"frame cache {path} has no {', '.join(missing)}; it has {', '.join(content['frames']) or 'no pictures'}"
        )
    frames = {}
    for camera in cameras:
        shape = tuple(content["frames"][camera])
        if resize is not None and tuple(shape[1:3]) != tuple(resize):
            raise InputError(
                f"frame cache {path} holds {camera} at {list(shape[1:3])}, backbone.resize_shape={list(resize)} is "
                "needed"
            )
        file = path / f"{camera}.frames"
        if not file.exists() or file.stat().st_size != np.prod(shape):
            raise InputError(f"frame cache {path} is damaged: {file.name} is missing or cut short")
        frames[camera] = np.memmap(file, dtype=np.uint8, mode="r", shape=shape)
        verify(file, content["checksums"][file.name])
    verify(path / "vectors.safetensors", content["checksums"]["vectors.safetensors"])
    indices, lengths = (np.array([row[name] for row in content["episodes"]]) for name in ("episode_index", "length"))
    vectors = load_file(path / "vectors.safetensors")
    return back_to_back(indices, lengths, fps=content["info"]["fps"], vectors=vectors, frames=frames)


def verify(file: Path, checksums: list[str]) -> None:
    """Compare a file's blocks with their checksums: all of them, or a spread of `SAMPLED` in a large file."""
    size = file.stat().st_size
    blocks = range(len(checksums))
    if size > VERIFY_ALL:
        blocks = sorted({int(index) for index in np.linspace(0, len(checksums) - 1, SAMPLED)})  # type: ignore[assignment]
    with file.open("rb") as handle:
        for block in blocks:
            handle.seek(block * BLOCK)
            if xxhash.xxh3_64_hexdigest(handle.read(BLOCK)) != checksums[block]:
                raise InputError(f"frame cache {file.parent} is damaged: {file.name} does not match its checksum")
