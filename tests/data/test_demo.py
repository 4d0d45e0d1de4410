"""The demonstrations in the box: small, successful, open in LeRobot, and what the command in their README makes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from composing import compose

from getiaction.config.build import observation_keys
from getiaction.data.metadata import find_dataset
from getiaction.random import Purpose, derive_seed
from getiaction.simulation.demonstrations import demonstrate
from getiaction.simulation.pusht import OBS_STATE, PushT


@pytest.fixture(scope="module")
def root() -> Path:
    return Path(str(compose(["dataset=pusht_demo"]).dataset.root))


@pytest.fixture(scope="module")
def rows(root: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(root / "data")
    return {key: np.array(table[key].to_pylist()) for key in ("episode_index", "next.success", "action", OBS_STATE)}


def test_a_hundred_successes_in_eight_megabytes(root: Path, rows: dict[str, np.ndarray]) -> None:
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 8e6
    episodes = rows["episode_index"]
    assert episodes.max() + 1 >= 100
    assert all(rows["next.success"][episodes == number].any() for number in range(episodes.max() + 1))


def test_the_command_in_its_readme_makes_it(root: Path, rows: dict[str, np.ndarray]) -> None:
    command = re.search(r"getiaction\.demonstrate env=pusht (.*)", (root / "README.md").read_text())
    assert command
    given = {key: float(value) for key, value in re.findall(r"(\w+)=(\S+)", command[1])}
    environment = PushT()
    environment.observation_shapes = {OBS_STATE: (2,)}  # no pictures
    start, expert = (derive_seed(int(given["seed"]), Purpose.DEMONSTRATION, 0, which) for which in (0, 1))
    frames = demonstrate(environment, start, expert % 2**32, midway=given["midway"], disturbance=given["disturbance"])
    assert frames is not None
    recorded = rows["action"][rows["episode_index"] == 0]
    steps = min(20, len(recorded))  # another processor's last digits grow with every bump
    np.testing.assert_allclose(frames["action"][:steps], recorded[:steps], atol=1.0)


def test_lerobot_opens_it(root: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("getiaction/pusht_demo", root=root)
    item = dataset[len(dataset) - 1]
    assert item["observation.image"].shape == (3, 96, 96)
    assert item["observation.environment_state"].shape == (16,)


@pytest.mark.parametrize(
    ("dataset", "observed"),
    [
        ("pusht_demo", ["observation.image", "observation.state"]),
        ("pusht_demo_keypoints", ["observation.environment_state", "observation.state"]),
    ],
)
def test_it_is_seen_as_pictures_or_as_keypoints(dataset: str, observed: list[str]) -> None:
    config = compose([f"dataset={dataset}"])
    metadata = find_dataset(config.dataset.repo_id, config.dataset.root)
    assert sorted(observation_keys(config, metadata)) == observed
