"""Check PushT's metric against people: `python -m benchmarks.replay_humans --root ../shared/data/pusht_keypoints`.

All 206 human demonstrations are replayed from their start states through the rollout that evaluates policies. Recorded
are what they score, and how far the simulator strays from what was recorded. Results go to
benchmarks/results/replay_humans-<date>.json.

The recorded keypoints carry a quirk. They were made by setting each frame's position first and its angle second, in one
simulator for the whole dataset, and a change of angle turns the block about its centre of mass: frame i's block is
displaced by (R(angle[i-1]) - R(angle[i])) @ centre of mass. `true_poses` takes that back. `next.reward` is the reward
of the displaced block, before the frame's action.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from getiaction.simulation.environment import Observation
from getiaction.simulation.metrics import Summary, summarize
from getiaction.simulation.pusht import OBS_STATE, PushT
from getiaction.simulation.rollout import Moment, SerialPool, rollout

RESULTS = Path(__file__).parent / "results"
CHUNK = 8  # actions of one call
MORE_STEPS = (0, 1, 5, 10)  # people stopped recording while the block was still moving onto its target
CENTRE = np.array([0.0, 45.0])  # the block's centre of mass in its own frame, pixels
CORNERS = np.array([(-60, 0), (60, 0), (60, 30), (-60, 30), (-15, 30), (15, 30), (15, 120), (-15, 120)], np.float64)
FIRST_ANGLE = -2.88414844  # of the simulator before frame 0 of episode 0, found from the block's jump there


@dataclass(frozen=True)
class Demonstration:
    """Hold one recorded episode of N frames.

    Args:
        states: agent x, y, (N, 2).
        recorded: the block as recorded, x, y, angle, (N, 3).
        poses: the block as it was, (N, 3).
        actions: (N, 2).
        rewards: `next.reward`, (N,).
    """

    states: np.ndarray
    recorded: np.ndarray
    poses: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray


def read_demonstrations(root: Path, episodes: Sequence[int] | None = None) -> dict[int, Demonstration]:
    """Read `pusht_keypoints`' episodes by index; None reads all."""
    table = pyarrow.parquet.read_table(root / "data/chunk-000/file-000.parquet")
    index = table["episode_index"].to_numpy()
    names = ("observation.state", "observation.environment_state", "action")
    states, keypoints, actions = (
        table[name].combine_chunks().flatten().to_numpy().reshape(len(index), -1).astype(np.float64) for name in names
    )
    rewards = table["next.reward"].to_numpy().astype(np.float64)
    recorded = fit_poses(keypoints.reshape(-1, 8, 2))
    poses = true_poses(recorded)
    wanted = sorted(set(index.tolist())) if episodes is None else episodes
    rows = {episode: index == episode for episode in wanted}
    return {
        episode: Demonstration(states[row], recorded[row], poses[row], actions[row], rewards[row])
        for episode, row in rows.items()
    }


def fit_poses(keypoints: np.ndarray) -> np.ndarray:
    """Return x, y, angle (N, 3) of the blocks whose corners (N, 8, 2) these are."""
    centre = keypoints.mean(1)
    own, seen = CORNERS - CORNERS.mean(0), keypoints - centre[:, None]
    cross = (own[:, 0] * seen[..., 1] - own[:, 1] * seen[..., 0]).sum(1)
    angle = np.arctan2(cross, (own * seen).sum((1, 2)))
    return np.column_stack([centre - turned(angle, CORNERS.mean(0)), angle])


def true_poses(recorded: np.ndarray) -> np.ndarray:
    """Return the poses (N, 3) of all frames in order, without what the order of setting them has displaced."""
    angles = recorded[:, 2]
    before = np.concatenate([[FIRST_ANGLE], angles[:-1]])
    return np.column_stack([recorded[:, :2] + turned(angles, CENTRE) - turned(before, CENTRE), angles])


def turned(angle: float | np.ndarray, point: np.ndarray) -> np.ndarray:
    """Turn a point by one angle or many."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * point[0] - sin * point[1], sin * point[0] + cos * point[1]], axis=-1)


class HumanStart(PushT):
    """PushT whose episode with seed i starts, and ends at the latest, as the human episode i did.

    Args:
        root: `pusht_keypoints`.
        episodes: as `read_demonstrations` takes it.
        more_steps: control steps beyond the recorded ones, before an episode ends without success.
    """

    def __init__(self, root: Path, episodes: Sequence[int] | None = None, *, more_steps: int = 0) -> None:
        super().__init__()
        self.demonstrations, self.more_steps = read_demonstrations(root, episodes), more_steps

    def reset(self, seed: int) -> None:
        """Start as the person of this number did."""
        demonstration = self.demonstrations[seed]
        self.max_steps = len(demonstration.actions) + self.more_steps
        x, y, angle = demonstration.poses[0]
        # `reset_to` turns the block about its centre of mass after it has placed it
        place = np.array([x, y]) + turned(angle, CENTRE) - CENTRE
        self.reset_to([*demonstration.states[0], *place, angle])


@dataclass(frozen=True)
class People:
    """Act as people did: chunk n of episode i is what was recorded, the last action repeated where it ends."""

    demonstrations: dict[int, Demonstration]

    def __call__(self, observations: Observation, moments: Sequence[Moment]) -> np.ndarray:
        """Return recorded chunks, (B, Ta, 2)."""
        return np.stack([self._chunk(*moment) for moment in moments])

    def _chunk(self, episode: int, number: int) -> np.ndarray:
        actions = self.demonstrations[episode].actions.astype(np.float32)
        steps = np.arange(number * CHUNK, (number + 1) * CHUNK)
        return actions[np.minimum(steps, len(actions) - 1)]


def strays(environment: HumanStart, episode: int) -> tuple[float, float]:
    """Return how far a replay's agent and block get from the recorded ones, in pixels, at most."""
    demonstration = environment.demonstrations[episode]
    environment.reset(episode)
    agent, block = [0.0], [0.0]
    recorded = zip(demonstration.actions[:-1], demonstration.states[1:], demonstration.poses[1:], strict=True)
    for action, state, pose in recorded:
        environment.step(action)
        now = environment.state
        agent.append(float(np.abs(now[:2] - state).max()))
        block.append(float(np.abs(now[4:6] - pose[:2]).max()))
    return max(agent), max(block)


def replay_all(root: Path, more_steps: int) -> tuple[Summary, int]:
    """Replay all demonstrations; return what they sum up to, and how many succeeded."""
    make = partial(HumanStart, root, more_steps=more_steps)
    pool = SerialPool(make, num_envs=1, keys=[OBS_STATE], n_obs_steps=1)
    demonstrations = read_demonstrations(root)
    episodes = list(rollout(People(demonstrations), pool, list(demonstrations), num_envs=1, batch_size=1))
    return summarize(episodes), sum(episode.success for episode in episodes)


def main() -> None:
    """Replay all demonstrations and write the result."""
    from getiaction.config.evaluation import say  # not at the top: workers would load torch, too
    from getiaction.config.record import describe_machine, pick_device

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the LeRobotDataset pusht_keypoints")
    root = parser.parse_args().root
    environment = HumanStart(root)
    agent, block = zip(*(strays(environment, seed) for seed in environment.demonstrations), strict=True)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(),
        "agent_strays_px": {"median": float(np.median(agent)), "max": max(agent)},
        "block_strays_px": {"median": float(np.median(block)), "max": max(block)},
        "by_more_steps": [],
        "machine": describe_machine(pick_device("cpu")),
    }
    print(f"from the recorded ones stray the agent {max(agent):.1e} px, the block {max(block):.2f} px at most")
    for more_steps in MORE_STEPS:
        summary, succeeded = replay_all(root, more_steps)
        result["by_more_steps"].append({"more_steps": more_steps, "succeeded": succeeded, **asdict(summary)})
        print(f"the last action held for {more_steps} steps: {say(summary)}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"replay_humans-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
