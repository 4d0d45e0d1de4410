"""Take a run's own config up again, with the few changes that leave its course as it is."""

from __future__ import annotations

import logging
import os
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from getiaction.config.compose import to_config
from getiaction.config.overrides import key_of
from getiaction.config.schema import Config
from getiaction.config.sources import without_roots
from getiaction.config.trust import unknown_targets
from getiaction.errors import InputError
from getiaction.run_folder import CHECKPOINTS, CONFIG, has_checkpoint
from getiaction.training.checkpoint import read_global_batch_size

log = logging.getLogger(__name__)
MAY_CHANGE = (
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.max_steps",
    "training.max_epochs",
    "training.log_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.resume",
    "validation",
    "evaluation",
    "env",
    "sweep_metric",
    "hardware",
    "tracker",
    "dataset.root",
    "dataset.cache_dir",
    "strict",
)


def can_go_on(folder: Path) -> bool:
    """Tell whether a folder holds a run that can go on."""
    return (folder / CONFIG).exists() and has_checkpoint(folder)


def take_up(config: Config, overrides: list[str], folder: Path) -> Config:
    """Return the config of the run to go on with, if `training.resume` names one, or "auto" finds one in `folder`.

    Args:
        config, overrides, folder: as `resumed_config` takes them.

    Raises:
        InputError: an override would change what the run computes.
    """
    if config.training.resume == "auto":
        config.training.resume = str(folder) if can_go_on(folder) else None
    return resumed_config(config, overrides, folder) if config.resumes else config


def resumed_config(config: Config, overrides: list[str], folder: Path) -> Config:
    """Return the config that a run folder was started with, plus the overrides of this command line.

    Args:
        config: what this command line composes to; its values of the overridden keys are taken.
        overrides: this command line, as Hydra reports it.
        folder: the run folder.

    Raises:
        InputError: an override would change what the run computes.
    """
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"training.resume: {folder} has no config.yaml, so it is no run of getiaction")
    saved = OmegaConf.create(dict(yaml.safe_load(path.read_text())))
    now = OmegaConf.structured(config)
    saved.setdefault("mirror", {"_target_": None})  # a run of before they were there, whatever its preset says today
    saved["training"].setdefault("observation_noise", 0.0)
    saved["policy"].setdefault("loss_weighting", "none")
    fill_new_keys(saved, now)
    for key, target in unknown_targets(OmegaConf.to_container(saved)).items():
        if OmegaConf.select(now, key) != target:
            raise InputError(
                f"{path} would run {key}={target}, which is not ours: if it is yours, name it in this command as well"
            )
    for key, override in {key_of(override): override for override in overrides}.items():
        if key == "preset" and config.name != saved["name"]:
            raise InputError(f"{override} is not what {folder} runs (it has name={saved['name']}): leave it out")
        if key not in ("output_dir", "preset"):
            take_over(saved, key, OmegaConf.select(now, key), override)
    saved.training.resume = str(folder)
    keep_global_batch(saved, folder, {key_of(override) for override in overrides})
    return to_config(saved, "train", Config)


def take_over(saved: DictConfig, key: str, value: Any, override: str) -> None:
    """Set a key of a run's config to what the command line says, if that leaves the run's course as it is.

    Raises:
        InputError: it would not.
    """
    before = OmegaConf.select(saved, key)
    if not any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE):
        if value == before:
            return
        if not (key == "dataset.sources" and moved(plain(before), plain(value))):
            raise InputError(
                f"{override} cannot change in a run that resumes (it has {key}={plain(before)}): leave it out, or "
                f"start a new run. What may change: {', '.join(MAY_CHANGE)}"
            )
    longer = key in ("training.max_steps", "training.max_epochs") and value != before
    if longer and not str(saved["lr_scheduler"]["name"]).startswith("constant"):
        log.warning("warning: %s stretches the learning-rate schedule: the rate changes at this step", override)
    OmegaConf.update(saved, key, value, merge=False, force_add=True)


def moved(sources: list[Any] | None, now: list[Any] | None) -> bool:
    """Tell whether two lists of datasets differ in nothing but the folders where those lie."""
    return sources is not None and now is not None and without_roots(sources) == without_roots(now)


def keep_global_batch(saved: DictConfig, folder: Path, keys: set[str]) -> None:
    """Share the global batch that a run has had among the processes of now, but where `keys` were overridden."""
    batch = read_global_batch_size(folder / CHECKPOINTS)
    if not batch or "training.gradient_accumulation_steps" in keys:
        return
    processes = int(os.environ.get("WORLD_SIZE", saved.hardware.num_processes * saved.hardware.num_nodes))
    before = saved.training.gradient_accumulation_steps
    split_batch(saved.training, batch, processes, may_shrink="training.batch_size" not in keys)
    if saved.backbone.get("norm") == "batch" and saved.training.gradient_accumulation_steps != before:
        size = batch // before // processes
        log.warning("warning: batch norm saw %d samples at a time: training.batch_size=%d", batch // before, size)


def split_batch(training: DictConfig, batch: int, processes: int, *, may_shrink: bool) -> None:
    """Share the global batch of a run among the processes of now, in micro-batches of at most the size given.

    Args:
        training: gets other `batch_size` and `gradient_accumulation_steps`, if there are some that fit.
        batch: the global batch of the run.
        may_shrink: `batch_size` may become smaller, if no accumulation of it fits.

    Raises:
        InputError: the batch does not divide by the processes.
    """
    if batch % processes:
        raise InputError(
            f"training.resume: the run's global batch of {batch} cannot be shared by {processes} processes: use a "
            "number that divides it"
        )
    own = batch // processes
    if own % training.batch_size and may_shrink:
        training.batch_size = max(size for size in range(1, training.batch_size + 1) if own % size == 0)
    if own % training.batch_size == 0:
        training.gradient_accumulation_steps = own // training.batch_size


def fill_new_keys(saved: DictConfig, now: DictConfig) -> None:
    """Give the config of a run that an older version started the keys that it did not have."""
    for key in now:
        if key not in saved:
            saved[key] = now[key]
        elif is_dataclass(OmegaConf.get_type(now, str(key))):  # not the open groups: what they hold is their choice
            fill_new_keys(saved[key], now[key])


def plain(value: Any) -> Any:
    """Return a config node as plain data."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
