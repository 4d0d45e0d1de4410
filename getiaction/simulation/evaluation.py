"""Run the episodes of an evaluation: many at once, each kept as soon as it ends, so that a stopped one goes on."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from getiaction.errors import InputError
from getiaction.machine import count_cores
from getiaction.progress import redraw_seconds
from getiaction.simulation.environment import Observation
from getiaction.simulation.rollout import Act, Episode, MakeEnvironment, Moment, Pool, SerialPool, rollout
from getiaction.simulation.workers import WorkerPool

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The evaluation was asked to stop; what ended is kept."""


class Team:
    """Be the only process of an evaluation; a subclass stands for one of several, which share the episodes.

    Args:
        rank: of this process; 0 writes.
        size: processes.
        neighbours: those on this machine, which share its cores.
    """

    def __init__(self, rank: int = 0, size: int = 1, neighbours: int = 1) -> None:
        self.rank, self.size, self.neighbours = rank, size, neighbours

    def broadcast[Value](self, value: Value) -> Value:
        """Return rank 0's value."""
        return value

    def gather[Value](self, value: Value) -> list[Value]:
        """Return every rank's value, by rank."""
        return [value]


@dataclass(frozen=True)
class Crowd:
    """Say how many environments run at once, and where. It changes the time that an evaluation takes, not its result.

    Args:
        num_envs: environments; None runs two batches' worth with workers, one without.
        num_workers: processes for them; None takes the cores that the policy leaves, 0 this process.
        team: the processes that evaluate together, each with environments of its own.
    """

    num_envs: int | None = None
    num_workers: int | None = None
    team: Team = field(default_factory=Team)

    def resolve(self, batch_size: int, episodes: int) -> tuple[int, int]:
        """Return (num_envs, num_workers) for a number of episodes."""
        workers = self.num_workers
        if workers is None:
            cores = count_cores() // self.team.neighbours
            workers = 0 if cores <= 2 else min(cores - 2, 16)  # two cores stay for the policy
        envs = self.num_envs or (2 * batch_size if workers else batch_size)
        envs = max(min(envs, episodes), 1)
        return envs, min(workers, envs)


class EpisodeLog:
    """Keep episodes in `episodes.jsonl`, one line each with their actions; the first line says whose they are.

    Args:
        path: new, or the log of the same evaluation; None keeps them in memory.
        identity: what decides the episodes: the weights, the environment, ...; plain JSON.
        anew: move a log of another evaluation aside, and begin anew.

    Raises:
        InputError: the file holds another evaluation's episodes, and `anew` is false.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], *, anew: bool = False) -> None:
        self.anew = anew
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.episodes: list[Episode] = []
        if path is None:
            return
        self.episodes = self._read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")  # a line that a kill cut short goes
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in [self.identity, *map(to_row, self.episodes)]))
        temporary.replace(path)

    def append(self, episode: Episode) -> None:
        """Keep an episode."""
        self.episodes.append(episode)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(to_row(episode)) + "\n")

    def _read(self, path: Path) -> list[Episode]:
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines:
            return []
        first = json.loads(lines[0])
        if differ := sorted(key for key in first | self.identity if first.get(key) != self.identity.get(key)):
            key = differ[0]
            if self.anew:
                number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
                aside = path.rename(path.with_name(f"{path.name}.{number}"))
                log.warning(
                    "%s began with another %s: its episodes are in %s now, and it begins anew", path, key, aside
                )
                return []
            raise InputError(
                f"output_dir={path.parent} holds episodes of another evaluation ({key} was {first.get(key)}, now "
                f"it is {self.identity.get(key)}): give another output_dir"
            )
        return [from_row(row) for row in map(parsed, lines[1:]) if row is not None]


def parsed(line: str) -> dict[str, Any] | None:
    """Return a line's content, or None if it was cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def to_row(episode: Episode) -> dict[str, Any]:
    """Return an episode as plain JSON."""
    return {**asdict(episode), "actions": episode.actions.tolist()}


def from_row(row: dict[str, Any]) -> Episode:
    """Return the episode of a row."""
    return Episode(**{**row, "actions": np.array(row["actions"], np.float32)})


def run_episodes(
    act: Act,
    make: MakeEnvironment,
    log: EpisodeLog,
    seeds: Sequence[int],
    *,
    keys: Sequence[str],
    n_obs_steps: int,
    batch_size: int,
    crowd: Crowd,
    stopping: Callable[[], int] = lambda: 0,
) -> list[Episode]:
    """Run what `log` does not hold yet, with the rest of the team; return one episode for each seed, in order.

    Args:
        act: turns observations into action chunks.
        make: makes an environment.
        log: gets each episode as it ends.
        seeds: one per episode.
        keys: observations that `act` needs.
        n_obs_steps: To.
        batch_size: rows of one call of `act`.
        crowd: how many environments run at once.
        stopping: asked before each call of `act`; anything but 0 ends the evaluation.

    Raises:
        Stopped: `stopping` said so, here or on another rank.
    """
    team = crowd.team
    log.episodes = team.broadcast(log.episodes)  # what rank 0 found on the disk
    known = len(log.episodes)
    done = {episode.seed for episode in log.episodes}
    left = [seed for seed in seeds if seed not in done]

    def act_unless_stopping(observations: Observation, moments: Sequence[Moment]) -> np.ndarray:
        if stopping():
            raise Stopped
        return act(observations, moments)

    if mine := left[team.rank :: team.size]:
        num_envs, num_workers = crowd.resolve(batch_size, len(mine))
        size = {"num_envs": num_envs, "batch_size": batch_size}
        with (
            suppress(Stopped),
            open_pool(make, num_envs, num_workers, keys, n_obs_steps) as pool,
            evaluation_bar(known + len(mine), known, shown=team.rank == 0) as bar,
        ):
            for episode in rollout(act_unless_stopping, pool, mine, **size):
                log.append(episode)
                show(bar, log.episodes)
    for rank, others in enumerate(team.gather(log.episodes[known:])):
        for episode in others if rank != team.rank else ():
            log.append(episode)
    found = {episode.seed: episode for episode in log.episodes}
    if not found.keys() >= set(seeds):
        raise Stopped
    return [found[seed] for seed in seeds]


@contextmanager
def open_pool(
    make: MakeEnvironment, num_envs: int, num_workers: int, keys: Sequence[str], n_obs_steps: int
) -> Iterator[Pool]:
    """Open the environments, here or in processes of their own."""
    if not num_workers:
        yield SerialPool(make, num_envs=num_envs, keys=keys, n_obs_steps=n_obs_steps)
        return
    with WorkerPool(make, num_envs=num_envs, num_workers=num_workers, keys=keys, n_obs_steps=n_obs_steps) as pool:
        yield pool


def evaluation_bar(total: int, done: int, *, shown: bool) -> tqdm:
    """Return the progress bar, counting what is there already."""
    return tqdm(
        total=total,
        initial=done,
        desc="evaluating",
        unit="episode",
        leave=False,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=redraw_seconds(),
    )


def show(bar: tqdm, episodes: Sequence[Episode]) -> None:
    """Move the bar. Short episodes end first, so what it shows on the way is no estimate."""
    successes = sum(episode.success for episode in episodes)
    bar.set_postfix_str(f"{successes} of {len(episodes)} succeeded", refresh=False)
    bar.update()
