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
    steps, epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    if epochs == -1 and steps == -1:
        raise InputError("trainer.max_epochs=-1 never ends: give a number, or trainer.max_steps")
    if epochs is None and steps == -1:
        epochs = keys.LIGHTNING_MAX_EPOCHS
        found.notes.append(f"neither trainer.max_epochs nor max_steps is given: {epochs} epochs, as in Lightning")
    lengths = {"training.max_steps": steps, "training.max_epochs": epochs}
    found.values |= {key: None if value == -1 else value for key, value in lengths.items()}
    if trainer.get("gradient_clip_val") == 0:
        found.values["training.max_grad_norm"] = None
    if trainer.get("gradient_clip_algorithm", "norm") != "norm":
        raise InputError(f"trainer.gradient_clip_algorithm={trainer['gradient_clip_algorithm']}: there is norm only")
    if "precision" in trainer:
        name = choice("trainer.precision", trainer["precision"], keys.PRECISIONS)
        found.set("hardware.mixed_precision", name, "trainer.precision")
    if "accelerator" in trainer:
        name = choice("trainer.accelerator", trainer["accelerator"], keys.ACCELERATORS)
        found.set("hardware.device", name, "trainer.accelerator")
    set_devices(trainer, found)
    if not trainer.get("enable_checkpointing", True):
        found.set("training.save_every", None, "trainer.enable_checkpointing")  # the last one is always written
    set_logger(trainer.get("logger", False), found)
    for key, why in keys.TRAINER_WITHOUT_EFFECT.items():
        if key in trainer:
            found.left_out.append(f"trainer.{key}: {why}")


def set_logger(logger: Any, found: Translation) -> None:
    """Set the tracker: the first of the loggers; the rest is listed."""
    loggers = [one for one in (logger if isinstance(logger, list) else [logger]) if not isinstance(one, bool)]
    for number, one in enumerate(loggers):
        path, given = (one.get("class_path"), one.get("init_args") or {}) if isinstance(one, dict) else (one, {})
        name = str(path).rsplit(".", 1)[-1]
        tracker = choice("trainer.logger", name, keys.LOGGERS)
        if number:
            found.left_out.append(f"trainer.logger {name}: there is one tracker; metrics.jsonl is always written")
            continue
        found.set("tracker", tracker, "trainer.logger")
        for key, value in given.items():
            if key in ("project", "entity") and tracker == "wandb":
                found.set(f"tracker.{key}", value, f"trainer.logger.init_args.{key}")
            else:
                found.left_out.append(f"trainer.logger.init_args.{key}: the tracker names its run after the folder")


def set_devices(trainer: dict[str, Any], found: Translation) -> None:
    """Set the number of processes: one for each device."""
    devices, strategy = trainer.get("devices"), str(trainer.get("strategy", "auto"))
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
    trainer: dict[str, Any], data: dict[str, Any], model: dict[str, Any], metadata: DatasetMetadata, found: Translation
) -> None:
    """Say in optimiser steps when to validate, and to roll out where there are gyms for it."""
    values = found.values
    interval, epochs = trainer.get("val_check_interval", 1.0), trainer.get("check_val_every_n_epoch", 1)
    asked = [key for key in ("val_check_interval", "check_val_every_n_epoch") if key in trainer]
    rolls_out = "val_gyms" in data
    if not asked and not rolls_out:
        return
    accumulation = values.get("training.gradient_accumulation_steps", 1)
    batch = values["training.batch_size"] * accumulation * values.get("hardware.num_processes", 1)
    if isinstance(interval, int):  # batches
        steps = max(interval // accumulation, 1)
    else:  # a share of an epoch
        steps = max(math.ceil(interval * epochs * count_samples(model, metadata, values) / batch), 1)
    if asked and "validation.every" not in values:
        found.set("validation.every", steps, f"trainer.{asked[0]}")
    if rolls_out and "evaluation.every" not in values:
        found.set("evaluation.every", steps, "data.init_args.val_gyms")


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
