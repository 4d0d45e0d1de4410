"""Draw a run: the loss curves, and the actions that the policy samples beside those that people recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from getiaction.policy import DiffusionPolicy
from getiaction.training.metrics import read_metrics
from getiaction.training.validation import Sampled, Validator, evaluating

PANELS = 8  # samples drawn


def draw_report(folder: Path, validator: Validator | None, policy: DiffusionPolicy) -> list[Path]:
    """Draw `curves.png`, and `trajectories.png` if episodes are held out; return what was drawn."""
    pictures = [draw_curves(read_metrics(folder), folder / "curves.png")]
    if validator is not None and len(validator.sampled_ids):
        with evaluating(policy):
            pictures.append(draw_trajectories(validator.sample(policy), folder / "trajectories.png"))
    return pictures


def draw_curves(lines: list[dict[str, Any]], path: Path) -> Path:
    """Draw training and validation loss, each dataset's own if there are several, and the actions' error over steps."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    own = sorted({key for line in lines for key in line if key.startswith("val_loss_")}, key=lambda key: int(key[9:]))
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, bottom=0.13, right=0.98, top=0.92, wspace=0.18)  # a layout would draw all twice
    for axes, keys in ((left, ("loss", "val_loss", *own)), (right, ("val_action_error",))):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 40 else None, markersize=3, label=key)
        axes.set_xlabel("optimiser steps")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    left.set_yscale("log")
    left.set_title("loss")
    right.set_title("mean error of sampled actions (dataset units)")
    figure.savefig(path, dpi=120)
    return path


def draw_trajectories(sampled: Sampled, path: Path) -> Path:
    """Draw sampled chunks beside the recorded ones: paths in the plane if Da is 2, else curves over time."""
    from matplotlib.figure import Figure

    chosen = np.unique(np.linspace(0, len(sampled.predicted) - 1, PANELS).astype(int))
    figure = Figure(figsize=(12, 6))
    figure.subplots_adjust(left=0.05, bottom=0.05, right=0.99, top=0.92, wspace=0.25, hspace=0.13)
    for place, index in enumerate(chosen, 1):
        axes = figure.add_subplot(2, PANELS // 2, place)
        for name, chunk, style in (("recorded", sampled.recorded, "o-"), ("sampled", sampled.predicted, "x--")):
            actions = chunk[index].numpy()  # (Ta, Da)
            if actions.shape[1] == 2:
                axes.plot(actions[:, 0], actions[:, 1], style, label=name, markersize=4)
                axes.set_aspect("equal", adjustable="datalim")
            else:
                axes.set_prop_cycle(None)
                axes.plot(actions[:, :6], style[1:], label=[f"{name} {dim}" for dim in range(min(6, actions.shape[1]))])
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(
        f"actions on held-out episodes; mean absolute error {sampled.mean_absolute_error:.3g} (dataset units)"
    )
    figure.savefig(path, dpi=110)
    return path
