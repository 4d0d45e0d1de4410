"""Gather samples as batches: windows of frames, cropped and mirrored, on the training device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from getiaction.data.episodes import Episodes
from getiaction.data.mapped import expect_random, let_go, read_ahead
from getiaction.data.mirror import Mirror
from getiaction.data.stacked import Stacked
from getiaction.data.windows import Windows
from getiaction.keys import ACTION, ACTION_IS_PAD

Batch = dict[str, Tensor]
Crop = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
CHUNK = 1024  # pictures copied to the device at a time


class Gatherer:
    """Gather samples as a batch on the training device.

    Args:
        episodes: where the frames are.
        windows: which frames make a sample.
        device: where batches go.
        resident: copy all episodes to the device, or on a CPU map them and let the system keep them; else read each
            picture from the disk ahead of its use.
        crop_shape: (h, w) to crop pictures to, or None.
        observations: keys to gather besides the action.
        mirror: what mirrors samples, for `gather`'s `mirrored`.
        crop: what crops resident pictures faster than PyTorch's operations, if something does.
    """

    def __init__(
        self,
        episodes: Episodes,
        windows: Windows,
        *,
        device: torch.device,
        resident: bool,
        observations: tuple[str, ...],
        crop_shape: tuple[int, int] | None = None,
        mirror: Mirror | None = None,
        crop: Crop | None = None,
    ) -> None:
        self.windows, self.device, self.crop_shape, self.mirror = windows, device, crop_shape, mirror
        self.crop = crop
        self.on_device = resident and device.type != "cpu"
        self.mapped = not resident
        self.vectors = {
            key: torch.from_numpy(episodes.vectors[key]) for key in (*observations, ACTION) if key in episodes.vectors
        }
        self.frames: Mapping[str, np.ndarray | Stacked] = {
            key: episodes.frames[key] for key in observations if key in episodes.frames
        }
        self.frames_on_device: dict[str, Tensor] = {}
        self.cameras = tuple(self.frames)
        self.picture_shape = next((frames.shape[1:3] for frames in self.frames.values()), (1, 1))  # (H, W)
        if self.on_device:
            self.vectors = {key: values.to(device) for key, values in self.vectors.items()}
            self.frames_on_device = {key: frames_to_device(values, device) for key, values in self.frames.items()}
            self.frames = {}  # the host's copy may go
        if self.mapped:
            for frames in self.frames.values():
                expect_random(frames)

    def with_windows(self, windows: Windows) -> Gatherer:
        """Return a gatherer of other windows over the same arrays; nothing is copied."""
        other = copy.copy(self)
        other.windows = windows
        return other

    @property
    def margins(self) -> tuple[int, int]:
        """Return how many places a crop can have, (H - h + 1, W - w + 1); (1, 1) without a crop."""
        if self.crop_shape is None or not self.cameras:
            return 1, 1
        height, width = self.picture_shape
        return height - self.crop_shape[0] + 1, width - self.crop_shape[1] + 1

    def read_ahead(self, ids: np.ndarray) -> None:
        """Start reading the pictures of samples `ids` (B,) that will be gathered soon."""
        rows = self.windows.observation_rows(ids)
        for frames in self.frames.values():
            read_ahead(frames, rows)

    def gather(self, ids: np.ndarray, corners: np.ndarray | None = None, mirrored: np.ndarray | None = None) -> Batch:
        """Return the batch of samples `ids` (B,).

        Args:
            corners: (B, N, 2) top and left of each sample's crop, per camera; None crops the centre.
            mirrored: (B,) which samples to mirror; None mirrors none.

        Returns:
            `observation.*` (B, To, ...) in raw units, pictures (B, To, C, h, w) uint8, channels last in memory;
            `action` (B, T, Da); `action_is_pad` (B, T) bool.
        """
        observation_rows = self.windows.observation_rows(ids)  # (B, To)
        action_rows, is_pad = self.windows.action_rows(ids)  # (B, T)
        where = self.device if self.on_device else torch.device("cpu")
        actions, observations = (to_device(torch.from_numpy(rows), where) for rows in (action_rows, observation_rows))
        batch = {key: values[actions if key == ACTION else observations] for key, values in self.vectors.items()}
        batch[ACTION_IS_PAD] = torch.from_numpy(is_pad)
        if corners is None and self.crop_shape is not None:
            tall, wide = self.margins  # the centre as torchvision's center_crop rounds it
            centre = [round((tall - 1) / 2), round((wide - 1) / 2)]
            corners = np.broadcast_to(np.array(centre), (len(ids), len(self.cameras), 2))
        for number, camera in enumerate(self.cameras):
            corner = None if corners is None or self.crop_shape is None else corners[:, number]
            if self.on_device:
                frames = self.frames_on_device[camera]
                pixels = crop_on_device(frames, observations, corner, self.crop_shape, self.crop)
            else:
                pixels = torch.from_numpy(crop_on_host(self.frames[camera], observation_rows, corner, self.crop_shape))
            batch[camera] = pixels
        if self.mapped:
            for pictures in self.frames.values():
                let_go(pictures)
        moved = {key: to_device(value, self.device) for key, value in batch.items()}
        if mirrored is not None and self.mirror is not None:
            moved = self.mirror.apply(moved, to_device(torch.from_numpy(mirrored), self.device))
        return {key: value.permute(0, 1, 4, 2, 3) if key in self.cameras else value for key, value in moved.items()}


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting for the device."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def frames_to_device(frames: np.ndarray | Stacked, device: torch.device) -> Tensor:
    """Copy pictures to the device, without a copy of them all on the host."""
    out = torch.empty(frames.shape, dtype=torch.uint8, device=device)
    for first in range(0, len(frames), CHUNK):
        rows = np.arange(first, min(first + CHUNK, len(frames)))
        out[first : first + CHUNK] = torch.from_numpy(frames[rows]).to(device)
    return out


def crop_on_host(
    frames: np.ndarray | Stacked, rows: np.ndarray, corners: np.ndarray | None, shape: tuple[int, int] | None
) -> np.ndarray:
    """Gather (B, To) `rows` of `frames` (F, H, W, C) as (B, To, h, w, C), each sample cropped at its corner (B, 2)."""
    if corners is None or shape is None:
        return frames[rows]
    height, width = shape
    out = np.empty((*rows.shape, height, width, frames.shape[-1]), np.uint8)
    for sample, (top, left) in enumerate(corners.tolist()):
        for step, row in enumerate(rows[sample].tolist()):
            out[sample, step] = frames[row, top : top + height, left : left + width]
    return out


def crop_on_device(
    frames: Tensor,
    rows: Tensor,
    corners: np.ndarray | None,
    shape: tuple[int, int] | None,
    crop: Crop | None = None,
) -> Tensor:
    """Do what `crop_on_host` does, on the device, in one gather; or by `crop`, given the corners (B, 2) there."""
    if corners is None or shape is None:
        return frames[rows]
    corner = to_device(torch.from_numpy(np.array(corners)), frames.device)  # the centre's may not be written to
    if crop is not None:
        return crop(frames, rows, corner, shape)
    ys = corner[:, :1] + torch.arange(shape[0], device=frames.device)  # (B, h)
    xs = corner[:, 1:] + torch.arange(shape[1], device=frames.device)  # (B, w)
    return frames[rows[:, :, None, None], ys[:, None, :, None], xs[:, None, None, :]]  # (B, To, h, w, C)
