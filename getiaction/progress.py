"""Say how often a progress bar is drawn."""

from __future__ import annotations

import sys


def redraw_seconds() -> float:
    """Return the seconds between two drawings: often on a terminal, seldom in a log file, which wants few lines."""
    return 0.1 if sys.stderr.isatty() else 30.0
