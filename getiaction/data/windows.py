"""Say which frames make a sample: To observations up to now, T actions from the first of them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from getiaction.data.episodes import Episodes
from getiaction.errors import InputError


def observation_deltas(n_obs_steps: int) -> list[int]:
    """Return the frames of the observations, relative to now: [1 - To, ..., 0]."""
    return list(range(1 - n_obs_steps, 1))


def action_deltas(n_obs_steps: int, horizon: int) -> list[int]:
    """Return the frames of the actions, relative to now: [1 - To, ..., T - To]."""
    return list(range(1 - n_obs_steps, 1 - n_obs_steps + horizon))


def delta_timestamps(keys: Sequence[str], *, n_obs_steps: int, horizon: int, fps: float) -> dict[str, list[float]]:
    """Return LeRobot's `delta_timestamps` (seconds) for these keys: what training uses."""
    observations, actions = observation_deltas(n_obs_steps), action_deltas(n_obs_steps, horizon)
    return {key: [delta / fps for delta in (actions if key == "action" else observations)] for key in keys}


def check_delta_timestamps(
    given: Mapping[str, Sequence[float]], *, n_obs_steps: int, horizon: int, fps: float, tolerance_s: float = 1e-4
) -> None:
    """Compare explicit `delta_timestamps` with what To, T and the dataset's frame rate ask for.

    Raises:
        InputError: they differ; the message shows what to write.
    """
    for key, expected in delta_timestamps(list(given), n_obs_steps=n_obs_steps, horizon=horizon, fps=fps).items():
        values = [float(value) for value in given[key]]
        rule = (
            f"policy.n_obs_steps={n_obs_steps}"
            + (f", policy.horizon={horizon}" if key == "action" else "")
            + f" at {fps:g} fps"
        )
        shown = (
            f"[{expected[0]:g}, ..., {expected[-1]:g}]"
            if len(expected) > 3
            else str([round(value, 4) for value in expected])
        )
        steps = f"{len(expected)} steps, {1 / fps:g} s apart"
        fix = f"leave dataset.delta_timestamps out (it is derived), or use {shown} ({steps})"
        if len(values) != len(expected):
            raise InputError(
                f"dataset.delta_timestamps.{key} has {len(values)} steps, {rule} needs {len(expected)}: {fix}"
            )
        if not all(abs(value - wanted) <= tolerance_s for value, wanted in zip(values, expected, strict=True)):
            raise InputError(
                f"dataset.delta_timestamps.{key}=[{values[0]:g}, ..., {values[-1]:g}] does not fit {rule}: {fix}"
            )


class Windows:
    """List the samples of some episodes.

    Every frame is the "now" of one sample, the last `drop_n_last_frames` of an episode left out. Frames before the
    start or past the end repeat the first or last frame; `action_is_pad` marks them.

    Args:
        episodes: the episodes to take samples from.
        n_obs_steps: To.
        horizon: T.
        drop_n_last_frames: frames at each episode's end that start no sample.

    Raises:
        InputError: no episode is long enough for one sample.
    """

    def __init__(self, episodes: Episodes, *, n_obs_steps: int, horizon: int, drop_n_last_frames: int) -> None:
        counts = np.maximum(episodes.lengths - drop_n_last_frames, 0)
        if not counts.any():
            raise InputError(
                f"none of the {len(counts)} episodes is longer than policy.drop_n_last_frames={drop_n_last_frames}: "
                "lower it, or choose other dataset.episodes"
            )
        self.indices = episodes.indices  # (E,) in the dataset
        self.starts = episodes.starts.astype(np.int64)  # (E,) first row
        self.lasts = self.starts + episodes.lengths - 1  # (E,) last row
        self.ends = np.cumsum(counts)  # (E,) samples of this episode and those before it
        self.observation_deltas = np.array(observation_deltas(n_obs_steps))  # (To,)
        self.action_deltas = np.array(action_deltas(n_obs_steps, horizon))  # (T,)

    def __len__(self) -> int:
        """Return M, the number of samples."""
        return int(self.ends[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (B,) which episode, by its place in `indices`, and (B,) which of its frames is "now"."""
        episode = np.searchsorted(self.ends, ids, side="right")
        return episode, ids - np.where(episode > 0, self.ends[episode - 1], 0)

    def count(self, first: int, stop: int) -> int:
        """Return how many samples are of the episodes with indices in [first, stop)."""
        counts = np.diff(self.ends, prepend=0)
        return int(counts[(self.indices >= first) & (self.indices < stop)].sum())

    def observation_rows(self, ids: np.ndarray) -> np.ndarray:
        """Return (B, To) rows of the observations of samples `ids` (B,)."""
        return self._rows(ids, self.observation_deltas)[0]

    def action_rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (B, T) rows of the actions, and (B, T) which of them are padding."""
        return self._rows(ids, self.action_deltas)

    def _rows(self, ids: np.ndarray, deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows at `deltas` from now, those outside an episode taken from its edge, and which those are."""
        episode, frame = self.locate(ids)
        wanted = (self.starts[episode] + frame)[:, None] + deltas
        rows = np.clip(wanted, self.starts[episode, None], self.lasts[episode, None])
        return rows, rows != wanted
