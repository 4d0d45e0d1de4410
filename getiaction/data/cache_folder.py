"""Build a cache's folder: with room for all of it, and whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from getiaction.data.metadata import CACHE_FILE
from getiaction.errors import InputError
from getiaction.files import is_full

ABANDONED = 24 * 3600  # seconds after which a half-built cache is nobody's, where nothing tells who holds it
FRESH = 60  # seconds in which a folder may not be held yet


def make_room(folder: Path, need: int) -> tuple[Path, int]:
    """Make a temporary folder to build a cache in, and remove what killed builds left.

    Returns:
        The folder, and what holds it as long as it is open.

    Raises:
        InputError: `folder` cannot be written, or has less than `need` bytes free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".building-*"):
            if is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise InputError(
                f"the frame cache needs {need / 1e9:.1f} GB, {folder} has {free / 1e9:.1f}: "
                "set dataset.cache_dir=<folder>"
            )
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".building-"))
        held = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: `is_abandoned` goes by age there
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.chmod(0o755)  # a shared cache is for everyone to read
    except OSError as error:
        raise InputError(
            f"the frame cache {folder} cannot be written ({error}): set dataset.cache_dir=<folder>"
        ) from error
    return temporary, held


def is_abandoned(folder: Path) -> bool:
    """Tell whether whoever was building a cache here is dead: nobody holds it, for a minute or more."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # gone by now
        return False
    try:
        age = time.time() - folder.stat().st_mtime
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return age > FRESH
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return age > ABANDONED
    finally:
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Move a finished folder to its place; one that another process finished first stays."""
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        temporary.rename(path)
    except OSError:
        if not (path / CACHE_FILE).exists():
            raise


def reserve(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Make a file of uint8 with room for all of it on the disk: a full disk would kill whoever writes to the map.

    Raises:
        OSError: there is no room.
    """
    with path.open("wb") as file:
        file.truncate(int(np.prod(shape)))
        try:
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
        except (OSError, AttributeError) as error:  # not on every file system, nor on macOS
            if isinstance(error, OSError) and is_full(error):
                raise
    return np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
