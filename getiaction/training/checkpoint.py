"""Write checkpoints that are whole or not there, in LeRobot's layout, and read them back.

checkpoints/<step>/pretrained_model/   the policy, its averaged weights: what LeRobot opens
checkpoints/<step>/training_state/     raw weights, optimiser, schedule, step: what a resumed run needs
checkpoints/<step>/manifest.json       size and checksum of every file
checkpoints/last                       link to the newest
checkpoints/best/pretrained_model/     if asked for: the policy with the best score so far, beside its `score.json`
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from getiaction.errors import InputError
from getiaction.run_folder import BEST, LAST, MANIFEST, PRETRAINED, STATE

SCORE = "score.json"
WEIGHTS = "model.safetensors"


@dataclass
class TrainingState:
    """Hold everything besides the averaged policy that decides how a run goes on."""

    step: int
    global_batch_size: int
    data: str  # fingerprint of the episodes: see `Episodes.fingerprint`
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    grad_scaler: dict[str, Any] | None = None


class CheckpointStore:
    """Save and find the checkpoints of one run.

    Args:
        folder: the run's `checkpoints/`.
        write_policy: writes a policy as a folder that can be opened without this run.
        keep: how many to keep, newest first; None keeps all.
    """

    def __init__(self, folder: Path, *, write_policy: Callable[[Path, Any], None], keep: int | None = None) -> None:
        self.folder, self.write_policy, self.keep = folder, write_policy, keep

    def save(self, policy: nn.Module, state: TrainingState) -> Path:
        """Write a checkpoint beside its place, then move it there; nothing that was saved is touched before that."""
        path = self.folder / f"{state.step:06d}"
        if path.exists() and find_damage(path) is None:  # a resumed run comes by again: the same weights
            point_last_at(self.folder, path.name)
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = readable_folder(self.folder)
        try:
            (temporary / STATE).mkdir()
            self.write_policy(temporary / PRETRAINED, policy)
            write_state(temporary / STATE, state)
            write_manifest(temporary)
            shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step, if any
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync(self.folder)
        point_last_at(self.folder, path.name)
        self.prune(state.step)
        return path

    def save_best(self, policy: nn.Module, *, step: int, score: float) -> None:
        """Keep the policy as `best` if its score is above that of the one there; of equals, the first stays."""
        path = self.folder / BEST
        if (path / SCORE).exists() and json.loads((path / SCORE).read_text())["score"] >= score:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = readable_folder(self.folder)
        self.write_policy(temporary / PRETRAINED, policy)
        write_json(temporary / SCORE, {"step": step, "score": score})
        write_manifest(temporary)
        old = self.folder / f".{BEST}-old"
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        fsync(self.folder)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit())

    def prune(self, newest: int) -> None:
        """Remove all but the newest `keep` checkpoints up to the step `newest`, and what killed runs left half-written.

        Those after it are damaged ones, which a resumed run has passed over: they take nobody's place.
        """
        saved = [step for step in self.steps() if step <= newest]
        for step in saved[: -self.keep] if self.keep else []:
            (self.folder / f"{step:06d}").rename(self.folder / f".removing-{step:06d}")  # whole, or not there
        for path in (*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")):
            shutil.rmtree(path, ignore_errors=True)
        for link in self.folder.glob(f".{LAST}-*"):
            link.unlink(missing_ok=True)

    def newest(self, announce: Callable[[str], Any] = print) -> Path:
        """Return the newest checkpoint that is whole, passing over damaged ones with a line.

        Raises:
            InputError: there is none.
        """
        for step in reversed(self.steps()):
            path = self.folder / f"{step:06d}"
            if problem := find_damage(path):
                announce(f"checkpoint {path} is damaged ({problem}): using the one before")
            else:
                return path
        raise InputError(f"{self.folder} holds no whole checkpoint: start a new run")


def readable_folder(parent: Path) -> Path:
    """Make a temporary folder that others may read, as far as this process's umask lets them."""
    folder = parent / f".writing-{uuid4().hex}"
    folder.mkdir()
    return folder


def write_state(folder: Path, state: TrainingState) -> None:
    """Write the training state as safetensors and JSON."""
    save_file({key: value.detach().cpu().contiguous() for key, value in state.weights.items()}, folder / WEIGHTS)
    tensors: dict[str, Tensor] = {}
    for index, entry in state.optimizer["state"].items():
        for name, value in entry.items():
            tensors[f"{index}/{name}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
    save_file(tensors, folder / "optimizer_state.safetensors")
    write_json(folder / "optimizer_param_groups.json", state.optimizer["param_groups"])
    write_json(folder / "scheduler_state.json", state.lr_scheduler)
    write_json(folder / "grad_scaler.json", state.grad_scaler)
    write_json(
        folder / "training_step.json",
        {"step": state.step, "global_batch_size": state.global_batch_size, "data": state.data},
    )


def read_state(path: Path) -> TrainingState:
    """Read the training state of a checkpoint folder."""
    folder = path / STATE
    per_parameter: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer_state.safetensors").items():
        index, name = key.split("/", 1)
        per_parameter.setdefault(int(index), {})[name] = value
    groups = json.loads((folder / "optimizer_param_groups.json").read_text())
    for group in groups:
        group.update({name: tuple(value) for name, value in group.items() if name == "betas"})
    return TrainingState(
        **json.loads((folder / "training_step.json").read_text()),
        weights=load_file(folder / WEIGHTS),
        optimizer={"state": per_parameter, "param_groups": groups},
        lr_scheduler=json.loads((folder / "scheduler_state.json").read_text()),
        grad_scaler=json.loads((folder / "grad_scaler.json").read_text()),
    )


def read_global_batch_size(folder: Path) -> int | None:
    """Return the global batch of the run with these `checkpoints/`; None if none of them tells."""
    for path in sorted(folder.glob(f"[0-9]*/{STATE}/training_step.json"), reverse=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(path.read_text())["global_batch_size"])
    return None


def read_average(path: Path) -> dict[str, Tensor]:
    """Read the averaged weights of a checkpoint folder."""
    return load_file(path / PRETRAINED / WEIGHTS)


def write_json(path: Path, content: Any) -> None:
    """Write JSON; floats keep every bit."""
    path.write_text(json.dumps(content, indent=1))


def write_manifest(folder: Path) -> None:
    """Record size and checksum of every file below `folder`, and bring them all to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): [path.stat().st_size, checksum(path)] for path in files}
    write_json(folder / MANIFEST, manifest)
    for path in (*files, folder / MANIFEST, folder):
        fsync(path)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not manifest or not isinstance(manifest, dict):
            return f"{MANIFEST} lists no files"
        for path in (*folder.rglob("*"), *(folder / name for name in manifest)):
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{path.relative_to(folder)} leads out of the checkpoint"
        for name, (size, digest) in manifest.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size or checksum(path) != digest:
                return f"{name} does not match {MANIFEST}"
    except (OSError, ValueError, TypeError) as error:
        return f"{MANIFEST}: {type(error).__name__}"
    return None


def checksum(path: Path) -> str:
    """Return the XXH3 checksum of a file."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(16 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point_last_at(folder: Path, name: str) -> None:
    """Make `last` a link to `name`, in one step."""
    link = folder / f".{LAST}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(folder / LAST)
