"""Write down what a run is: its config, its command, and the machine and versions that its numbers belong to."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig

from getiaction.config.overrides import as_override
from getiaction.config.schema import Config
from getiaction.errors import InputError
from getiaction.files import replace_text
from getiaction.machine import read_cpu
from getiaction.run_folder import CONFIG, RESULT, RUN, has_checkpoint

PACKAGES = (
    "getiaction",
    "torch",
    "torchvision",
    "accelerate",
    "diffusers",
    "lerobot",
    "hydra-core",
    "numpy",
    "gym-pusht",
    "pymunk",
)


def check_folder(config: Config, folder: Path) -> None:
    """Refuse to start a new run where another one lies.

    Raises:
        InputError: `folder` holds a run, and this one does not resume it.
    """
    if not config.resumes and has_checkpoint(folder):
        raise InputError(
            f"output_dir={folder} already holds a run, which a new one would overwrite: go on with it by "
            f"{as_override('training.resume', str(folder))}, or give another output_dir"
        )


def write_run_files(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Write `config.yaml` (resolved) and `run.json` (command, versions, hardware; the same again for each resume)."""
    if not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    described, path = describe_machine(accelerator.device), folder / RUN
    if HydraConfig.initialized():
        given = HydraConfig.get().overrides.task
        described["overrides"] = [override for override in given if not override.startswith("output_dir=")]
    described |= {"processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    if path.exists():
        first = json.loads(path.read_text())
        described = {**first, "resumed": [*first.get("resumed", []), described]}
    replace_text(folder / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False))
    replace_text(path, json.dumps(described, indent=1))


def write_result(folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Write `result.json`: this run is complete."""
    replace_text(folder / RESULT, json.dumps({"step": step, "metrics": metrics}, indent=1))


def read_result(folder: Path, config: Config) -> dict[str, float] | None:
    """Return the metrics of a run that is complete; None if there is none with this config."""
    if not (folder / RESULT).exists():
        return None
    saved, now = yaml.safe_load((folder / CONFIG).read_text()), asdict(config)
    for content in (saved, now):
        del content["output_dir"], content["training"]["resume"]
    return json.loads((folder / RESULT).read_text())["metrics"] if saved == now else None


def pick_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the best that is here.

    Raises:
        InputError: it is not here, or there is no such device.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in here.items() if available))
    if not here.get(name, False):
        raise InputError(f"device={name} is not here: use {', '.join(kind for kind in here if here[kind])} or auto")
    return torch.device(name)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what a number needs beside it: command, versions, commit, hardware."""
    return {
        "command": sys.argv,
        "commit": find_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else find_cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def find_commit() -> str | None:
    """Return the commit of this checkout, with "+" if files have changed since; None for an installed wheel."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or None


def find_cpu() -> str:
    """Return the processor's name."""
    return read_cpu("model name") or platform.machine()
