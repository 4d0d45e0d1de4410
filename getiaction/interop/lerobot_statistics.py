"""Read how LeRobot's policies normalise: by processor files, or, in 2025 and before, buffers among the weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from getiaction.errors import InputError
from getiaction.interop.layout import POSTPROCESSOR, PREPROCESSOR
from getiaction.interop.lerobot_files import FEATURE_TYPES
from getiaction.keys import ACTION
from getiaction.policy.normalizer import EPS, MODES

log = logging.getLogger(__name__)
Named = dict[str, dict[str, Tensor]]

PASSING_STEPS = ("rename_observations_processor", "to_batch_processor", "device_processor")
BUFFERS = ("normalize_inputs", "normalize_targets", "unnormalize_outputs")
STATISTICS = ("min", "max", "mean", "std")


def read_processors(folder: Path) -> tuple[dict[str, str], Named]:
    """Return modes and statistics from the processor files; those of the action are the postprocessor's."""
    before, after = (read_steps(folder, name) for name in (PREPROCESSOR, POSTPROCESSOR))
    modes, statistics = normalizer_of(folder, PREPROCESSOR, "normalizer_processor", before)
    last_modes, last_statistics = normalizer_of(folder, POSTPROCESSOR, "unnormalizer_processor", after)
    statistics.pop(ACTION, None)
    if ACTION in last_statistics:
        statistics[ACTION] = last_statistics[ACTION]
    return {**modes, "action": last_modes["action"]}, statistics


def read_steps(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the steps of a processor."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise InputError(f"{folder} is not whole: it has no {path.name}; copy the whole folder")
    return json.loads(path.read_text())["steps"]


def normalizer_of(folder: Path, name: str, kind: str, steps: list[dict[str, Any]]) -> tuple[dict[str, str], Named]:
    """Return modes and statistics of a processor's one normaliser, refusing steps that would do something else."""
    found = None
    for step in steps:
        said = step.get("registry_name") or step.get("class")
        if said == kind and found is None:
            found = step
        elif said not in PASSING_STEPS:
            raise InputError(f"{folder / name}.json has the step {said}, which has no equal here")
        elif renames := step.get("config", {}).get("rename_map"):
            log.warning("warning: %s renames observations (%s): give them by the new names here", folder, renames)
    if found is None:
        return dict.fromkeys(FEATURE_TYPES, "identity"), {}
    config, file = found["config"], found.get("state_file")
    if file is not None and (Path(file).name != file or not (folder / file).is_file()):
        raise InputError(f"{folder} is not whole: {name}.json names {file}, which is not in it; copy the whole folder")
    if config.get("eps", EPS) != EPS:
        raise InputError(f"{folder / name}.json normalises with eps={config['eps']}, which has no equal here")
    modes = {ours: str(config["norm_map"].get(theirs, "IDENTITY")).lower() for ours, theirs in FEATURE_TYPES.items()}
    statistics: Named = {}
    for flat_key, value in load_file(folder / file).items() if file else ():
        key, statistic = flat_key.rsplit(".", 1)
        statistics.setdefault(key, {})[statistic] = value
    only = config.get("normalize_observation_keys")
    kept = {key for key in statistics if key == ACTION or only is None or key in only}
    return modes, {key: statistics[key] for key in kept & set(config["features"])}


def read_buffers(buffers: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Named:
    """Return the statistics that versions without processors kept among the weights, dots of keys as underscores."""
    statistics: Named = {}
    left = set(buffers)
    for key in shapes:
        under = f"buffer_{key.replace('.', '_')}"
        for room in BUFFERS:
            for name in [name for name in buffers if name.startswith(f"{room}.{under}.")]:
                statistics.setdefault(key, {})[name.rsplit(".", 1)[1]] = buffers[name]
                left.discard(name)
    if left:
        raise InputError(f"the weights hold statistics of what the policy does not see: {', '.join(sorted(left))}")
    return statistics


def check_modes(modes: Mapping[str, str], folder: Path) -> None:
    """Refuse ways of normalising that have no equal here."""
    if strange := {kind: mode for kind, mode in modes.items() if mode not in MODES}:
        shown = ", ".join(f"{FEATURE_TYPES[kind]}: {mode.upper()}" for kind, mode in strange.items())
        raise InputError(f"{folder} normalises {shown}, which has no equal here: this package has {', '.join(MODES)}")


def in_shape(key: str, stats: Mapping[str, Tensor], shape: tuple[int, ...], folder: Path) -> dict[str, Tensor]:
    """Return statistics in the shape that broadcasts over the feature, (D,) or (C, 1, 1)."""
    size = (shape[0], 1, 1) if len(shape) == 3 else shape
    kept = {name: value.float() for name, value in stats.items() if name in STATISTICS}
    for name, value in kept.items():
        if value.numel() != shape[0]:
            raise InputError(f"{folder}: {name} of {key} has {value.numel()} numbers, the policy needs {shape[0]}")
        if not torch.isfinite(value).all():
            raise InputError(f"{folder}: {name} of {key} is not finite: this policy was never trained on data")
    return {name: value.reshape(size) for name, value in kept.items()}
