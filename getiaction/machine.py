"""Tell what this machine has, and share it with others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil

CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where the limit, what is taken of it and what of that can be had back are told, by the controller's name."""


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(system: Path = Path("/")) -> int:
    """Return the bytes that this process may still take: what the machine has, or less where a cgroup sets a limit.

    Pages of files that nobody has looked at lately do not count as taken. Source: cgroups(7), both versions.
    """
    available = psutil.virtual_memory().available
    own = system / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        names = CGROUP_FILES.get(controllers)
        root = system / "sys/fs/cgroup" / controllers
        group = root / path.lstrip("/")
        while names is not None and group.is_relative_to(root):
            with contextlib.suppress(OSError, ValueError, KeyError):  # the root has no limit, and "max" is none
                limit, taken = (int((group / name).read_text()) for name in names[:2])
                kinds = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                available = min(available, limit - taken + int(kinds[names[2]]))
            group = group.parent
    return max(available, 0)


@cache
def read_cpu(field: str) -> str | None:
    """Return what Linux says of the first processor: "model name", "vendor_id", ...; None where it says nothing.

    Source: proc_cpuinfo(5).
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    entries = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in entries if name.strip() == field), None)


def scheduling() -> tuple[int, int] | None:
    """Return the scheduling policy of this thread and its real-time priority; None where there is no such thing."""
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        return None
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


@contextlib.contextmanager
def kept_scheduling() -> Iterator[None]:
    """Give this thread its scheduling policy back at the end.

    SVT-AV1, which LeRobot encodes videos with, takes real time for whoever calls it as root (as in most containers),
    for good: priority 99, first in, first out. All that such a process starts inherits it, and a few of them keep
    everything else from the cores.

    Source: sched(7); SVT-AV1, Source/Lib/Codec/svt_threads.c.
    """
    before = scheduling()
    try:
        yield
    finally:
        if before is not None:
            policy, priority = before
            os.sched_setscheduler(0, policy, os.sched_param(priority))
