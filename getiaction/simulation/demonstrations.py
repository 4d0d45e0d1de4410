"""Let a scripted expert demonstrate a task: episodes that succeed, from random starts, in several processes.

The first N attempts that succeed are the result, whatever process was faster. Each attempt is kept in a file as soon as
it ends, so that a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from getiaction.errors import InputError, TrainingError
from getiaction.keys import ACTION
from getiaction.progress import redraw_seconds
from getiaction.simulation.environment import Demonstrable, Step

DRIFT = 0.8  # share of a disturbance that is still there one step later
REWARD, SUCCESS, DONE = "next.reward", "next.success", "next.done"
Frames = dict[str, np.ndarray]
"""Key -> one row for each step (L, ...): observations, `action`, `next.reward`, `next.success`, `next.done`."""


def demonstrate(
    environment: Demonstrable, start: int, seed: int, *, midway: float = 0.0, disturbance: float = 0.0
) -> Frames | None:
    """Record one attempt; None if it does not succeed in time.

    The recording goes on after success while the expert still improves: a policy that stops just short of the goal
    has learned that from its teacher. A disturbance pushes the robot off the expert's way and records how the expert
    comes back: what is recorded is what it asks for, what is done is that plus noise (DART, arXiv:1703.09327).

    Args:
        environment: observed in full, pictures included.
        start: seed of the start state.
        seed: of the expert and the disturbance.
        midway: share of the starts that are in the middle of the task; the others are the environment's own.
        disturbance: standard deviation of the noise, as a share of the distance that is asked for: fine work is left
            alone. It drifts, so that it does not cancel out.
    """
    expert, keys = environment.make_expert(seed), list(environment.observation_shapes)
    draw, noise = np.random.default_rng(seed), np.zeros(environment.action_dim)
    if np.random.default_rng([start, 1]).random() < midway:
        environment.reset_midway(start)
    else:
        environment.reset(start)
    expert.reset()
    rows: list[dict[str, np.ndarray]] = []
    steps: list[Step] = []
    while len(steps) < environment.max_steps and not expert.done:
        action = np.asarray(expert.act(environment.state), np.float32)
        rows.append({**environment.observe(keys), ACTION: action})
        noise = DRIFT * noise + (1 - DRIFT**2) ** 0.5 * draw.normal(size=environment.action_dim)
        reach = float(np.linalg.norm(action - environment.position))  # where little is asked for, little goes wrong
        steps.append(environment.step(action + disturbance * reach * noise))
    if not any(step.success for step in steps):
        return None
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]} | {
        REWARD: np.array([step.reward for step in steps], np.float32),
        SUCCESS: np.array([step.success for step in steps]),
        DONE: np.arange(len(steps)) == len(steps) - 1,
    }


@dataclass(frozen=True)
class Attempts:
    """Keep what was tried: a file for each attempt, empty if it failed.

    Args:
        folder: new, or that of the same demonstrations.
        identity: what decides them, plain JSON.

    Raises:
        InputError: the folder holds attempts of something else.
    """

    folder: Path
    identity: dict[str, Any]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "about.json"
        if about.exists() and (found := json.loads(about.read_text())) != json.loads(json.dumps(self.identity)):
            raise InputError(
                f"{self.folder} holds attempts of {found}, not of {self.identity}: give another output_dir"
            )
        about.write_text(json.dumps(self.identity))

    def path(self, number: int) -> Path:
        """Return the file of an attempt."""
        return self.folder / f"{number:06d}.npz"

    def keep(self, number: int, frames: Frames | None) -> bool:
        """Write an attempt in one step; return whether it succeeded."""
        temporary = self.folder / f".{number:06d}.npz"
        if frames is None:
            temporary.touch()
        else:
            np.savez_compressed(temporary, allow_pickle=False, **frames)
        temporary.replace(self.path(number))
        return frames is not None

    def succeeded(self, number: int) -> bool | None:
        """Tell how an attempt went; None if it was not made yet."""
        path = self.path(number)
        return path.stat().st_size > 0 if path.exists() else None

    def length(self, number: int) -> int:
        """Return how many steps an attempt that succeeded has."""
        with np.load(self.path(number)) as file:
            return len(file[DONE])

    def read(self, number: int) -> Frames:
        """Read an attempt that succeeded."""
        with np.load(self.path(number)) as file:
            return dict(file)


def attempt(
    make: Callable[[], Demonstrable],
    attempts: Attempts,
    number: int,
    start: int,
    seed: int,
    midway: float,
    disturbance: float,
) -> bool:
    """Make and keep one attempt; runs in a process of its own."""
    return attempts.keep(number, demonstrate(make(), start, seed, midway=midway, disturbance=disturbance))


def collect(
    make: Callable[[], Demonstrable],
    attempts: Attempts,
    *,
    episodes: int,
    seeds: Callable[[int], tuple[int, int]],
    midway: float,
    disturbance: float,
    num_workers: int,
) -> tuple[list[int], int]:
    """Attempt until enough succeed; return the numbers of the first that did, and how many attempts that took.

    Args:
        make: makes an environment; must pickle.
        attempts: what was tried already is not tried again.
        episodes: how many successes to collect.
        seeds: number of an attempt -> (seed of its start, seed of its expert).
        midway, disturbance: see `demonstrate`.
        num_workers: processes; 0 is this one.

    Raises:
        TrainingError: hardly any attempt succeeds.
    """
    with open_executor(num_workers) as submit, demonstration_bar(episodes) as bar:
        running: dict[Future[bool], int] = {}
        following = 0
        while True:
            tried = [attempts.succeeded(number) for number in range(following)]
            known = tried[: tried.index(None)] if None in tried else tried  # up to the first that still runs
            bar.n = min(sum(bool(one) for one in tried), episodes)
            bar.refresh()
            good = [number for number, one in enumerate(known) if one]
            if len(good) >= episodes:
                for future in running:
                    future.cancel()
                return good[:episodes], good[episodes - 1] + 1
            if len(known) >= 50 and len(good) < len(known) / 10:
                raise TrainingError(f"only {len(good)} of {len(known)} attempts succeeded: the expert cannot do this")
            while len(running) < max(num_workers, 1):
                if attempts.succeeded(following) is None:
                    running[submit(attempt, make, attempts, following, *seeds(following), midway, disturbance)] = (
                        following
                    )
                following += 1
                if attempts.succeeded(following - 1) is not None:
                    break  # made before, or at once in this process: count it
            done, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), set())
            for future in done:
                future.result()
                del running[future]


@contextlib.contextmanager
def open_executor(num_workers: int) -> Iterator[Callable[..., Future[bool]]]:
    """Return what runs a function in another process, or at once in this one."""

    def at_once(function: Callable[..., bool], *arguments: Any) -> Future[bool]:
        future: Future[bool] = Future()
        future.set_result(function(*arguments))
        return future

    if not num_workers:
        yield at_once
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=leave_signals) as executor:
        try:
            yield executor.submit
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def leave_signals() -> None:
    """Leave Ctrl-C to the main process: a worker finishes its attempt, which is kept."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def demonstration_bar(episodes: int) -> tqdm:
    """Return the progress bar."""
    return tqdm(
        total=episodes,
        desc="demonstrating",
        unit="episode",
        dynamic_ncols=True,
        mininterval=redraw_seconds(),
    )
