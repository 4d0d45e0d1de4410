"""Compute what normalisation needs, from the training episodes only; and split episodes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from getiaction.data.episodes import Episodes
from getiaction.data.mirror import Mirror
from getiaction.data.stacked import Stacked
from getiaction.errors import InputError
from getiaction.random import Purpose, generator

IMAGE_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's, LeRobot's default
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # maps [0, 1] to [-1, 1]; the published PushT checkpoint's
}
SAMPLED_FRAMES = 1000  # pictures read for image_stats=dataset


def compute_statistics(
    episodes: Episodes, image_stats: str, mirror: Mirror | None = None
) -> dict[str, dict[str, Tensor]]:
    """Return key -> {"min", "max", "mean", "std"} of the given episodes.

    Args:
        episodes: the training episodes.
        image_stats: "imagenet", "half" (fixed mean and std), or "dataset" (measured on a spread of pictures).
        mirror: count every vector that it knows as its mirror image as well.

    Returns:
        (D,) tensors for vectors, (C, 1, 1) in [0, 1] for cameras.

    Raises:
        KeyError: `image_stats` is unknown.
    """
    rows = episodes.rows
    statistics = {}
    for key, values in episodes.vectors.items():
        chosen = values[rows].astype(np.float64)
        if mirror is not None and len(mirror.features.get(key, {}).get("order", ())) == values.shape[1]:
            chosen = np.concatenate([chosen, mirror.vector(key, torch.from_numpy(chosen)).numpy()])
        summary = {"min": chosen.min(0), "max": chosen.max(0), "mean": chosen.mean(0), "std": chosen.std(0)}
        statistics[key] = {name: torch.from_numpy(value).float() for name, value in summary.items()}
    for camera, frames in episodes.frames.items():
        if image_stats == "dataset":
            spread = rows[np.unique(np.linspace(0, len(rows) - 1, SAMPLED_FRAMES).astype(int))]
            mean, std = pixel_statistics(frames, spread)
        else:
            mean, std = (np.array(value) for value in IMAGE_STATISTICS[image_stats])
        summary = {"min": np.zeros(3), "max": np.ones(3), "mean": mean, "std": std}
        statistics[camera] = {name: torch.from_numpy(value).float()[:, None, None] for name, value in summary.items()}
    return statistics


def pixel_statistics(frames: np.ndarray | Stacked, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and std (C,) of the pixels of some frames, in [0, 1], by their histogram: exact, in little memory."""
    counts = np.zeros((frames.shape[-1], 256), dtype=np.int64)
    for row in rows:
        for channel, histogram in enumerate(counts):
            histogram += np.bincount(frames[row, ..., channel].ravel(), minlength=256)
    share, levels = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ levels
    return mean, np.sqrt(share @ levels**2 - mean**2)


def split_episodes(
    indices: list[int], *, val_fraction: float, val_episodes: list[int] | None, seed: int, key: str = "dataset"
) -> tuple[list[int], list[int]]:
    """Hold out whole episodes for validation.

    Args:
        indices: the episodes to split.
        val_fraction: share to hold out: rounded, at least one episode unless 0 or only one episode is there.
        val_episodes: exactly these, instead.
        seed: of the choice.
        key: what the user calls the dataset, for messages.

    Returns:
        Training and validation episodes, each ascending.

    Raises:
        InputError: a held-out episode is not among `indices`, or none is left for training.
    """
    if val_episodes is not None:
        if unknown := sorted(set(val_episodes) - set(indices)):
            raise InputError(
                f"{key}.val_episodes={unknown} are not among the chosen episodes: choose from {key}.episodes"
            )
        held_out = set(val_episodes)
    else:
        count = max(1, round(val_fraction * len(indices))) if val_fraction > 0 and len(indices) > 1 else 0
        order = torch.randperm(len(indices), generator=generator(seed, Purpose.SPLIT)).tolist()
        held_out = {sorted(indices)[position] for position in order[:count]}
    training = sorted(set(indices) - held_out)
    if not training:
        raise InputError(
            f"all {len(indices)} episodes are held out for validation: lower dataset.val_fraction or {key}.val_episodes"
        )
    return training, sorted(held_out)
