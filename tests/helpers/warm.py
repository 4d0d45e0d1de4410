"""Start commands of the package without waiting for the packages that it builds on: six of a short run's eight seconds.

A server has imported them, and forks. What it forks imports our code, is a child of the process that asked, dies of
the signals that it is sent, and ends as any Python does. What a package reads of the environment when it is imported
must be as it was: a command with another environment starts cold. All forks of a server hash strings alike, and would
not miss an import that another package makes: so some commands of each entry point should start cold.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import numpy

PACKAGES = (
    *("torch", "torch._dynamo", "torchvision", "accelerate", "diffusers.optimization", "safetensors.torch"),
    *("hydra.main", "omegaconf", "pandas", "pyarrow.dataset", "pyarrow.parquet", "av", "PIL.Image"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "psutil", "yaml", "tqdm"),
)
READ_AT_IMPORT = ("ARROW", "ATEN_", "CUDA", "DIFFUSERS", "DNNL_", "GOMP", "HF", "HOME", "KMP", "LANG", "LC_", "MALLOC_")
READ_AT_IMPORT += ("MKL", "MPL", "OMP", "ONEDNN_", "OPENBLAS", "PYTHON", "PYTORCH_", "TMPDIR", "TORCHDYNAMO", "TORCH_")
READ_AT_IMPORT += ("TQDM", "TRITON", "WANDB", "XDG")
READ_LATER = {"HF_LEROBOT_HOME"}
AT_START = dict(os.environ)
ALONE = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a fork has no other threads than the one that forked
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
LARGEST = 2**17  # bytes of a request: a socket takes a little more
READY = b"ready"


class Forked(subprocess.Popen[str]):
    """A child of this process that somebody else has forked."""

    def __init__(self, pid: int, arguments: tuple[str, ...]) -> None:  # what `Popen` would leave behind
        self.pid, self.args, self.returncode = pid, arguments, None  # type: ignore[assignment]
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._waitpid_lock, self._sigint_wait_secs = True, threading.Lock(), 0.25
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises if it is not, which `Popen` takes for 0


def start(
    *arguments: str,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stdout: IO[str] | int | None = None,
    stderr: IO[str] | int | None = None,
    start_new_session: bool = False,
) -> subprocess.Popen[str]:
    """Do what `subprocess.Popen((sys.executable, "-m", module, ...), ...)` does."""
    env = dict(os.environ) if env is None else env
    if arguments[0] != "-m" or has_changed(env):
        command = [sys.executable, *arguments]
        return subprocess.Popen(
            command, cwd=cwd, env=env, stdout=stdout, stderr=stderr, start_new_session=start_new_session, text=True
        )
    printed = 1 if stdout is None else stdout if isinstance(stdout, int) else stdout.fileno()
    said = 2 if stderr is None else stderr if isinstance(stderr, int) else stderr.fileno()
    files = (0, printed, printed if said == subprocess.STDOUT else said)
    request = json.dumps([arguments, str(cwd or Path.cwd()), env, start_new_session]).encode()
    assert len(request) < LARGEST
    assert min(files) >= 0, "no pipes: give files"
    channel, prctl = server(), ctypes.CDLL(None).prctl
    assert prctl(SUBREAPER, 1, 0, 0, 0) == 0  # the nearest such ancestor gets the children of a parent that has ended
    try:
        socket.send_fds(channel, [request], list(files))
        return Forked(int(channel.recv(LARGEST)), (sys.executable, *arguments))
    except BaseException:  # an answer may come yet, which the next one must not take for its own
        channel.close()
        server.cache_clear()
        raise
    finally:
        prctl(SUBREAPER, 0, 0, 0, 0)


def run(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Do what `subprocess.run((sys.executable, *arguments), capture_output=True, text=True)` does."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        process = start(*arguments, cwd=cwd, env=env, stdout=printed, stderr=said)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        texts = [file.read() for file in (printed, said) if file.seek(0) == 0]
    return subprocess.CompletedProcess(process.args, code, *texts)


def has_changed(env: dict[str, str]) -> bool:
    """Tell whether the server's packages would have read another environment."""
    names = {name for name in (*env, *AT_START) if name.startswith(READ_AT_IMPORT)} - READ_LATER
    return any(env.get(name) != AT_START.get(name) for name in names)


@functools.cache
def server() -> socket.socket:
    """Start the server, once in each process that runs tests; it ends when nobody can ask it any more.

    Raises:
        RuntimeError: it has not come up; it says why.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, __file__, str(its.fileno())]
        silent: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        process = subprocess.Popen(command, pass_fds=[its.fileno()], env={**AT_START, **ALONE}, **silent)
    atexit.register(process.wait)
    atexit.register(ours.close)
    if ours.recv(LARGEST) != READY:
        raise RuntimeError("the process that forks did not come up")
    return ours


def serve(channel: socket.socket) -> list[str] | None:
    """Fork for each request; return in the fork, with what it is to run, or None at the end."""
    for name in PACKAGES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    assert len(list(Path("/proc/self/task").iterdir())) == 1
    channel.send(READY)
    while True:
        request, files, *_ = socket.recv_fds(channel, LARGEST, 3)
        if not request:
            return None
        ends = os.pipe()
        if middle := os.fork():
            os.waitpid(middle, 0)  # its child is somebody else's now
            os.close(ends[1])
            if not (forked := os.read(ends[0], 100)):
                return None
            channel.send(forked)
            for file in (ends[0], *files):
                os.close(file)
            continue
        if child := os.fork():
            os.write(ends[1], str(child).encode())
            os._exit(0)
        channel.close()
        arguments, cwd, env, is_new_session = json.loads(request)
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in (*ends, *files):
            os.close(file)
        if is_new_session:
            os.setsid()
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        numpy.random.seed()  # noqa: NPY002  (as it is in a process that imports it itself)
        return arguments


def become(arguments: list[str]) -> None:
    """Run a module as `python -m` does."""
    sys.orig_argv = [sys.executable, *arguments]
    sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        become(asked)
