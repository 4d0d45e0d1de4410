"""Find the operations in C: compiled at the first use, for this CPU, and kept in the cache.

They are those of who acts, `native.c` and `native_few.c`, of who learns, `native_blocks.c` and `native_pictures.c`, and
of both, `native_norms.c` and `native_winograd.c`; each says why. Acting asks for a few rows. PyTorch then packs each
weight anew for every product, or reads it as slowly as it lies, and takes a call for each operation. Here weights lie
as they are read, and a denoising step is one call. It takes a C compiler (`$CC`, gcc, cc or clang); without one, or
where what it made computes something else, PyTorch's operations are taken: see `unrolled`. What is in the cache is
named after its own content and belongs to who runs it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from getiaction.files import default_cache_dir
from getiaction.machine import count_cores, read_cpu

log = logging.getLogger(__name__)
PARTS = "native", "native_norms", "native_blocks", "native_pictures", "native_winograd", "native_few"
SOURCES = tuple(Path(__file__).with_name(f"{name}.c") for name in PARTS)
HEADER = Path(__file__).with_name("native.h")
# Sums may be split over the lanes of a vector; infinities and NaN stay what they are, and so does the CPU's own state,
# which -ffast-math would change for all of the process.
FAST = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast")
WAYS = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""What is tried, one after the other. Clang's OpenMP is not: it would be a second one beside that of PyTorch."""
PATIENCE = 60  # seconds for the compiler
PRODUCT, NORM, COPY = range(3)


class Operation(ctypes.Structure):
    """Say what to do with which memory: `operation` of `native.c`. Strides are in numbers, not bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "phase")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "scale", "shift", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "steps", "channels", "width")),
        *((f"{name}_{stride}", ctypes.c_int64) for name in ("x", "out", "residual") for stride in ("batch", "step")),
        *((name, ctypes.c_int64) for name in ("film_batch", "film_number", "groups", "adds", "halves")),
        ("eps", ctypes.c_float),
    )


class Library:
    """Hold the compiled operations."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.run.argtypes = (ctypes.c_void_p, *(ctypes.c_int64,) * 3)
        self.functions.run.restype = None
        for name in ("panel_width", "operation_size"):
            getattr(self.functions, name).restype = ctypes.c_int64
        self.panel = int(self.functions.panel_width())
        if self.functions.operation_size() != ctypes.sizeof(Operation):
            raise OSError(f"{path} is not of this version")

    def run(self, operations: ctypes.Array[Operation], number: int, threads: int) -> None:
        """Do a denoising step."""
        self.functions.run(operations, len(operations), number, threads)


def describe(kind: int, x: Tensor, out: Tensor, **more: float | None) -> Operation:
    """Return the operation that makes `out` (B, T, C) of `x` (B, T, ...), whose channels lie in order."""
    (batch, steps, channels), strides = out.shape, (*x.stride()[:2], *out.stride()[:2])
    named = dict(zip(("x_batch", "x_step", "out_batch", "out_step"), strides, strict=True))
    places = {"x": x.data_ptr(), "out": out.data_ptr()}
    return Operation(kind=kind, batch=batch, steps=steps, channels=channels, **places, **(named | more))


@cache
def find_library() -> Library | None:
    """Return the compiled operations, or None where they cannot be had."""
    commands = (shlex.split(os.environ.get("CC", "")), ["gcc"], ["cc"], ["clang"])
    found = [[path, *command[1:]] for command in commands if command and (path := shutil.which(command[0]))]
    if not found:
        log.info("no C compiler is there: a chunk of actions, and a training step, take longer on this CPU")
        return None
    try:
        try:
            return load(found[0], default_cache_dir() / "native")
        except (OSError, RuntimeError):  # it cannot be written to, nothing there may be run, or there is no home
            with tempfile.TemporaryDirectory() as folder:
                return load(found[0], Path(folder))
    except (OSError, RuntimeError, subprocess.SubprocessError, ArithmeticError) as error:
        log.warning("%s cannot be used (%s): acting and training take longer on this CPU", SOURCES[0].name, error)
        return None


def load(compiler: list[str], folder: Path) -> Library:
    """Return the library for this CPU that is in a folder, or compile it there.

    Raises:
        OSError, SubprocessError: it cannot be compiled, loaded, or written to the folder.
        ArithmeticError: it computes something else.
    """
    fields = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    cpu = [read_cpu(field) for field in fields]
    machine = (platform.machine(), platform.libc_ver(), cpu, platform.node() if not any(cpu[1:3]) else None)
    sources = [path.read_bytes() for path in (*SOURCES, HEADER)]
    name = hashlib.sha256(repr((sources, FAST, WAYS, compiler, machine)).encode()).hexdigest()[:32]
    for path in folder.glob(f"{name}-*.so"):
        if is_whole(path):
            try:
                return tried(path)
            except OSError:  # the system has changed
                path.unlink()
    return tried(compiled(compiler, folder, name))


def is_whole(path: Path) -> bool:
    """Tell whether a library has the content that its name says, and belongs to this user."""
    is_own = not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
    return is_own and path.stem.endswith(f"-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}")


def tried(path: Path) -> Library:
    """Load a library and compare it with PyTorch."""
    library = Library(path)
    compare(library)
    return library


def compiled(compiler: list[str], folder: Path, name: str) -> Path:
    """Compile into a folder; return the library.

    Raises:
        OSError: the folder cannot be written to.
        SubprocessError: the compiler fails, wherever it writes to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_clang = sys.platform == "darwin" or "clang" in Path(compiler[0]).resolve().name
    ways = [way for way in WAYS if not (is_clang and "-fopenmp" in way)]
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / "made.so"
        parts = [(source, made.with_name(f"{source.stem}.o")) for source in SOURCES]
        for way in ways:
            flags = [*FAST, *way, "-fPIC", f"-I{HEADER.parent}"]
            commands = [[*compiler, *flags, "-c", str(source), "-o", str(part)] for source, part in parts]
            with ThreadPoolExecutor(count_cores()) as pool:
                done = list(pool.map(attempt, commands))
            if not any(one.returncode for one in done):
                done = [
                    attempt([*compiler, *flags, "-shared", *(str(part) for _, part in parts), "-o", str(made), "-lm"])
                ]
            if not any(one.returncode for one in done):
                digest = hashlib.sha256(made.read_bytes()).hexdigest()[:32]
                return made.replace(folder / f"{name}-{digest}.so")  # in one step: others may be at it, too
            failed = next(one for one in done if one.returncode)
            log.debug("%s: %s", failed.args, failed.stderr)
    said = failed.stderr.strip().splitlines()[-1:]
    raise subprocess.SubprocessError(f"{shlex.join(compiler)} ends with {failed.returncode}: {said}")


def attempt(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler and return how it ended."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)


def compare(library: Library) -> None:
    """Compare products of all kinds of rows, in both types of weights, and a norm, with PyTorch's.

    Raises:
        ArithmeticError: they are not the same to rounding.
    """
    draw, channels, width = torch.Generator().manual_seed(0), 2 * library.panel, 600

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")

    weight, bias = drawn(channels, width), drawn(channels)
    panels = weight.unflatten(0, (-1, library.panel)).transpose(1, 2).contiguous()
    pairs = panels.unflatten(2, (2, -1)).transpose(2, 3).bfloat16().contiguous()
    kinds = (panels, weight.double()), (pairs, weight.bfloat16().double())
    for rows, (laid, exact) in product((1, 2, 4, 6, 8, 9, 13), kinds):  # that are multiplied at once, and some more
        x, sums, out = drawn(1, rows, width), drawn(1, rows, channels), drawn(1, rows, channels)
        more = {"weight": laid.data_ptr(), "bias": bias.data_ptr(), "halves": laid is pairs}
        affine = {"weight": bias.data_ptr(), "bias": bias.data_ptr(), "groups": 4, "eps": 1e-5}
        operations = (
            describe(PRODUCT, x, sums, phase=0, width=width, **more),
            describe(NORM, sums, out, phase=1, **affine),
        )
        library.run((Operation * 2)(*operations), 0, torch.get_num_threads())
        wanted = functional.linear(x.double(), exact, bias.double())
        normalised = functional.group_norm(wanted.transpose(1, 2), 4, bias.double(), bias.double())
        for one, other in ((sums, wanted), (out, functional.mish(normalised).transpose(1, 2))):
            if not torch.allclose(one.double(), other, rtol=1e-4, atol=1e-4):
                raise ArithmeticError("it computes something else")
