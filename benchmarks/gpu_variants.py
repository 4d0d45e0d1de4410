"""Say what each lever of a GPU's training step is worth, turn by turn: a section of `benchmarks.gpu`."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_kernels import MANY, STEPS, trainer_of
from getiaction.policy.fast.beside import Beside
from getiaction.training.stepper import Stepper

TURNS = 3
EAGER = 4  # steps until one is replayed


def variants(bench: Bench) -> dict[str, Any]:
    """Measure milliseconds of a step: as it is, and without one lever at a time, each a graph of its own."""
    if bench.device != "cuda":
        return {"skipped": "these are a GPU's"}
    for preset, batch, precision in STEPS:
        if not bench.wants(case := f"{preset}, {batch}, {precision}"):
            continue
        trainer = trainer_of(bench, preset, batch, precision)
        coming = trainer.batches.iterate(0, MANY)

        def run(count: int, trainer: Any = trainer, coming: Any = coming) -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(count):
                trainer._optimise(next(coming))
            torch.cuda.synchronize()
            return (time.perf_counter() - begin) * 1e3 / count

        graphs, taken = {}, {}
        for name, change in LEVERS.items():
            trainer.update.forget()
            with change(trainer):
                run(EAGER)
            assert trainer.update.replay.captured, name
            graphs[name] = trainer.update.replay
        for _ in range(TURNS):
            for name, graph in graphs.items():
                trainer.update.replay = graph
                run(EAGER)
                taken.setdefault(name, []).append(round(run(bench.steps(25)), 3))
            bench.found[case] = {
                name: {"ms": statistics.median(found), "turns": found} for name, found in taken.items()
            }
        coming.close()
        del trainer, coming, run, graphs, graph
        gc.collect()
    return bench.found


@contextlib.contextmanager
def as_it_is(trainer: Any) -> Iterator[None]:
    """Change nothing."""
    yield


@contextlib.contextmanager
def in_turn(trainer: Any) -> Iterator[None]:
    """Compute the gradients of weights, and update them, on the stream of everything else."""
    with patch.object(trainer.update, "stepper", None):
        yield


@contextlib.contextmanager
def adam_after(trainer: Any) -> Iterator[None]:
    """Compute the gradients of weights on a stream of their own, and update all weights after the backward pass."""
    with patch("getiaction.training.stepper.AHEAD", None):
        yield


@contextlib.contextmanager
def adam_beside_encoder(trainer: Any) -> Iterator[None]:
    """Update the U-Net's weights only once the encoder's gradients come, whose backward pass waits for no memory."""
    update, waiting = Stepper._update_ahead, list[Any]()
    encoders = {weight for encoder in trainer.policy.encoders for weight in encoder.parameters()}

    def update_later(stepper: Stepper, weight: Any) -> None:
        waiting.append(weight)
        if weight in encoders:
            for one in waiting:
                update(stepper, one)
            waiting.clear()

    with patch.object(Stepper, "_update_ahead", update_later):
        yield


@contextlib.contextmanager
def among_gradients(trainer: Any) -> Iterator[None]:
    """Update weights on the stream of the gradients, which wait for that."""
    with patch.object(Beside, "updating", Beside.launching):
        yield


@contextlib.contextmanager
def wide(trainer: Any) -> Iterator[None]:
    """Let the gradients of weights become float32 before Adam reads them."""
    beside = trainer.update.stepper._beside
    with contextlib.ExitStack() as stack:
        if beside is not None:
            stack.enter_context(patch.object(beside, "narrow", False))
        yield


@contextlib.contextmanager
def with_memsets(trainer: Any) -> Iterator[None]:
    """Leave the graph's memsets as they are."""
    with patch("getiaction.policy.fast.replay.clear_by_kernels", lambda graph: 0):
        yield


LEVERS: dict[str, Callable[[Any], contextlib.AbstractContextManager[None]]] = {
    "as it is": as_it_is,
    "in turn": in_turn,
    "adam after": adam_after,
    "adam beside the encoder": adam_beside_encoder,
    "adam among the gradients": among_gradients,
    "gradients in four bytes": wide,
    "memsets": with_memsets,
}
