"""Decode pictures in file order: videos with PyAV, stored images with torchvision. Nothing is ever sought."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional

from getiaction.data.episodes import EPISODE_INDEX, FRAME_INDEX, TIMESTAMP, read_table
from getiaction.data.metadata import DatasetMetadata
from getiaction.errors import InputError

CHUNK = 256  # frames resized and written at a time
TOLERANCE_S = 1e-4  # LeRobot's: how far a picture's time may be from its row's


def decode_camera(
    metadata: DatasetMetadata,
    episodes: list[int],
    camera: str,
    out: np.ndarray,
    *,
    progress: Callable[[int], Any],
) -> None:
    """Decode one camera of some episodes into `out`.

    Args:
        out: (F, H, W, C) uint8; rows in the order of `read_table`. Pictures of another size are resized (bilinear,
            antialiased).
        progress: called with the number of frames just written.

    Raises:
        InputError: a picture is missing or cannot be decoded.
    """
    is_video = metadata.features[camera]["dtype"] == "video"
    source = decode_videos if is_video else decode_images
    rows: list[int] = []
    images: list[np.ndarray] = []
    written = np.zeros(len(out), dtype=bool)

    def flush() -> None:
        out[rows] = resize(np.stack(images), out.shape[1:3])
        written[rows] = True
        progress(len(rows))
        rows.clear()
        images.clear()

    for row, image in source(metadata, episodes, camera):
        rows.append(row)
        images.append(image)
        if len(rows) == CHUNK:
            flush()
    if rows:
        flush()
    if not written.all():
        raise InputError(
            f"{metadata.root}: {camera} has no picture for {int((~written).sum())} of {len(out)} frames: fetch the "
            "dataset again"
        )


def resize(images: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resize (n, H, W, C) uint8 pictures to `size` (H, W): within one grey level of torchvision's Resize, 8x faster."""
    if images.shape[1:3] == tuple(size):
        return images
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)  # (n, C, H, W), channels last
    resized = functional.interpolate(tensor, list(size), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()


def decode_videos(metadata: DatasetMetadata, episodes: list[int], camera: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (row, (H, W, C) uint8) for every wanted frame of every video file, in file order."""
    table = read_table(metadata, episodes, [TIMESTAMP, FRAME_INDEX, EPISODE_INDEX])
    times = table[TIMESTAMP].to_numpy().astype(np.float64)
    per_file: dict[str, list[tuple[float, int]]] = {}
    first = 0
    for episode in metadata.rows_of(episodes):
        offset = episode[f"videos/{camera}/from_timestamp"]
        wanted = per_file.setdefault(metadata.video_file(episode, camera), [])
        wanted += [(offset + times[row], row) for row in range(first, first + episode["length"])]
        first += episode["length"]
    for file, wanted in sorted(per_file.items()):
        for row, image in decode_video(metadata.root / file, sorted(wanted)):
            check_size(metadata, camera, image.shape[:2])
            yield row, image


def check_size(metadata: DatasetMetadata, camera: str, size: tuple[int, ...]) -> None:
    """Check that a picture has the (H, W) that the metadata say, for which the policy is built.

    Raises:
        InputError: it has another one.
    """
    if size != metadata.cameras[camera][1:]:
        has, said = (f"{height}x{width}" for height, width in (size, metadata.cameras[camera][1:]))
        raise InputError(
            f"{metadata.root}: {camera} has a picture of {has}, its metadata say {said}: fetch the dataset again"
        )


def decode_video(path: Path, wanted: list[tuple[float, int]]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames of one video at the `wanted` (time in seconds, row), both ascending."""
    import av

    position = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            assert stream.time_base is not None
            for frame in container.decode(stream):
                if position == len(wanted):
                    return
                if frame.pts is None:
                    continue
                late = float(frame.pts * stream.time_base) - wanted[position][0]
                if late > TOLERANCE_S:
                    break  # the frame that was due is not in the file
                if late > -TOLERANCE_S:
                    image = frame.to_ndarray(format="rgb24")
                    yield wanted[position][1], image
                    position += 1
    except (av.FFmpegError, OSError, IndexError) as error:
        raise InputError(f"{path} cannot be decoded ({error}): fetch the dataset again") from error
    if position < len(wanted):
        raise InputError(
            f"{path} has no frame at {wanted[position][0]:.3f} s, which the dataset's table names: fetch the "
            "dataset again"
        )


def decode_images(metadata: DatasetMetadata, episodes: list[int], camera: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (row, (H, W, C) uint8) for pictures stored in the tables, a few at a time, in file order."""
    table = read_table(metadata, episodes, [FRAME_INDEX, EPISODE_INDEX])
    places = zip(table[EPISODE_INDEX].to_pylist(), table[FRAME_INDEX].to_pylist(), strict=True)
    row_of = {place: row for row, place in enumerate(places)}
    for path in sorted({metadata.root / metadata.data_file(row) for row in metadata.rows_of(episodes)}):
        try:
            columns = [camera, FRAME_INDEX, EPISODE_INDEX]
            for part in pq.ParquetFile(path).iter_batches(batch_size=64, columns=columns):
                for cell in part.to_pylist():
                    place = (cell[EPISODE_INDEX], cell[FRAME_INDEX])
                    if place in row_of:
                        yield row_of[place], decode_cell(cell.get(camera), metadata, camera, place)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged ({error}): fetch the dataset again") from error


def decode_cell(cell: Any, metadata: DatasetMetadata, camera: str, place: tuple[int, int]) -> np.ndarray:
    """Decode one stored picture, {"bytes", "path"}, to (H, W, C) uint8.

    Raises:
        InputError: there is none in the dataset's folder, or it is damaged, or of another size.
    """
    from torchvision.io import ImageReadMode, decode_image

    try:
        content = cell["bytes"] if cell["bytes"] is not None else file_below(metadata.root, cell["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as opened:  # reads no pixels: a huge picture must not fill the memory
            check_size(metadata, camera, opened.size[::-1])
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return decode_image(data, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except InputError:
        raise
    except (RuntimeError, OSError, LookupError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{metadata.root}: {camera} has no picture that can be decoded in episode {place[0]}, frame {place[1]} "
            f"({error}): fetch the dataset again, or leave its episode out of dataset.episodes"
        ) from error


def file_below(root: Path, path: str) -> Path:
    """Return a file named by a dataset, which may name none outside its folder.

    Raises:
        ValueError: the path leads out of `root`.
    """
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise ValueError(f"{path} leads out of the dataset's folder")
    return root / path
