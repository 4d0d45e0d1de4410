"""Tell a user's mistake from a bug: the entry points print the first as one message, the second with a traceback."""

from __future__ import annotations

import contextlib
import sys
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


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn the two errors of users, raised inside, into a message and an exit code."""
    try:
        yield
    except (InputError, TrainingError) as error:
        stop(str(error), code=2 if isinstance(error, InputError) else 1)
