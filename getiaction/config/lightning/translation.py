"""Hold what a file of the format means here, as overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from getiaction.config.overrides import quote
from getiaction.errors import InputError

GROUPS = ("backbone", "unet", "scheduler", "optimizer", "dataset", "hardware", "env", "tracker")


@dataclass
class Translation:
    """Hold what a file means here.

    Args:
        values: key of the config here -> value; groups (`scheduler`, `env`, ...) -> their choice.
        sources: key here -> key of the file that said so.
        changed: what contradicted itself, and how it was mended.
        left_out: what has no effect here, and why.
        notes: what is otherwise here, and no contradiction.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, source: str) -> None:
        """Set a key, remembering what said so; of two that differ the later holds, and that is said."""
        if key in self.sources and self.values[key] != value:
            self.changed.append(f"{self.sources[key]} {self.values[key]} -> {value}: {source} says so")
        self.values[key] = value
        self.sources[key] = source

    @property
    def overrides(self) -> list[str]:
        """Return the overrides, groups first, as Hydra takes them."""
        groups = [key for key in self.values if key in GROUPS]
        return [
            f"{key}={quote(self.values[key])}"
            for key in [*groups, *(set_ for set_ in self.values if set_ not in GROUPS)]
        ]


def check_names(prefix: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse keys that do not exist, naming the nearest that does."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{prefix}{name} does not exist: {hint}")


def choice(name: str, value: Any, choices: Mapping[str, str]) -> str:
    """Return what a value is called here.

    Raises:
        InputError: it is none of those that exist.
    """
    if str(value) not in choices:
        raise InputError(f"{name}={value} must be one of {', '.join(choices)}")
    return choices[str(value)]
