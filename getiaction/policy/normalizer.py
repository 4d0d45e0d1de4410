"""Bring observations and actions to the network's range, and actions back; the maths of LeRobot's processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from getiaction.keys import ACTION, OBS_ENV_STATE, OBS_STATE, is_camera

Ranges = tuple[Tensor, Tensor, Tensor]
"""Shift, scale and offset of one feature, each of the shape of its statistics."""

Statistics = Mapping[str, Mapping[str, Tensor]]
"""key -> {"min", "max", "mean", "std"} -> (D,) for vectors, (C, 1, 1) in [0, 1] for cameras."""

MODES = ("mean_std", "min_max", "identity")
EPS = 1e-8  # LeRobot's: added to std, and standing in for a range of zero


def kind_of(key: str) -> str:
    """Return which entry of `modes` rules `key`: "visual", "state", "env" or "action"."""
    return "visual" if is_camera(key) else {OBS_STATE: "state", OBS_ENV_STATE: "env", ACTION: "action"}[key]


class Normalizer(nn.Module):
    """Normalise a batch, and take actions back to the dataset's units.

    Each feature becomes `(x - shift) * scale + offset`; min_max maps to [-1, 1], mean_std to zero mean and unit
    variance. Its buffers are no part of the state dict: checkpoints keep them in LeRobot's processor files.

    Args:
        statistics: of the training episodes, per key.
        modes: kind ("visual", "state", "env", "action") -> "mean_std" | "min_max" | "identity".

    Raises:
        ValueError: an unknown mode, or statistics that a mode needs and that are missing.
    """

    def __init__(self, statistics: Statistics, modes: Mapping[str, str]) -> None:
        super().__init__()
        self.modes = dict(modes)
        self.statistics = {
            key: {name: value.float() for name, value in stats.items()} for key, stats in statistics.items()
        }
        self._index = {key: index for index, key in enumerate(self.statistics)}
        for key, stats in self.statistics.items():
            for name, value in zip(
                ("shift", "scale", "offset"), affine(key, stats, self.modes[kind_of(key)]), strict=True
            ):
                self.register_buffer(f"{name}_{self._index[key]}", value, persistent=False)

    def ranges(self, key: str) -> Ranges | None:
        """Return what normalises a feature; None if it has no statistics."""
        index = self._index.get(key)
        if index is None:
            return None
        return self.get_buffer(f"shift_{index}"), self.get_buffer(f"scale_{index}"), self.get_buffer(f"offset_{index}")

    def normalize(self, key: str, value: Tensor) -> Tensor:
        """Normalise one feature, (..., D) or (..., C, H, W); uint8 pictures count as value / 255."""
        return normalize_by(self.ranges(key), value)

    def unnormalize(self, key: str, value: Tensor) -> Tensor:
        """Take a normalised feature, (..., D), back to the dataset's units."""
        ranges = self.ranges(key)
        if ranges is None:
            return value
        shift, scale, offset = ranges
        return (value - offset) / scale + shift

    def forward(self, batch: Mapping[str, Tensor], *, skip: Sequence[str] = ()) -> dict[str, Tensor]:
        """Normalise every feature of a batch that has statistics, and pictures; pass the rest through.

        Args:
            batch: key -> (B, To or T, D), raw units, or (B, To, C, h, w), uint8 or in [0, 1].
            skip: keys to pass through as well.

        Returns:
            The same keys and shapes.
        """
        return {
            key: self.normalize(key, value) if key not in skip and (key in self._index or is_camera(key)) else value
            for key, value in batch.items()
        }


def normalize_by(ranges: Ranges | None, value: Tensor) -> Tensor:
    """Normalise one feature, (..., D) or (..., C, H, W); uint8 pictures count as value / 255."""
    if value.dtype == torch.uint8:
        value = value.float().div_(255)
    if ranges is None:
        return value
    shift, scale, offset = ranges
    return (value - shift) * scale + offset


def affine(key: str, stats: Mapping[str, Tensor], mode: str) -> Ranges:
    """Return what normalises one feature.

    Raises:
        ValueError: the mode is unknown, or needs statistics that are missing.
    """
    if mode not in MODES:
        raise ValueError(f"policy.normalization.{kind_of(key)}={mode!r} must be one of {', '.join(MODES)}")
    needed = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "identity": ()}[mode]
    if missing := [name for name in needed if name not in stats]:
        raise ValueError(
            f"{key} has no {' and no '.join(missing)}, which policy.normalization.{kind_of(key)}={mode} needs"
        )
    if mode == "mean_std":
        mean, std = stats["mean"].float(), stats["std"].float()
        return mean, 1 / (std + EPS), torch.zeros_like(mean)
    if mode == "min_max":
        low, span = stats["min"].float(), stats["max"].float() - stats["min"].float()
        return low, 2 / torch.where(span == 0, EPS, span), torch.full_like(low, -1.0)
    anyone = torch.as_tensor(next(iter(stats.values()))).float()
    return torch.zeros_like(anyone), torch.ones_like(anyone), torch.zeros_like(anyone)
