"""Share what tests need: the real PushT data, a small ALOHA-like dataset, and a cache of their own."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from absl import logging as absl_logging

from getiaction.machine import kept_scheduling, scheduling

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads must not take the cores of others

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers, and what they start, share the cores
# A shell that starts pytest in the background makes it ignore Ctrl-C, and so every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# TensorBoard's logging closes what sys.stderr was when it was imported: here that is where pytest keeps what tests say.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

AT_START = scheduling()
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep decoded frames out of the user's cache, and decode them once a session."""
    os.environ["GETIACTION_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_LEROBOT_HOME"] = str(tmp_path_factory.mktemp("lerobot"))


@pytest.fixture(autouse=True)
def _collects_garbage() -> Iterator[None]:
    """Let the collector go on: a command that a test runs in this process, and that fails, leaves it held."""
    yield
    gc.enable()


@pytest.fixture(scope="session")
def pusht_root() -> Path:
    """Return the real PushT demonstrations, 206 episodes with video."""
    if not (SHARED / "pusht/meta/info.json").exists():
        pytest.skip(f"needs the real PushT demonstrations in {SHARED / 'pusht'} (they are not part of the repository)")
    return SHARED / "pusht"


@pytest.fixture(scope="session")
def pusht_keypoints_root() -> Path:
    """Return the real PushT demonstrations as keypoints."""
    if not (SHARED / "pusht_keypoints/meta/info.json").exists():
        pytest.skip(
            f"needs the real PushT keypoints in {SHARED / 'pusht_keypoints'} (they are not part of the repository)"
        )
    return SHARED / "pusht_keypoints"


@pytest.fixture(autouse=True)
def _shares_the_cores() -> Iterator[None]:
    """Fail if this process has taken real time: the other worker and all children would wait for it."""
    yield
    assert scheduling() == AT_START


MakeDataset = Callable[..., Path]


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> MakeDataset:
    """Return a function that records a small LeRobotDataset with LeRobot's own writer, or copies what it recorded."""

    @functools.cache
    @kept_scheduling()
    def record(
        *,
        lengths: tuple[int, ...] = (12, 9),
        cameras: tuple[str, ...] = ("observation.images.top", "observation.images.wrist"),
        image_size: tuple[int, int] = (48, 64),
        state_dim: int = 3,
        action_dim: int = 3,
        fps: int = 20,
        use_videos: bool = True,
    ) -> Path:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        root = tmp_path_factory.mktemp("dataset") / "data"
        kind = "video" if use_videos else "image"
        names = ["height", "width", "channels"]
        features: dict = {key: {"dtype": kind, "shape": (*image_size, 3), "names": names} for key in cameras}
        features["observation.state"] = {"dtype": "float32", "shape": (state_dim,), "names": None}
        features["action"] = {"dtype": "float32", "shape": (action_dim,), "names": None}
        dataset = LeRobotDataset.create("test/data", fps, features, root=root, use_videos=use_videos)
        draw = np.random.default_rng(0)
        for length in lengths:
            walk = np.cumsum(draw.normal(size=(length, state_dim)), axis=0).astype(np.float32)
            for step in range(length):
                frame: dict = {key: moving_square(image_size, step, number) for number, key in enumerate(cameras)}
                frame["observation.state"] = walk[step]
                frame["action"] = walk[min(step + 1, length - 1), :action_dim]
                frame["task"] = "move the square"
                dataset.add_frame(frame)
            dataset.save_episode()
        dataset.finalize()
        return root

    return lambda **wanted: shutil.copytree(record(**wanted), tmp_path_factory.mktemp("dataset") / "data")


def moving_square(size: tuple[int, int], step: int, number: int) -> np.ndarray:
    """Return a picture whose content tells its step and camera, smooth enough for a video codec."""
    height, width = size
    ys, xs = np.mgrid[:height, :width]
    picture = np.stack([xs * 255 / width, ys * 255 / height, np.full(size, 60 * number)], axis=-1)
    left = (step * 3) % (width - width // 4)
    picture[height // 4 : height // 2, left : left + width // 4] = (250, 40, 40)
    return picture.astype(np.uint8)


@pytest.fixture(scope="session")
def aloha_root(make_dataset: MakeDataset) -> Path:
    """Return an ALOHA-like dataset: 14 joints, two 480x640 cameras, 50 Hz."""
    return make_dataset(lengths=(30, 26), image_size=(480, 640), state_dim=14, action_dim=14, fps=50)


MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Return a function that writes a run folder with a tiny policy that has learned nothing; takes overrides."""

    def make(*overrides: str, state_dim: int = 2, action_dim: int = 2, **cameras: tuple[int, int, int]) -> Path:
        from dataclasses import asdict

        import torch
        import yaml
        from composing import compose

        from getiaction.config.build import build_policy
        from getiaction.interop.lerobot import write_policy
        from getiaction.policy import Features

        small = ["unet.down_dims=[16,32]", "unet.diffusion_step_embed_dim=16", "scheduler.num_train_timesteps=20"]
        shown = {f"observation.{key}": shape for key, shape in cameras.items()}
        features = Features(action_dim, state_dim, None if cameras else 16, shown)
        seen = ["backbone=resnet18", "backbone.crop_shape=null"] if cameras else []
        config = compose(["+preset=pusht_keypoints", *small, "policy.num_inference_steps=4", *seen, *overrides])
        statistics = {}
        for key, shape in features.shapes.items():
            size, top = ((3, 1, 1), 1.0) if len(shape) == 3 else (shape, 512.0)
            statistics[key] = {"min": torch.zeros(size), "max": torch.full(size, top)}
            statistics[key] |= {"mean": torch.full(size, top / 2), "std": torch.full(size, top / 2)}
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("run")
        write_policy(
            folder / "checkpoints/000001/pretrained_model",
            build_policy(config, features, statistics, fetch_weights=False),
        )
        (folder / "checkpoints/last").symlink_to("000001")
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
        return folder

    return make


@pytest.fixture(scope="session")
def keypoints_run(make_run: MakeRun) -> Path:
    """Return a run folder whose policy sees PushT's keypoints."""
    return make_run()
