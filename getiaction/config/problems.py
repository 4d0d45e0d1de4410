"""Collect findings about a config: errors stop, warnings are logged, and `strict` makes one of the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from getiaction.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """Hold one finding: an error cannot work, a warning works badly."""

    message: str
    is_error: bool = True


def report(problems: list[Problem], *, strict: bool) -> None:
    """Log warnings and raise errors, all at once."""
    errors = [problem.message for problem in problems if problem.is_error or strict]
    for problem in problems:
        if not problem.is_error and not strict:
            log.warning("warning: %s", problem.message)
    if errors:
        raise InputError("\n       ".join(errors))
