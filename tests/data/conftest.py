"""Share datasets, copies to damage, and toy episodes whose pixels tell where they come from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from getiaction.data.episodes import Episodes, back_to_back
from getiaction.machine import kept_scheduling

CAMERAS = ["observation.images.top", "observation.images.wrist"]


@pytest.fixture(scope="session")
def video_root(make_dataset) -> Path:
    """Return three episodes of two cameras, stored as videos at 30 Hz (times that floats cannot hold exactly)."""
    return make_dataset(lengths=(12, 9, 15), fps=30)


@pytest.fixture(scope="session")
def image_root(make_dataset) -> Path:
    """Return three episodes of two cameras, stored as images in the tables."""
    return make_dataset(lengths=(12, 9, 15), fps=30, use_videos=False)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that copies a dataset to where a test may damage it."""

    def copy(root: Path, name: str = "copy") -> Path:
        shutil.copytree(root, tmp_path / name)
        for path in (tmp_path / name).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return tmp_path / name

    return copy


@pytest.fixture
def announced() -> list[str]:
    """Collect the lines that `load_episodes` announces: `announce=announced.append`."""
    return []


ToyEpisodes = Callable[..., Episodes]


@pytest.fixture(scope="session")
def toy_episodes() -> ToyEpisodes:
    """Return a function that makes episodes in memory: pixel (row, y, x) has the colour (row, y, x)."""

    def make(lengths: tuple[int, ...] = (7, 5, 9), size: tuple[int, int] = (10, 12), cameras: int = 2) -> Episodes:
        rows, draw = sum(lengths), np.random.default_rng(0)
        picture = np.stack(np.mgrid[:rows, : size[0], : size[1]], axis=-1).astype(np.uint8)  # (F, H, W, 3)
        return back_to_back(
            np.arange(len(lengths)),
            np.array(lengths),
            fps=10,
            vectors={
                "observation.state": draw.normal(size=(rows, 3)).astype(np.float32),
                "action": draw.normal(size=(rows, 2)).astype(np.float32),
            },
            frames={key: picture + np.uint8(100 * number) for number, key in enumerate(CAMERAS[:cameras])},
        )

    return make


Python = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def python() -> Python:
    """Return a function that starts a script in a Python process of its own."""

    def start(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run_python(python: Python) -> Callable[..., str]:
    """Return a function that runs a script in a Python process of its own and returns what it prints."""

    def run(script: str, *arguments: object, **environment: str) -> str:
        process = python(script, *arguments, **environment)
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return printed

    return run


@pytest.fixture(scope="session")
@kept_scheduling()
def many_files_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return four episodes of one camera spread over several tables and videos, as LeRobot splits large datasets."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("many") / "data"
    features = {
        "observation.image": {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    dataset = LeRobotDataset.create("test/many", 15, features, root=root)
    dataset.meta.update_chunk_settings(chunks_size=2, data_files_size_in_mb=1e-6, video_files_size_in_mb=1e-6)
    draw = np.random.default_rng(0)
    for length in (5, 8, 4, 6):
        for _ in range(length):
            picture = np.broadcast_to(draw.integers(0, 255, 3, dtype=np.uint8), (48, 64, 3)).copy()
            state, action = draw.normal(size=(2, 2)).astype(np.float32)
            dataset.add_frame(
                {"observation.image": picture, "observation.state": state, "action": action, "task": "look"}
            )
        dataset.save_episode()
    dataset.finalize()
    return root
