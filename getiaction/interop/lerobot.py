"""Write and open policy folders (`config.json`, `model.safetensors`, processor files).

LeRobot 0.6's `DiffusionPolicy.from_pretrained` opens what `write_policy` writes. What its config cannot say goes into
`getiaction.json`, which LeRobot ignores and `load_policy` reads. Folders without that file are LeRobot's own; those of
today and of its older versions are opened as well, and so are policies on the Hugging Face Hub.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from getiaction.errors import InputError
from getiaction.interop.description import build, describe
from getiaction.interop.hub import fetch_policy, is_repo_id
from getiaction.interop.layout import (
    CONFIG,
    EXTRA,
    POSTPROCESSOR,
    POSTPROCESSOR_STATE,
    PREPROCESSOR,
    PREPROCESSOR_STATE,
    WEIGHTS,
)
from getiaction.interop.lerobot_files import lerobot_config, postprocessor, preprocessor
from getiaction.interop.lerobot_read import read_foreign
from getiaction.policy import DiffusionPolicy
from getiaction.policy.normalizer import Statistics
from getiaction.run_folder import PRETRAINED, last_policy

log = logging.getLogger(__name__)

SHOWN = 5  # names in a message about weights that do not fit
COMPILED = "_orig_mod."  # what torch.compile puts into the names of weights


def write_policy(folder: Path, policy: DiffusionPolicy) -> None:
    """Write a policy folder: weights, config, normalisation, and `getiaction.json`.

    Raises:
        FileExistsError: there is such a folder.
    """
    folder.mkdir(parents=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in policy.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    write_json(folder / CONFIG, lerobot_config(policy))
    write_json(folder / EXTRA, describe(policy))
    statistics = {
        f"{key}.{name}": value.cpu().clone()
        for key, stats in policy.normalizer.statistics.items()
        for name, value in stats.items()
    }
    save_file(statistics, folder / PREPROCESSOR_STATE)
    save_file(statistics, folder / POSTPROCESSOR_STATE)
    write_json(folder / f"{PREPROCESSOR}.json", preprocessor(policy))
    write_json(folder / f"{POSTPROCESSOR}.json", postprocessor(policy))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=4))


def load_policy(source: str | Path, *, device: str | torch.device = "cpu") -> DiffusionPolicy:
    """Open a policy, ready to act.

    Args:
        source: as `find_policy_folder` takes it: a run, a checkpoint, a policy folder of ours or LeRobot's, or the
            name of a policy on the Hub.

    Raises:
        InputError: it is no policy, none that this package has an equal for, or its weights do not fit its config.
    """
    folder = find_policy_folder(source)
    described, statistics, weights = read_policy(folder)
    with naming(folder):
        check_weights(build(described, statistics, device="meta"), weights, folder / WEIGHTS)
        policy = build(described, statistics)
    policy.load_state_dict(weights)
    with naming(folder):
        if (folder / EXTRA).exists():
            warn_of_edits(folder, policy)
    return policy.to(device).eval()


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Turn what the files of a damaged or foreign folder lead to into an error that names it."""
    try:
        yield
    except InputError as error:
        if str(folder) in str(error):
            raise
        raise InputError(f"{folder}: {error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{folder} is damaged, or no policy that this version knows: {said}") from error


def find_policy_folder(source: str | Path, key: str = "checkpoint") -> Path:
    """Return the policy folder that is meant: itself, that of a checkpoint, of a run's last one, or one from the Hub.

    Args:
        source: a folder, or a name on the Hub, `me/policy` or `me/policy@revision`.
        key: what the user set to `source`, for the message.

    Raises:
        InputError: nothing of the kind is there.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if not is_repo_id(str(source)):
            raise InputError(
                f"{key}={source} is no folder: give a run folder, outputs/<name>/<date_time>, or the name of a policy "
                "on the Hugging Face Hub, <owner>/<name>"
            )
        path = fetch_policy(str(source), key)
    places = [last_policy(path), path / PRETRAINED, path]
    folder = next((place for place in places if (place / WEIGHTS).exists()), None)
    if folder is None:
        raise InputError(
            f"{key}={source} holds no policy (no {WEIGHTS}): give a run folder with checkpoints, a "
            "checkpoints/<step> folder or its pretrained_model"
        )
    if (folder / EXTRA).exists() and not (folder / PREPROCESSOR_STATE).exists():
        raise InputError(f"{key}={folder} is not whole: it has no {PREPROCESSOR_STATE}; copy the whole folder")
    return folder


def read_policy(folder: Path) -> tuple[dict[str, Any], Statistics, dict[str, Tensor]]:
    """Return what `build` needs, the normalisation statistics, and the weights by our names."""
    with naming(folder):
        weights = {key.replace(COMPILED, ""): value for key, value in load_file(folder / WEIGHTS).items()}
        if not (folder / EXTRA).exists():
            return read_foreign(folder, weights)
        return json.loads((folder / EXTRA).read_text()), read_statistics(folder / PREPROCESSOR_STATE), weights


def read_statistics(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read normalisation statistics from a processor's state file."""
    statistics: dict[str, dict[str, Tensor]] = {}
    for flat_key, value in load_file(path).items():
        key, name = flat_key.rsplit(".", 1)
        statistics.setdefault(key, {})[name] = value
    return statistics


def load_weights(policy: DiffusionPolicy, weights: Mapping[str, Tensor], name: str | Path) -> None:
    """Load weights, every one of them and no other; raises as `check_weights` does."""
    check_weights(policy, weights, name)
    policy.load_state_dict(dict(weights))


def check_weights(policy: DiffusionPolicy, weights: Mapping[str, Tensor], name: str | Path) -> None:
    """Check that weights are a policy's, by name and shape.

    Args:
        name: where they come from, for the message.

    Raises:
        InputError: a tensor is missing, is left over, or has another shape; the message names it.
    """
    wanted = policy.state_dict()
    problems = {
        "missing": [key for key in wanted if key not in weights],
        "left over": [key for key in weights if key not in wanted],
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        parts = [
            f"{len(found)} {kind}: {', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''}"
            for kind, found in problems.items()
            if found
        ]
        raise InputError(f"the weights in {name} do not fit their policy. {'; '.join(parts)}")


def warn_of_edits(folder: Path, policy: DiffusionPolicy) -> None:
    """Say where `config.json` was changed by hand: `getiaction.json` holds."""
    if not (folder / CONFIG).exists():
        return
    said, expected = json.loads((folder / CONFIG).read_text()), json.loads(json.dumps(lerobot_config(policy)))
    differ = [key for key in expected.keys() - {"device", "type"} if said.get(key, expected[key]) != expected[key]]
    if differ:
        shown = ", ".join(f"{key}={said[key]}" for key in sorted(differ))
        log.warning("warning: %s says %s, but %s does not: the latter holds", folder / CONFIG, shown, EXTRA)
