"""What a machine, or a part of it, has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from getiaction.machine import available_memory


def write_group(folder: Path, version: int, limit: str, taken: int, files: int) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{taken}\n")
    kind = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 7\n{kind} {files}\nslab 3\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_a_cgroup_or_of_one_around_it_counts(tmp_path: Path, version: int) -> None:
    own, root = tmp_path / "proc/self/cgroup", tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    own.parent.mkdir(parents=True)
    own.write_text("3:cpuset:/other\n" + ("4:memory:/job/task\n0::/\n" if version == 1 else "0::/job/task\n"))
    write_group(root / "job/task", version, "max", 10_000, 0)
    write_group(root / "job", version, "50000", 30_000, 4_000)
    assert available_memory(tmp_path) == 24_000
    write_group(root / "job/task", version, "12000", 10_000, 1_000)
    assert available_memory(tmp_path) == 3_000
    write_group(root / "job/task", version, "12000", 14_000, 0)
    assert available_memory(tmp_path) == 0


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    free, found = psutil.virtual_memory().available, available_memory(tmp_path)
    assert abs(found - free) < 0.2 * psutil.virtual_memory().total
    assert 0 < available_memory() <= psutil.virtual_memory().total
