"""What the tests fork is watched as what they start: nothing that went wrong may look as if it had gone well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import warm


@pytest.fixture(autouse=True)
def _as_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing start cold because of what a test before has left."""
    monkeypatch.setattr(warm, "AT_START", dict(os.environ))


def test_a_fork_says_and_ends_what_a_command_does(tmp_path: Path) -> None:
    command = ("-m", "getiaction.cli", "trian")
    fork = warm.run(*command, cwd=tmp_path)
    cold = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (fork.returncode, fork.stdout, fork.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert fork.returncode == 2


def test_a_fork_is_a_child_that_can_be_killed(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as said:
        process = warm.start("-m", "http.server", "0", cwd=tmp_path, stdout=said, stderr=said, start_new_session=True)
    assert isinstance(process, warm.Forked)
    assert process.poll() is None
    assert (os.getsid(process.pid), Path(f"/proc/{process.pid}/cwd").readlink()) == (process.pid, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.wait(60) == process.poll() == -signal.SIGKILL


def test_what_is_no_child_is_an_error() -> None:
    with pytest.raises(ChildProcessError):
        warm.Forked(1, ())


def test_another_environment_starts_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with (tmp_path / "said").open("w") as said:
        process = warm.start("-m", "timeit", "-n1", "-r1", "0", stdout=said, stderr=said)
    assert type(process) is subprocess.Popen
    assert process.wait(60) == 0


def test_a_server_that_is_gone_is_an_error_and_the_next_has_another(tmp_path: Path) -> None:
    asked = warm.server()
    (process,) = (one for one in psutil.Process().children() if warm.__file__ in one.cmdline())
    process.kill()
    with pytest.raises((OSError, ValueError)):
        warm.run("-m", "getiaction.cli", "trian", cwd=tmp_path)
    assert warm.run("-m", "getiaction.cli", "trian", cwd=tmp_path).returncode == 2
    assert warm.server() is not asked
