"""Yield a run's batches: each process's share of every step, gathered ahead where the data stay on the host."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from torch import Tensor

from getiaction.data.episodes import Episodes
from getiaction.data.gather import Batch, Gatherer, to_device
from getiaction.data.order import Order
from getiaction.errors import InputError
from getiaction.random import Purpose, generator

FITS = 0.5  # share of the free memory that resident data may take
CPU = torch.device("cpu")
READ_AHEAD = 2  # batches whose pictures the disk reads before they are gathered
PREFETCH = 2  # batches gathered ahead when data stay on the host


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
        """Yield `step(s)` for s in [start, stop), gathering ahead in a thread if `prefetch`."""
        plainly = (self.step(step) for step in range(start, stop))
        if not self.prefetch:
            return plainly
        ahead = self._read_ahead(start, stop) if self.gatherer.mapped else plainly
        return prefetched(ahead, PREFETCH, self.gatherer.device)

    def _read_ahead(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield `step(s)` for s in [start, stop), while the disk is already busy with the steps after it."""
        for step in range(start, stop):
            for later in range(step, stop)[READ_AHEAD if step > start else 0 : READ_AHEAD + 1]:
                ids = self.order.ids(later)
                for part in self.share.slices():
                    self.gatherer.read_ahead(ids[part])
            yield self.step(step)


class Aside:
    """Let a thread launch kernels on a stream of its own, beside those of steps before; without a GPU it does nothing.

    Args:
        device: where; made where its tensors will be used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, None
        if device.type == "cuda" and torch.cuda.is_available():
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which may still bring the data there

    def begin(self) -> None:
        """Take the stream, in the thread: it has a current device, and a current stream, of its own."""
        if self._device.type == "cuda" and self._device.index is not None:  # without one it is the first, as in any
            torch.cuda.set_device(self._device)
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def done(self) -> torch.cuda.Event | None:
        """Return what comes after all that the thread has launched."""
        return None if self._stream is None else self._stream.record_event()

    def take_over(self, batches: list[Batch], done: torch.cuda.Event | None) -> None:
        """Let the current stream wait for batches, whose memory is theirs until that has used them."""
        if done is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(done)
            for batch in batches:
                for value in batch.values():
                    value.record_stream(here)


def prefetched(items: Iterator[list[Batch]], depth: int, device: torch.device = CPU) -> Iterator[list[Batch]]:
    """Run an iterator in a thread, `depth` items ahead; its errors are raised here."""
    ready: queue.Queue = queue.Queue(depth)
    stopped, aside = threading.Event(), Aside(device)

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
            aside.begin()
            if all(put(("item", (item, aside.done()))) for item in items):
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
            batches, done = value
            aside.take_over(batches, done)
            yield batches
    finally:
        stopped.set()


def is_resident(episodes: Episodes, device: torch.device, placement: str) -> bool:
    """Decide whether the data live on the training device, or are read as needed.

    On a CPU both are memory-mapped; resident means that the system may keep all that was read.

    Raises:
        InputError: `placement` is unknown.
    """
    if placement not in ("auto", "device", "host"):
        raise InputError(f"hardware.data_placement={placement!r} must be auto, device or host")
    if placement != "auto":
        return placement == "device"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return episodes.nbytes <= FITS * free
