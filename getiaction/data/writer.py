"""Write recordings as a LeRobotDataset v3.0, with LeRobot's own writer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from getiaction.keys import is_camera
from getiaction.machine import kept_scheduling

Frames = Mapping[str, np.ndarray]
KEY_FRAME_EVERY = 10  # pictures: 45% smaller than LeRobot's 2, which is for reading at random; we decode once, in order


@kept_scheduling()
def write_dataset(root: Path, recordings: Iterable[Frames], *, repo_id: str, fps: int, task: str, readme: str) -> Path:
    """Write recordings to a new folder, beside its place first: it is whole, or not there.

    Args:
        root: must not exist.
        recordings: one for each episode: key -> (L, ...), pictures (L, C, H, W) uint8, the rest as it is stored.
        repo_id: the name that the dataset would have on the Hub.
        fps: frames per second.
        task: what is done, in words.
        readme: the text of its README.md.
    """
    import av
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    os.environ.setdefault("SVT_LOG", "1")  # the encoder speaks of errors only
    av.logging.set_level(av.logging.ERROR)
    temporary = root.with_name(f".{root.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    dataset = None
    for frames in recordings:
        if dataset is None:
            features = {key: feature(key, value) for key, value in frames.items()}
            encoder = RGBEncoderConfig(g=KEY_FRAME_EVERY)
            dataset = LeRobotDataset.create(repo_id, fps, features, root=temporary, rgb_encoder=encoder)
        for step in range(len(next(iter(frames.values())))):
            dataset.add_frame({**{key: stored(key, value[step]) for key, value in frames.items()}, "task": task})
        dataset.save_episode()
    if dataset is None:
        raise ValueError("there is no recording to write")
    dataset.finalize()
    shutil.rmtree(temporary / "images", ignore_errors=True)  # what the encoder worked from
    for path in temporary.rglob("*.parquet"):
        compress(path)
    (temporary / "README.md").write_text(readme)
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # LeRobot leaves videos to their owner
    temporary.rename(root)
    return root


def compress(path: Path) -> None:
    """Write a Parquet file again as one row group, compressed: one per episode takes three times the space."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    pq.write_table(table, path, compression="zstd", compression_level=12, use_dictionary=False)


def feature(key: str, value: np.ndarray) -> dict:
    """Return LeRobot's description of one key."""
    if is_camera(key):
        _, channels, height, width = value.shape
        return {"dtype": "video", "shape": (height, width, channels), "names": ["height", "width", "channels"]}
    return {"dtype": str(value.dtype), "shape": value.shape[1:] or (1,), "names": None}


def stored(key: str, value: np.ndarray) -> np.ndarray:
    """Return one frame's value as LeRobot takes it: pictures (H, W, C), numbers with one dimension at least."""
    return value.transpose(1, 2, 0) if is_camera(key) else np.atleast_1d(value)
