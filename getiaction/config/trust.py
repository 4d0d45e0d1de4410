"""Build nothing that a file names unless it is known: a run's `config.yaml` may have come with somebody else's run."""

from __future__ import annotations

import re
from typing import Any

KNOWN = re.compile(
    r"getiaction\.(policy|data\.mirror|simulation\.\w+)\.[A-Z]\w+"
    r"|diffusers\.(schedulers\.[\w.]+\.)?\w+Scheduler"
    r"|torch\.optim\.[A-Z]\w+"
)


def unknown_targets(node: Any, prefix: str = "") -> dict[str, str]:
    """Return dotted key -> `_target_` of what a config would build that is not ours, diffusers' or torch's."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found: dict[str, str] = {}
    for name, value in items:
        if name == "_target_" and value is not None and not KNOWN.fullmatch(str(value)):
            found[f"{prefix}{name}"] = str(value)
        found |= unknown_targets(value, f"{prefix}{name}.")
    return found
