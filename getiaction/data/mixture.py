"""Train on several datasets as if they were one: where they agree, how they are numbered, how often each is seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from getiaction.data.episodes import Episodes
from getiaction.data.metadata import DatasetMetadata
from getiaction.data.stacked import Stacked
from getiaction.data.statistics import split_episodes
from getiaction.data.windows import Windows


@dataclass(frozen=True)
class Source:
    """Say what is taken of one dataset.

    Args:
        metadata: of the dataset.
        key: what the user calls it in the config: `dataset`, or `dataset.sources[1]`.
        episodes: indices of the episodes to use, in the dataset's own numbers.
        val_episodes: those held out, or None to choose a share.
        weight: how often it is seen, in relation to the others'; None: as often as its size says.
        offset: what is added to its episodes' indices, so that every episode of a mixture has a number of its own.
    """

    metadata: DatasetMetadata
    key: str = "dataset"
    episodes: list[int] | None = None
    val_episodes: list[int] | None = None
    weight: float | None = None
    offset: int = 0

    @property
    def chosen(self) -> list[int]:
        """Return the indices of the episodes to use."""
        return self.metadata.episode_indices if self.episodes is None else self.episodes

    @property
    def num_frames(self) -> int:
        """Return the frames of these episodes."""
        return sum(int(row["length"]) for row in self.metadata.rows_of(self.chosen))

    def describe(self) -> str:
        """Say in one line what this is."""
        size = f"{len(self.chosen)} episodes, {self.num_frames} frames at {self.metadata.fps:g} Hz"
        return f"{self.metadata.root}, {size}" + (f", weight {self.weight:g}" if self.weight is not None else "")


@dataclass(frozen=True)
class Mixture:
    """Hold the datasets of a run: one, or several that agree in all that the policy uses.

    The episodes of the second dataset are numbered on from the first's: `Source.offset` says from where.
    """

    sources: tuple[Source, ...]

    @classmethod
    def of(cls, *sources: Source) -> Mixture:
        """Number the episodes of the sources through."""
        offsets = np.cumsum([0, *(source.metadata.episode_indices[-1] + 1 for source in sources)])
        return cls(tuple(replace(source, offset=int(o)) for source, o in zip(sources, offsets, strict=False)))

    @property
    def metadata(self) -> DatasetMetadata:
        """Return the metadata of the first dataset: in what the policy uses, the others have the same."""
        return self.sources[0].metadata

    @property
    def weights(self) -> tuple[float, ...]:
        """Return how often each source is seen, in relation to the others; empty: as their sizes say."""
        return tuple(source.weight for source in self.sources if source.weight is not None)

    def splits(self, val_fraction: float, seed: int) -> list[tuple[list[int], list[int]]]:
        """Hold out whole episodes of each source, the same ones as if it were alone.

        Returns:
            For each source, the episodes to train on and those held out, in its own numbers.

        Raises:
            InputError: a held-out episode is not among the chosen, or none is left for training.
        """
        return [
            split_episodes(
                list(source.chosen),
                val_fraction=val_fraction,
                val_episodes=source.val_episodes,
                seed=seed,
                key=source.key,
            )
            for source in self.sources
        ]

    def split(self, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Return all episodes to train on, and all that are held out, numbered through."""
        training, held_out = [], []
        for source, parts in zip(self.sources, self.splits(val_fraction, seed), strict=True):
            training += [source.offset + index for index in parts[0]]
            held_out += [source.offset + index for index in parts[1]]
        return training, held_out

    def count_samples(self, windows: Windows) -> tuple[int, ...]:
        """Return how many samples of each source are among the windows."""
        return tuple(windows.count(s.offset, s.offset + s.metadata.episode_indices[-1] + 1) for s in self.sources)

    def concatenate(self, parts: list[Episodes]) -> Episodes:
        """Make one of what was loaded of each source; pictures are not copied."""
        if len(parts) == 1:
            return parts[0]
        first_rows = np.cumsum([0, *(part.num_rows for part in parts)])
        keys = [key for key in parts[0].vectors if all(key in part.vectors for part in parts)]
        return Episodes(
            indices=np.concatenate([part.indices + s.offset for part, s in zip(parts, self.sources, strict=True)]),
            starts=np.concatenate([part.starts + row for part, row in zip(parts, first_rows, strict=False)]),
            lengths=np.concatenate([part.lengths for part in parts]),
            fps=parts[0].fps,
            vectors={key: np.concatenate([part.vectors[key] for part in parts]) for key in keys},
            frames={
                # as they are: a memory map that np.asarray has seen is none any more
                camera: Stacked([cast(np.ndarray, part.frames[camera]) for part in parts])
                for camera in parts[0].frames
            },
        )

    def disagreements(self, keys: list[str]) -> Iterator[str]:
        """Yield in what the sources differ from the first, so that no policy could learn from them together.

        Args:
            keys: the features that the policy uses.
        """
        first = self.sources[0]
        for other in self.sources[1:]:
            both = f"{first.key} ({first.metadata.root}) and {other.key} ({other.metadata.root})"
            if other.metadata.fps != first.metadata.fps:
                rates = f"{first.metadata.fps:g} and {other.metadata.fps:g} Hz"
                yield f"{both} were recorded at {rates}: one policy has one rate; resample one of them"
            for key in keys:
                mine, yours = (shape_of(source.metadata, key) for source in (first, other))
                if mine != yours:
                    yield f"{both} disagree about {key}: {mine or 'missing'} and {yours or 'missing'}"

    def other_names(self, keys: list[str]) -> Iterator[str]:
        """Yield which features have the same shape, and numbers of other names: they may mean something else."""
        first = self.sources[0]
        for other in self.sources[1:]:
            for key in keys:
                mine, yours = (source.metadata.features[key].get("names") for source in (first, other))
                if key in first.metadata.vectors and mine and yours and mine != yours:
                    yield (
                        f"{first.key} and {other.key} name the numbers of {key} differently, {mine} and {yours}: they "
                        "are taken as the same, in this order"
                    )

    def overlaps(self) -> Iterator[str]:
        """Yield which sources have episodes in common: they would be held out in one and trained on in the other."""
        for number, other in enumerate(self.sources):
            for source in self.sources[:number]:
                same = source.metadata.root.resolve() == other.metadata.root.resolve()
                if same and (both := sorted(set(source.chosen) & set(other.chosen))):
                    yield (
                        f"{source.key} and {other.key} are both {source.metadata.root} and share {len(both)} episodes "
                        f"({both[0]}, ...): name it once, and give it a larger weight"
                    )


def shape_of(metadata: DatasetMetadata, key: str) -> Any:
    """Return the size of a vector, (C, H, W) of a camera, or None."""
    return metadata.vectors.get(key) or metadata.cameras.get(key)
