"""Translate the `trainer` section: length, devices, precision, when to validate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from getiaction.config.lightning import keys
from getiaction.config.lightning.translation import Translation, choice
from getiaction.data.metadata import DatasetMetadata
from getiaction.data.statistics import split_episodes
from getiaction.errors import InputError


def set_trainer(trainer: dict[str, Any], found: Translation) -> None:
    """Set what the trainer says."""
    for name, key in keys.TRAINER.items():
        if name in trainer:
            found.set(key, trainer[name], f"trainer.{name}")
    steps, epochs = (found.values.get(f"training.{name}") for name in ("max_steps", "max_epochs"))
    steps, epochs = (None if value in (None, -1) else value for value in (steps, epochs))
    if steps is None and epochs is None:
        epochs = keys.LIGHTNING_MAX_EPOCHS
    found.values |= {"training.max_steps": steps, "training.max_epochs": epochs}
    if trainer.get("gradient_clip_val") == 0:
        found.values["training.max_grad_norm"] = None
    if trainer.get("gradient_clip_algorithm") not in (None, "norm"):
        raise InputError(f"trainer.gradient_clip_algorithm={trainer['gradient_clip_algorithm']}: there is norm only")
    if (precision := trainer.get("precision")) is not None:
        name = choice("trainer.precision", precision, keys.PRECISIONS)
        found.set("hardware.mixed_precision", name, "trainer.precision")
    if (accelerator := trainer.get("accelerator")) is not None:
        name = choice("trainer.accelerator", accelerator, keys.ACCELERATORS)
        found.set("hardware.device", name, "trainer.accelerator")
    set_devices(trainer, found)
    if trainer.get("enable_checkpointing") is False:
        found.set("training.save_every", None, "trainer.enable_checkpointing")  # the last one is always written
    logger = trainer.get("logger")
    for one in logger if isinstance(logger, list) else [logger]:
        if isinstance(one, dict):
            tracker = choice("trainer.logger", str(one.get("class_path")).rsplit(".", 1)[-1], keys.LOGGERS)
            found.set("tracker", tracker, "trainer.logger")
            if (project := (one.get("init_args") or {}).get("project")) is not None:
                found.set("tracker.project", project, "trainer.logger")
    for key, why in keys.TRAINER_WITHOUT_EFFECT.items():
        if trainer.get(key) is not None:
            found.left_out.append(f"trainer.{key}: {why}")


def set_devices(trainer: dict[str, Any], found: Translation) -> None:
    """Set the number of processes: one for each device."""
    devices, strategy = trainer.get("devices"), trainer.get("strategy", "auto")
    if strategy not in keys.STRATEGIES:
        raise InputError(f"trainer.strategy={strategy} has no equal here: there is {', '.join(keys.STRATEGIES)}")
    if devices is None:
        return
    if devices in ("auto", -1, "-1"):
        import torch

        count = 1 if trainer.get("accelerator") == "cpu" else max(torch.cuda.device_count(), 1)
    elif isinstance(devices, list):
        count = len(devices)
        found.left_out.append(f"trainer.devices={devices}: {count} of them; CUDA_VISIBLE_DEVICES chooses which")
    elif str(devices).isdigit() and int(devices) > 0:
        count = int(devices)
    else:
        raise InputError(f"trainer.devices={devices} must be a number, a list or auto")
    found.set("hardware.num_processes", count, "trainer.devices")


def set_validation(
    trainer: dict[str, Any], model: dict[str, Any], metadata: DatasetMetadata, found: Translation
) -> None:
    """Say in optimiser steps when to validate."""
    if "validation.every" in found.values:
        return
    interval, epochs = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch")
    accumulation = found.values.get("training.gradient_accumulation_steps", 1)
    if isinstance(interval, int) and not isinstance(interval, bool):
        found.set("validation.every", max(interval // accumulation, 1), "trainer.val_check_interval")
    elif interval is not None or epochs is not None:
        share = (interval if interval is not None else 1) * (epochs if epochs is not None else 1)
        if not isinstance(share, int | float) or share <= 0:
            raise InputError(f"trainer.check_val_every_n_epoch={epochs} must be a whole number of at least 1")
        batch = found.values["training.batch_size"] * accumulation * found.values.get("hardware.num_processes", 1)
        steps = max(math.ceil(share * count_samples(model, metadata, found.values) / batch), 1)
        found.set("validation.every", steps, "trainer.check_val_every_n_epoch")


def count_samples(model: Mapping[str, Any], metadata: DatasetMetadata, values: Mapping[str, Any]) -> int:
    """Return how many samples an epoch has."""
    dropped = model.get("drop_n_last_frames")
    if dropped is None:
        dropped = model.get("horizon", 16) - model.get("n_action_steps", 8) - model.get("n_obs_steps", 2) + 1
    chosen = values.get("dataset.episodes")
    train, _ = split_episodes(
        list(metadata.episode_indices if chosen is None else chosen),
        val_fraction=values.get("dataset.val_fraction", 0.05),
        val_episodes=values.get("dataset.val_episodes"),
        seed=values.get("seed", 0),
    )
    return sum(max(int(row["length"]) - dropped, 0) for row in metadata.rows_of(train))
