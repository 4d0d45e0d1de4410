"""Start commands of the package without waiting for the packages that it builds on: six of a short run's eight seconds.

A server has imported them, and forks. What it forks imports our code, is a child of the process that asked, dies of
the signals that it is sent, and ends as any Python does. What it starts itself as `python -m` is forked as well, by a
server of its own, if in a new session: the launcher of several processes, and each of them. A fork inherits the
signals that are ignored, as any process does, but not limits or an umask. What a package reads of the environment when
it is imported must be as it was: a command with another environment starts cold. All forks of a server hash strings
alike, and would not miss an import that another package makes: so some commands of each entry point should start cold.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy

PACKAGES = (
    *("torch", "torch._dynamo", "torchvision", "safetensors.torch"),
    *("hydra.main", "omegaconf", "pandas", "pyarrow.dataset", "pyarrow.parquet", "av", "PIL.Image"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "psutil", "yaml", "tqdm"),
)
OF_THE_HUB = ("accelerate", "diffusers.optimization")  # they import huggingface_hub
READ_AT_IMPORT = ("ARROW", "ATEN_", "CUDA", "DIFFUSERS", "DNNL_", "GOMP", "HF", "HOME", "KMP", "LANG", "LC_", "MALLOC_")
READ_AT_IMPORT += ("MKL", "MPL", "OMP", "ONEDNN_", "OPENBLAS", "PYTHON", "PYTORCH_", "TMPDIR", "TORCHDYNAMO", "TORCH_")
READ_AT_IMPORT += ("TQDM", "TRITON", "WANDB", "XDG")
READ_BY_THE_HUB = ("HF",)
READ_LATER = {"HF_LEROBOT_HOME", "OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}  # the second, see `take_over`
AT_START = dict(os.environ)
ALONE = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OPENBLAS_NUM_THREADS": "1"}
"""No threads but the one that forks: a fork would not have them."""
ROOM = {"ROOM_FOR_OTHER_ENVIRONMENTS": 2**14 * "."}
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
LARGEST = 2**17  # bytes of a request: a socket takes a little more
READY = b"ready"
ONE_AT_A_TIME = threading.Lock()
HUB_IS_IMPORTED = False  # in a server, and in what it forks
OWN: socket.socket | None = None  # in a fork: the server of what it starts


class Forked(subprocess.Popen[str]):
    """A child of this process that somebody else has forked."""

    def __init__(self, pid: int, arguments: Sequence[str]) -> None:  # what `Popen` would leave behind
        self.pid, self.args, self.returncode = pid, arguments, None  # type: ignore[assignment]
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._waitpid_lock, self._sigint_wait_secs = True, threading.Lock(), 0.25
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises if it is not, which `Popen` takes for 0


class Started(subprocess.Popen[Any]):
    """What a fork starts: a fork as well, if it is `python -m` with this environment and with files, not pipes."""

    def __init__(self, args: Any, *rest: Any, **named: Any) -> None:
        options = {"cwd", "env", "stdout", "stderr", "start_new_session"}
        env = dict(os.environ) if named.get("env") is None else named["env"]
        files = (0, named.get("stdout"), named.get("stderr"))
        is_alike = not rest and options.issuperset(named) and named.get("start_new_session")
        is_alike = is_alike and subprocess.PIPE not in files  # nor does it share its own server's session
        if not (is_module(args) and is_alike) or has_changed(env, hub=HUB_IS_IMPORTED):
            super().__init__(args, *rest, **named)
            return
        assert OWN is not None
        Forked.__init__(self, ask(OWN, args[1:], named.get("cwd"), env, files, True), args)  # type: ignore[arg-type]


def is_module(args: Any) -> bool:
    """Tell whether a command is `python [-u] -m module`."""
    return not isinstance(args, str) and args[0] == sys.executable and "-m" in args[1 : 3 if args[1] == "-u" else 2]


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
    command = [sys.executable, *arguments]
    hubs = [hub for hub in (True, False) if not has_changed(env, hub=hub)]
    if not hubs or not is_module(command):
        return subprocess.Popen(
            command, cwd=cwd, env=env, stdout=stdout, stderr=stderr, start_new_session=start_new_session, text=True
        )
    channel = server(hubs[0])
    try:
        pid = ask(channel, arguments, cwd, env, (0, stdout, stderr), start_new_session)
    except BaseException:  # an answer may come yet, which the next one must not take for its own
        channel.close()
        server.cache_clear()
        raise
    return Forked(pid, command)


def ask(
    channel: socket.socket,
    arguments: Sequence[str],
    cwd: Path | str | None,
    env: dict[str, str],
    streams: Sequence[IO[str] | int | None],
    start_new_session: bool,
) -> int:
    """Let a server fork; return the new process, a child of this one."""
    numbers = [number if stream is None else as_number(stream) for number, stream in enumerate(streams)]
    files = [numbers[1] if number == subprocess.STDOUT else number for number in numbers]
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
    request = json.dumps([list(arguments), str(cwd or Path.cwd()), env, start_new_session, ignored]).encode()
    assert len(request) < LARGEST
    assert min(files) >= 0, "no pipes: give files"
    prctl = ctypes.CDLL(None).prctl
    with ONE_AT_A_TIME:
        assert prctl(SUBREAPER, 1, 0, 0, 0) == 0  # such an ancestor gets the children of a parent that has ended
        try:
            socket.send_fds(channel, [request], files)
            return int(channel.recv(LARGEST))
        finally:
            prctl(SUBREAPER, 0, 0, 0, 0)


def as_number(stream: IO[str] | int) -> int:
    """Return the number of a file."""
    return stream if isinstance(stream, int) else stream.fileno()


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


def has_changed(env: dict[str, str], *, hub: bool) -> bool:
    """Tell whether a server's packages, with those `OF_THE_HUB` or without, would have read another environment."""
    read = tuple(prefix for prefix in READ_AT_IMPORT if hub or prefix not in READ_BY_THE_HUB)
    names = {name for name in (*env, *AT_START) if name.startswith(read)} - READ_LATER - ALONE.keys()
    return any(env.get(name) != AT_START.get(name) for name in names)


@functools.cache
def server(hub: bool) -> socket.socket:
    """Start a server, once in each process that runs tests; it ends when nobody can ask it any more.

    Args:
        hub: with the packages `OF_THE_HUB`.

    Raises:
        RuntimeError: it has not come up; it says why.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, __file__, str(its.fileno()), *(["hub"] if hub else [])]
        silent: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        process = subprocess.Popen(command, pass_fds=[its.fileno()], env={**AT_START, **ALONE, **ROOM}, **silent)
    atexit.register(process.wait)
    atexit.register(ours.close)
    if ours.recv(LARGEST) != READY:
        raise RuntimeError("the process that forks did not come up")
    return ours


def serve(channel: socket.socket) -> list[str] | None:
    """Fork for each request; return in the fork, with what it is to run, or None at the end."""
    for name in (*PACKAGES, *(OF_THE_HUB if HUB_IS_IMPORTED else ())):
        importlib.import_module(name)
    assert ("huggingface_hub" in sys.modules) == HUB_IS_IMPORTED
    warm_up()
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
        middle = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == middle:  # who asked is to be the parent
            time.sleep(0.0002)
        channel.close()
        arguments, cwd, env, is_new_session, ignored = json.loads(request)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in (ends[0], *files):
            os.close(file)
        if is_new_session:
            os.setsid()
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:  # the server of what the fork starts itself; it ends with it, and holds nothing of it
            ours.close()
            os.close(ends[1])
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(nothing, number)
            channel = its
            continue
        its.close()
        take_over(ours, Path(cwd), env)
        os.write(ends[1], str(os.getpid()).encode())
        os.close(ends[1])
        return list(arguments)


def warm_up() -> None:
    """Use what is slow the first time: fonts, the formulas at an axis, and the grammar of Hydra's overrides."""
    figure = sys.modules["matplotlib.figure"].Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [0.1, 20], "o-", label="one")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(io.BytesIO())
    parser = importlib.import_module("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    parser.parse_overrides(["+one=word", "a.b=null", "a.c=-1.5e-3", "d='it is [1]'", "e=[1,{f: 'two'}]"])


def take_over(own: socket.socket, cwd: Path, env: dict[str, str]) -> None:
    """Make this fork what a process with this environment would be."""
    global OWN
    OWN = own
    subprocess.Popen = Started  # type: ignore[misc]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    show_environment(env)
    numpy.random.seed()  # noqa: NPY002  (as it is in a process that imports it itself)
    if (threads := env.get("OMP_NUM_THREADS")) != AT_START.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(threads or os.cpu_count() or 1))


def show_environment(env: dict[str, str]) -> None:
    """Let others read this environment of this process, which /proc keeps where the server's was when it started."""
    begin, end = (int(word) for word in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
    text = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items())
    assert len(text) < end - begin
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def become(arguments: list[str]) -> None:
    """Run a module as `python -m` does."""
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        arguments = arguments[1:]
    sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    HUB_IS_IMPORTED = "hub" in sys.argv
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        become(asked)
