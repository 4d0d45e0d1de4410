"""Write `--help` from the config tree itself, so that it cannot fall behind it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

USAGE = """Train a Diffusion Policy.

  python -m getiaction.train +preset=NAME [group=CHOICE ...] [key=value ...]
"""

OVERRIDES = """Ten overrides that people need:

  dataset.root=DIR                a LeRobotDataset v3.0 folder; dataset.repo_id=me/data takes one from the Hub
  dataset.episodes='[0,1,2]'      train on some episodes only
  training.max_steps=20000        length in optimiser steps; training.max_epochs=50 in epochs
  training.batch_size=32          samples per device; lower it when memory runs out
  optimizer.lr=5e-4               learning rate
  unet.down_dims='[128,256,512]'  one knob of a group; unet=small turns all of them
  policy.num_inference_steps=10   denoising steps when acting
  hardware.mixed_precision=auto   half precision where the device has it
  training.resume=RUN_FOLDER      go on with a run, exactly; true takes the newest
  seed=1                          of everything random

Also: --cfg job shows what a command line composes to; -m sweeps, -m seed=0,1,2 unet=small,base; --hydra-help
has Hydra's own flags. Every key with a comment: the preset pusht_advanced."""


def help_text(folder: Path, config_name: str = "train") -> str:
    """Return the help of an entry point whose config tree is `folder`: groups, choices and keys with their comments."""
    if config_name != "train":
        return "\n\n".join([f"{first_comment(folder / f'{config_name}.yaml')}", keys_help(folder, config_name)])
    groups = sorted(
        (path for path in folder.iterdir() if path.is_dir() and path.name != "lightning"),  # those are for `fit`
        key=lambda path: (path.name != "preset", path),
    )
    sections = []
    for group in groups:
        title = "Presets, +preset=NAME:" if group.name == "preset" else f"Group {group.name}, {group.name}=CHOICE:"
        choices = [f"  {path.stem:20} {first_comment(path)}" for path in sorted(group.glob("*.yaml"))]
        sections.append("\n".join([title, "", *choices, ""]))
    return "\n".join([USAGE, *sections, OVERRIDES])


def keys_help(folder: Path, config_name: str) -> str:
    """Return the keys of a root config, each with its comment and default, and the choices of `env`."""
    lines = (folder / f"{config_name}.yaml").read_text().splitlines()
    keys = [
        f"  {line:32} {comment.removeprefix('# ')}"
        for comment, line in pairwise(lines)
        if comment.startswith("# ") and re.match(r"\w+:", line) and not line.startswith("defaults:")
    ]
    choices = [f"  env={path.stem:28} {first_comment(path)}" for path in sorted((folder / "env").glob("*.yaml"))]
    return "\n".join(["Keys, key=value:", "", *keys, "", "Simulators:", "", *choices])


def first_comment(path: Path) -> str:
    """Return the first comment line of a YAML file that says what it is."""
    lines = (line for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line)
    return next(lines, "# ").removeprefix("# ")
