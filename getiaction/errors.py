"""Tell a user's mistake from a bug: the entry points print the first as one message, the second with a traceback."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn


class InputError(ValueError):
    """Report a mistake in the input. The message names the key, the value, the rule and the fix."""


class TrainingError(RuntimeError):
    """Report a run that cannot go on (a loss that is not finite, no memory left), with advice."""


def stop(message: str, *, code: int) -> NoReturn:
    """Print one message and exit: 2 for a mistake in the input, 1 for a run that cannot go on."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def first_line(error: BaseException) -> str:
    """Return what an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn the two errors of users, raised inside, into a message and an exit code."""
    try:
        yield
    except (InputError, TrainingError) as error:
        let_go(error)
        stop(str(error), code=2 if isinstance(error, InputError) else 1)


def let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: CPython 3.12 may crash where a pipe's buffer lives until its very end."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
