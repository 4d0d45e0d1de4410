"""What the tests fork is watched as what they start: nothing that went wrong may look as if it had gone well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    with (tmp_path / "said").open("w") as said:
        process = warm.start("-m", "timeit", "-n1", "-r1", "0", stdout=said, stderr=said)
    assert type(process) is subprocess.Popen
    assert process.wait(60) == 0


STARTS = """
import os, signal, subprocess, sys, time
from pathlib import Path

signal.signal(signal.SIGUSR1, signal.SIG_IGN)
env = {**os.environ, "RANK": "1"}
started = subprocess.Popen([sys.executable, "-u", "-m", "started"], env=env, start_new_session=True)
assert "torch" in sys.modules and "huggingface_hub" not in sys.modules
print(os.getpid(), started.pid, started.wait(), flush=True)
started = subprocess.Popen([sys.executable, "-m", "started"], start_new_session=True)
Path("new").write_text(str(started.pid))
Path("new").rename("pid")
time.sleep(1000)
"""
STARTED = """
import os, signal, sys, time

assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
print(os.getppid(), os.getpid(), os.environ.get("RANK"), "torch" in sys.modules)
if "RANK" in os.environ:
    os._exit(7)
time.sleep(1000)
"""


def test_what_a_fork_starts_is_its_child_and_forked_and_can_read_another_hub(tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text(STARTS)
    (tmp_path / "started.py").write_text(STARTED)
    with (tmp_path / "said").open("w") as said:
        env = {**os.environ, "HF_HOME": str(tmp_path)}
        process = warm.start("-m", "starts", cwd=tmp_path, env=env, stdout=said, stderr=said)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first, second = (tmp_path / "said").read_text().split("\n")[:2]
    assert first.split() == [str(process.pid), second.split()[1], "1", "True"]
    assert second.split()[::2] == [str(process.pid), "7"]
    started = psutil.Process(int((tmp_path / "pid").read_text()))
    own = [child for child in psutil.Process(process.pid).children() if child != started]
    assert (os.getsid(started.pid), len(own)) == (started.pid, 1)  # the other forks
    assert (started.environ()["HF_HOME"], "RANK" in started.environ()) == (str(tmp_path), False)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert psutil.wait_procs(own, 60)[1] == []  # nobody can ask it any more
    assert started.is_running()
    started.kill()


def test_a_server_that_is_gone_is_an_error_and_the_next_has_another(tmp_path: Path) -> None:
    asked = warm.server(True)
    (process,) = (one for one in psutil.Process().children() if {warm.__file__, "hub"} <= set(one.cmdline()))
    process.kill()
    with pytest.raises((OSError, ValueError)):
        warm.run("-m", "getiaction.cli", "trian", cwd=tmp_path)
    assert warm.run("-m", "getiaction.cli", "trian", cwd=tmp_path).returncode == 2
    assert warm.server(True) is not asked
