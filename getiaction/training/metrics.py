"""Write metrics: always to `metrics.jsonl` in the run folder, and to TensorBoard or wandb if asked."""

from __future__ import annotations

import json
import netrc
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from accelerate import Accelerator

from getiaction.run_folder import METRICS

PROGRESS = {"step", "time", "epoch", "samples", "lr", "episodes"}
SPENDING = {"samples_per_s", "data_wait", "memory_gb", "gpu_memory_gb"}


class MetricsWriter:
    """Append lines of metrics to a run's `metrics.jsonl`, and pass them to Accelerate's trackers.

    Args:
        folder: the run folder.
        accelerator: its trackers get every number; only the main process writes.
        start_step: lines after this step are dropped: a resumed run writes them again.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, start_step: int = 0) -> None:
        self.path, self.accelerator = folder / METRICS, accelerator
        self.active = accelerator.is_main_process
        if self.active:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_metrics(folder) if line["step"] <= start_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)

    def holds(self, step: int, name: str, **others: Any) -> bool:
        """Tell whether this step has a value of this name already, with these `others`, where its line has such."""
        return any(
            line["step"] == step
            and name in line
            and all(line.get(key, value) == value for key, value in others.items())
            for line in read_metrics(self.path.parent)
        )

    def latest(self) -> dict[str, float]:
        """Return the newest value of all that a run is judged by: its loss, what it measured of itself."""
        lines = read_metrics(self.path.parent)
        return {key: value for line in lines for key, value in line.items() if key not in PROGRESS | SPENDING}

    def write(self, step: int, **values: Any) -> None:
        """Write one line."""
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self.accelerator.log({key: value for key, value in values.items() if isinstance(value, int | float)}, step=step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics; one that a kill cut short is left out."""
    path = folder / METRICS
    lines: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def tracker_setup(name: str) -> list[str]:
    """Return Accelerate's `log_with` for a tracker; wandb without a key goes offline by itself."""
    if name == "wandb" and "WANDB_MODE" not in os.environ and not has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
    return [] if name == "local" else [name]


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process has held so far, in GB: on the host, and on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # of what the system counts
    held = {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        held["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return {key: round(value, 3) for key, value in held.items()}


def has_wandb_key() -> bool:
    """Tell whether wandb will find an API key: in WANDB_API_KEY, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
