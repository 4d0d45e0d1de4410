"""Write files in one step, into folders that no other process writes to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from getiaction.errors import InputError

log = logging.getLogger(__name__)

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # on some clusters' disks
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def default_cache_dir() -> Path:
    """Return `$GETIACTION_CACHE`, or `~/.cache/getiaction`."""
    named = os.environ.get("GETIACTION_CACHE")
    return Path(named).expanduser() if named is not None else Path.home() / ".cache" / "getiaction"


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: it has its old content, or the new."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder against a second process that would write there, too; a process that dies lets go of it.

    Raises:
        InputError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{folder} is where {file.read() or 'another process'} is at work: wait for its end, stop it, or give "
                "another folder, output_dir=<folder>"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            log.warning("warning: nothing keeps a second process from writing to %s: %s", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def is_claimed(folder: Path) -> bool:
    """Tell whether a process holds a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with claimed(folder):
            return False
    except InputError:
        return True


def is_full(error: Exception) -> bool:
    """Tell whether an error of writing comes from a full disk or a quota."""
    in_text = any(f"os error {code})" in str(error) for code in FULL)  # safetensors'
    return getattr(error, "errno", None) in FULL or in_text
