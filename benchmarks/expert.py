"""Measure the scripted expert: success on fresh starts, its pace beside people's, time per episode.

python -m benchmarks.expert --episodes 100 --root ../shared/data/pusht_keypoints
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from getiaction.config.record import describe_machine
from getiaction.simulation.demonstrations import SUCCESS, Frames, demonstrate
from getiaction.simulation.metrics import bootstrap, wilson
from getiaction.simulation.pusht import OBS_STATE, PushT

RESULTS = Path(__file__).parent / "results"
FIRST_SEED = 20_000  # nothing was tuned on these starts
QUANTILES = (0.5, 0.9, 0.99, 1.0)


def attempt(seed: int) -> tuple[Frames | None, float]:
    """Demonstrate once; return what was recorded, without pictures, and the seconds it took."""
    environment = PushT()
    environment.observation_shapes = {OBS_STATE: (2,)}
    start = time.perf_counter()
    return demonstrate(environment, seed, 0), time.perf_counter() - start


def pace(episodes: list[np.ndarray]) -> list[float]:
    """Return quantiles of the pixels between one action and the next."""
    steps = np.concatenate([np.linalg.norm(np.diff(actions, axis=0), axis=1) for actions in episodes])
    return np.quantile(steps, QUANTILES).round(1).tolist()


def people(root: Path) -> list[np.ndarray]:
    """Return the actions of the human demonstrations, one array for each episode."""
    table = pq.read_table(next(root.glob("data/**/*.parquet")), columns=["action", "episode_index"])
    actions, episode = np.array(table["action"].to_pylist()), np.array(table["episode_index"])
    return [actions[episode == number] for number in np.unique(episode)]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--root", type=Path, required=True, help="the human demonstrations")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as executor:
        made = list(executor.map(attempt, range(FIRST_SEED, FIRST_SEED + arguments.episodes)))
    recorded = [frames for frames, _ in made if frames is not None]
    result = {
        "success": asdict(wilson(len(recorded), len(made))),
        "first_success": asdict(bootstrap([float(frames[SUCCESS].argmax()) + 1 for frames in recorded])),
        "length": asdict(bootstrap([len(frames["action"]) for frames in recorded])),
        "seconds": asdict(bootstrap([seconds for _, seconds in made])),
        "step_quantiles": list(QUANTILES),
        "step_expert": pace([frames["action"] for frames in recorded]),
        "step_people": pace(people(arguments.root)),
        **describe_machine(torch.device("cpu")),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / f"expert-{date.today()}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
