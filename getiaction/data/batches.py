"""Make batches: choose windows, gather their frames, crop, and bring them to the training device."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import psutil
import torch
from torch import Tensor

from getiaction.data.episodes import Episodes
from getiaction.data.mapped import expect_random, let_go, read_ahead
from getiaction.data.mirror import Mirror
from getiaction.data.stacked import Stacked
from getiaction.data.windows import Windows
from getiaction.errors import InputError
from getiaction.keys import ACTION, ACTION_IS_PAD
from getiaction.random import Purpose, generator

Batch = dict[str, Tensor]
FITS = 0.5  # share of the free memory that resident data may take
CPU = torch.device("cpu")
CHUNK = 1024  # pictures copied to the device at a time
READ_AHEAD = 2  # batches whose pictures the disk reads before they are gathered
PREFETCH = 2  # batches gathered ahead when data stay on the host


@dataclass(frozen=True)
class Order:
    """Decide which samples each step sees: shuffled epochs, one after the other, cut into global batches.

    A batch may reach over the end of an epoch into the next, so every epoch shows each sample exactly once and every
    batch has the same size. With weights an epoch is still M samples long, but each source has its share of them, and
    goes through its own samples at its own pace: none is seen again before all others of its source were.

    Args:
        num_samples: M.
        batch_size: the global batch: per-device batch x processes x accumulation.
        seed: of the run.
        sizes: the samples of each source, which lie one source after the other; they add up to M.
        weights: how often each source is seen, in relation to the others; empty: as its size says.
    """

    num_samples: int
    batch_size: int
    seed: int
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def ids(self, step: int) -> np.ndarray:
        """Return the (batch_size,) samples of a step, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, self.num_samples)
        return np.concatenate([self.epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    @property
    def shares(self) -> np.ndarray:
        """Return the share of each source in what is seen."""
        parts = np.array(self.weights or self.sizes, dtype=float)
        return parts / parts.sum()

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the (M,) samples of an epoch, in order."""
        if not self.weights:
            return shuffled(self.num_samples, self.seed, epoch)
        return mixed(self.sizes, share_out(self.num_samples, self.weights), self.seed, epoch)


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, *counters: int) -> np.ndarray:
    """Return a permutation of `count`; the counters are an epoch, or a pass and its source."""
    return torch.randperm(count, generator=generator(seed, Purpose.ORDER, *counters)).numpy()


@lru_cache(maxsize=4)
def mixed(sizes: tuple[int, ...], quotas: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch that shows `quotas` samples of each source, where its last epoch left off."""
    parts = []
    for source, (size, quota) in enumerate(zip(sizes, quotas, strict=True)):
        passes, places = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), size)
        order = [shuffled(size, seed, int(p), source + 1)[places[passes == p]] for p in np.unique(passes)]
        parts.append(sum(sizes[:source]) + np.concatenate(order))
    return np.concatenate(parts)[shuffled(sum(quotas), seed, epoch)]


def share_out(count: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """Share `count` out by weights, by the largest remainder; nobody goes away empty-handed."""
    exact = count * np.array(weights) / sum(weights)
    shares = np.maximum(np.floor(exact).astype(int), 1)
    while (rest := count - int(shares.sum())) != 0:
        shares[np.argmax(exact - shares) if rest > 0 else np.argmax(shares)] += np.sign(rest)
    return tuple(shares.tolist())


class Gatherer:
    """Gather samples as a batch on the training device.

    Args:
        episodes: where the frames are; `place` decides whether they were copied to the device.
        windows: which frames make a sample.
        device: where batches go.
        crop_shape: (h, w) to crop pictures to, or None.
        observations: keys to gather besides the action.
        mirror: what mirrors samples, for `gather`'s `mirrored`.
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
    ) -> None:
        self.windows, self.device, self.crop_shape, self.mirror = windows, device, crop_shape, mirror
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
                pixels = crop_on_device(frames, observations, corner, self.crop_shape)
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


def crop_on_device(frames: Tensor, rows: Tensor, corners: np.ndarray | None, shape: tuple[int, int] | None) -> Tensor:
    """Do what `crop_on_host` does, on the device, in one gather."""
    if corners is None or shape is None:
        return frames[rows]
    corner = to_device(torch.from_numpy(np.ascontiguousarray(corners)), frames.device)
    ys = corner[:, :1] + torch.arange(shape[0], device=frames.device)  # (B, h)
    xs = corner[:, 1:] + torch.arange(shape[1], device=frames.device)  # (B, w)
    return frames[rows[:, :, None, None], ys[:, None, :, None], xs[:, None, None, :]]  # (B, To, h, w, C)


@dataclass(frozen=True)
class Share:
    """Say which part of each global batch this process takes.

    Micro-batch m of rank r is samples `(m * processes + r) * batch_size` and on: the global batch, and all randomness
    drawn for it, is the same for any number of processes and accumulation steps.
    """

    batch_size: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0

    @property
    def parts(self) -> int:
        """Return the micro-batches of one step, on all processes."""
        return self.processes * self.accumulation

    @property
    def global_batch_size(self) -> int:
        """Return per-device batch x processes x accumulation."""
        return self.batch_size * self.parts

    def slices(self, each: int = 1) -> list[slice]:
        """Return the slice of the global batch of each of this process's micro-batches.

        Args:
            each: rows for each sample.
        """
        rows = self.batch_size * each
        firsts = [(micro * self.processes + self.rank) * rows for micro in range(self.accumulation)]
        return [slice(first, first + rows) for first in firsts]


@dataclass(frozen=True)
class TrainingBatches:
    """Yield a run's micro-batches, step by step, from any step on."""

    gatherer: Gatherer
    order: Order
    share: Share
    crop_is_random: bool
    prefetch: bool
    observation_noise: Mapping[str, Tensor] = field(default_factory=dict)  # standard deviations (D,) of states

    def ids(self, step: int) -> np.ndarray:
        """Return the samples of a step, over all processes."""
        return self.order.ids(step)

    def weights(self, step: int) -> list[float]:
        """Return the weight of each micro-batch of this process in a mean over the valid actions of the global batch.

        Padding is not spread evenly, so the mean of micro-batches' means is another number; with these weights it is
        the same, however the global batch is split.
        """
        _, is_pad = self.gatherer.windows.action_rows(self.ids(step))
        valid = (~is_pad).sum(1)  # (global batch,)
        return [float(valid[part].mean() / valid.mean()) for part in self.share.slices()]

    def step(self, step: int) -> list[Batch]:
        """Return this process's micro-batches of one step."""
        ids, corners, mirrored = self.order.ids(step), None, None
        if self.gatherer.mirror is not None:
            mirrored = (torch.rand(len(ids), generator=generator(self.order.seed, Purpose.MIRROR, step)) < 0.5).numpy()
        if self.crop_is_random and self.gatherer.crop_shape is not None:
            size = (len(ids), len(self.gatherer.cameras))
            draw = generator(self.order.seed, Purpose.CROP, step)
            sides = [torch.randint(margin, size, generator=draw) for margin in self.gatherer.margins]
            corners = torch.stack(sides, dim=-1).numpy()  # (B, N, 2)
        batches = [
            self.gatherer.gather(
                ids[part],
                None if corners is None else corners[part],
                None if mirrored is None else mirrored[part],
            )
            for part in self.share.slices()
        ]
        return self._disturb(step, batches) if self.observation_noise else batches

    def _disturb(self, step: int, batches: list[Batch]) -> list[Batch]:
        """Add noise to the states, the same for a sample whatever the share of the batch that it is in."""
        draw = generator(self.order.seed, Purpose.OBSERVATION, step)
        for key, deviation in self.observation_noise.items():
            shape = (self.share.global_batch_size, *batches[0][key].shape[1:])  # (global batch, To, D)
            noise = torch.randn(shape, generator=draw) * deviation.cpu()
            for batch, part in zip(batches, self.share.slices(), strict=True):
                batch[key] = batch[key] + to_device(noise[part], self.gatherer.device)
        return batches

    def iterate(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield `step(s)` for s in [start, stop), gathering ahead in a thread if the data stay on the host."""
        if not self.prefetch:
            return (self.step(step) for step in range(start, stop))
        return prefetched(self._read_ahead(start, stop), PREFETCH, self.gatherer.device)

    def _read_ahead(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield `step(s)` for s in [start, stop), while the disk is already busy with the steps after it."""
        for step in range(start, stop):
            for later in range(step, stop)[READ_AHEAD if step > start else 0 : READ_AHEAD + 1]:
                ids = self.order.ids(later)
                for part in self.share.slices():
                    self.gatherer.read_ahead(ids[part])
            yield self.step(step)


def prefetched(items: Iterator[list[Batch]], depth: int, device: torch.device = CPU) -> Iterator[list[Batch]]:
    """Run an iterator in a thread, `depth` items ahead; its errors are raised here."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[str, object]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            if device.type == "cuda" and device.index is not None:  # without one it is the first, as in any thread
                torch.cuda.set_device(device)  # a thread has a current device of its own
            if all(put(("item", item)) for item in items):
                put(("end", None))
        except BaseException as error:  # raised where the items are used
            put(("error", error))

    threading.Thread(target=work, daemon=True, name="prefetch").start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()


def is_resident(episodes: Episodes, device: torch.device, placement: str) -> bool:
    """Decide whether the data live on the training device (for a CPU: in memory) or stay memory-mapped on the host.

    Raises:
        InputError: `placement` is unknown.
    """
    if placement not in ("auto", "device", "host"):
        raise InputError(f"hardware.data_placement={placement!r} must be auto, device or host")
    if placement != "auto":
        return placement == "device"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return episodes.nbytes <= FITS * free
