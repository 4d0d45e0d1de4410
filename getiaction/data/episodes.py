"""Hold a dataset in memory: one array per feature, episodes back to back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from getiaction.data.metadata import DatasetMetadata
from getiaction.data.stacked import Stacked, span_of
from getiaction.errors import InputError
from getiaction.keys import ACTION

TIMESTAMP, FRAME_INDEX, EPISODE_INDEX = "timestamp", "frame_index", "episode_index"


@dataclass(frozen=True)
class Episodes:
    """Hold E episodes that lie in arrays of F rows, one row a frame.

    Args:
        indices: (E,) each episode's index in the dataset.
        starts: (E,) the row of each episode's first frame.
        lengths: (E,) its number of frames; they are consecutive rows.
        fps: frames per second.
        vectors: key -> (F, D) float32: `action`, `observation.state`, ...
        frames: camera key -> (F, H, W, C) uint8, possibly memory-mapped, possibly of several datasets.
    """

    indices: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    fps: float
    vectors: Mapping[str, np.ndarray]
    frames: Mapping[str, np.ndarray | Stacked]

    @property
    def num_frames(self) -> int:
        """Return the number of frames of these episodes (the arrays may hold more)."""
        return int(self.lengths.sum())

    @property
    def num_rows(self) -> int:
        """Return F, the rows of the arrays."""
        return len(next(iter(self.vectors.values())))

    @property
    def nbytes(self) -> int:
        """Return the bytes of these episodes' vectors and pictures."""
        row = sum(array.nbytes // len(array) for array in (*self.vectors.values(), *self.frames.values()))
        return row * self.num_frames

    @property
    def rows(self) -> np.ndarray:
        """Return the rows of all frames of these episodes, episode by episode."""
        spans = [np.arange(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)

    def fingerprint(self) -> str:
        """Return a checksum of which episodes these are, and of what was done in them."""
        digest = xxhash.xxh3_64()
        for array in (self.indices, self.lengths, self.vectors[ACTION][self.rows]):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def select(self, indices: Collection[int]) -> Episodes:
        """Keep the episodes with these dataset indices; nothing is copied."""
        kept = np.isin(self.indices, list(indices))
        return replace(self, indices=self.indices[kept], starts=self.starts[kept], lengths=self.lengths[kept])

    def compacted(self) -> Episodes:
        """Number the rows of these episodes, and of nothing else, through; pictures stay where they lie."""
        spans = [(int(start), int(start + length)) for start, length in zip(self.starts, self.lengths, strict=True)]
        return replace(
            self,
            starts=np.cumsum(self.lengths) - self.lengths,
            vectors={key: values[self.rows] for key, values in self.vectors.items()},
            frames={key: Stacked([span_of(values, *span) for span in spans]) for key, values in self.frames.items()},
        )

    def in_memory(self) -> Episodes:
        """Copy these episodes, and nothing else, into memory."""
        whole = self.num_rows == self.num_frames
        rows = self.rows
        return replace(
            self,
            starts=self.starts if whole else np.cumsum(self.lengths) - self.lengths,
            vectors={key: values if whole else values[rows] for key, values in self.vectors.items()},
            frames={key: np.array(values) if whole else values[rows] for key, values in self.frames.items()},
        )


def back_to_back(
    indices: np.ndarray,
    lengths: np.ndarray,
    *,
    fps: float,
    vectors: Mapping[str, np.ndarray],
    frames: Mapping[str, np.ndarray],
) -> Episodes:
    """Make `Episodes` whose frames fill the arrays in order."""
    return Episodes(indices, np.cumsum(lengths) - lengths, lengths, fps, vectors, frames)


def read_table(metadata: DatasetMetadata, episodes: list[int], columns: list[str]) -> pa.Table:
    """Read columns of some episodes, sorted by episode and frame.

    Raises:
        InputError: a table is damaged, or disagrees with the metadata about an episode's length.
    """
    rows = metadata.rows_of(episodes)
    if not rows or len(rows) < len(episodes):
        unknown = sorted(set(episodes) - {row["episode_index"] for row in rows})
        raise InputError(f"{metadata.root} has no episodes {unknown or '[]'}, or they are named twice")
    files = sorted({metadata.root / metadata.data_file(row) for row in rows})
    tables = [read_part(path, columns, episodes) for path in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{metadata.root}: its tables disagree ({error}): fetch the dataset again") from error
    table = table.sort_by([(EPISODE_INDEX, "ascending"), (FRAME_INDEX, "ascending")])
    check_frames(metadata, rows, table)
    return table


def read_part(path: Path, columns: list[str], episodes: list[int]) -> pa.Table:
    """Read columns of some episodes from one file.

    Raises:
        InputError: it is damaged, or does not count episodes and frames.
    """
    try:
        table = pq.read_table(path, columns=columns, filters=[(EPISODE_INDEX, "in", episodes)])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): fetch the dataset again") from error
    wanted = {EPISODE_INDEX: pa.types.is_integer, FRAME_INDEX: pa.types.is_integer, TIMESTAMP: pa.types.is_floating}
    for name in wanted.keys() & set(columns):
        if not wanted[name](kind := table.schema.field(name).type):
            raise InputError(f"{path} is damaged ({name} cannot be {kind}): fetch the dataset again")
    return table


def check_frames(metadata: DatasetMetadata, rows: list[dict[str, Any]], table: pa.Table) -> None:
    """Check that a sorted table has every frame of its episodes once.

    Raises:
        InputError: it disagrees with the metadata about an episode's length, or a frame is missing or there twice.
    """
    fix = "fetch the dataset again, or leave it out of dataset.episodes"
    counts = dict(zip(*np.unique(table[EPISODE_INDEX].to_numpy(), return_counts=True), strict=True))
    for row in rows:
        if (count := counts.get(row["episode_index"], 0)) != row["length"]:
            raise InputError(
                f"{metadata.root}: episode {row['episode_index']} has {count} rows, its metadata says {row['length']}: "
                f"{fix}"
            )
    expected = np.concatenate([np.arange(row["length"]) for row in rows])
    if len(wrong := np.flatnonzero(table[FRAME_INDEX].to_numpy() != expected)):
        raise InputError(
            f"{metadata.root}: episode {table[EPISODE_INDEX][wrong[0]]} has no frame_index={expected[wrong[0]]}: {fix}"
        )


def read_vectors(metadata: DatasetMetadata, table: pa.Table) -> dict[str, np.ndarray]:
    """Return key -> (F, D) float32 of every state and action in `table`.

    Raises:
        InputError: a value is not finite.
    """
    vectors = {}
    for key, size in metadata.vectors.items():
        try:
            values = to_matrix(table[key], size)
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise InputError(
                f"{metadata.root}: {key} does not hold {size} numbers in every row ({error}), as its metadata say: "
                "fetch the dataset again"
            ) from error
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            where = f"episode {table[EPISODE_INDEX][row]}, frame {table[FRAME_INDEX][row]}"
            raise InputError(
                f"{metadata.root}: {key} is not finite in {where}: mend it, or leave it out of dataset.episodes"
            )
        vectors[key] = values
    return vectors


def to_matrix(column: pa.ChunkedArray, size: int) -> np.ndarray:
    """Turn a column of numbers or lists into (F, size) float32."""
    array = column.combine_chunks()
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and that is refused
        return np.array(array.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(column), size)


def read_low_dimensional(metadata: DatasetMetadata, episodes: list[int]) -> Episodes:
    """Read episodes without their pictures."""
    columns = [*metadata.vectors, FRAME_INDEX, EPISODE_INDEX]
    table = read_table(metadata, episodes, columns)
    lengths = {row["episode_index"]: row["length"] for row in metadata.episodes}
    indices = np.array(sorted(episodes), dtype=np.int64)
    sizes = np.array([lengths[index] for index in indices], dtype=np.int64)
    return back_to_back(indices, sizes, fps=metadata.fps, vectors=read_vectors(metadata, table), frames={})
