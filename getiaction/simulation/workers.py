"""Run environments in processes of their own, so that simulators step while the policy thinks."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import numpy as np

from getiaction.errors import TrainingError
from getiaction.signals import WARNINGS
from getiaction.simulation.environment import Observation
from getiaction.simulation.rollout import Episode, MakeEnvironment, Runner

GONE = "a simulator's process ended by itself: out of memory, or killed"


class WorkerError(TrainingError):
    """An environment failed in its process; the message holds the trace from there."""


class WorkerPool:
    """Spread `num_envs` environments over processes; use it as a context manager, which ends them.

    Args:
        make: makes an environment; must pickle (a class, or `functools.partial` of one).
        num_envs: environments.
        num_workers: processes; slot s lives in process s % num_workers.
        keys: the observations to make.
        n_obs_steps: To.
    """

    def __init__(
        self, make: MakeEnvironment, *, num_envs: int, num_workers: int, keys: Sequence[str], n_obs_steps: int
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch and the GPU's state
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        for number in range(num_workers):
            ours, theirs = context.Pipe()
            slots = range(number, num_envs, num_workers)
            process = context.Process(
                target=serve, args=(theirs, make, list(slots), list(keys), n_obs_steps), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()

    def start(self, slot: int, seed: int) -> None:
        """Start an episode in one environment."""
        self._send(slot, ("start", slot, seed))

    def execute(self, slot: int, actions: np.ndarray) -> None:
        """Execute a chunk in one environment."""
        self._send(slot, ("execute", slot, actions))

    def wait(self) -> list[tuple[int, Observation | Episode]]:
        """Return what has come; wait for one at least.

        Raises:
            WorkerError: an environment failed, or its process is gone.
        """
        done: list[tuple[int, Observation | Episode]] = []
        for connection in cast(list[Connection], wait(self.connections)):
            try:
                slot, result = connection.recv()
            except (EOFError, OSError) as error:  # a reset, where it was killed with a message unread
                raise WorkerError(GONE) from error
            if isinstance(result, str):
                raise WorkerError(f"a simulator failed:\n{result}")
            done.append((slot, result))
        return done

    def _send(self, slot: int, message: tuple[str, int, Any]) -> None:
        try:
            self.connections[slot % len(self.connections)].send(message)
        except OSError as error:
            raise WorkerError(GONE) from error


def serve(connection: Connection, make: MakeEnvironment, slots: list[int], keys: list[str], n_obs_steps: int) -> None:
    """Run the environments of these slots until the connection is closed."""
    for number in (signal.SIGINT, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)  # they are the main process's to handle
    slot = -1
    with contextlib.suppress(EOFError, OSError):  # the main process has gone, or wants no more
        try:
            runners = {slot: Runner(make(), keys=keys, n_obs_steps=n_obs_steps) for slot in slots}
        except Exception:
            connection.send((slot, traceback.format_exc()))
            return
        while True:
            what, slot, value = connection.recv()
            connection.send((slot, attempt(runners[slot], what, value)))


def attempt(runner: Runner, what: str, value: Any) -> Observation | Episode | str:
    """Do what was asked for; return the trace if it fails."""
    try:
        return runner.start(value) if what == "start" else runner.execute(value)
    except Exception:
        return traceback.format_exc()
