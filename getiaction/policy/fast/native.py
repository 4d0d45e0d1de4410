"""Find the operations of `native.c`: compiled at the first use, for this CPU, and kept in the cache.

Acting asks for a few rows. PyTorch then packs each weight anew for every product, or reads it as slowly as it lies, and
takes a call for each operation. Here weights lie as they are read, and a denoising step is one call. It takes a C
compiler (`$CC`, cc, gcc or clang); without one, or where what it made computes something else, PyTorch's operations are
taken: see `unrolled`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from getiaction.files import default_cache_dir
from getiaction.machine import read_cpu

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("native.c")
# Sums may be split over the lanes of a vector; infinities and NaN stay what they are, and so does the CPU's own state,
# which -ffast-math would change for all of the process.
FAST = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast")
WAYS = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""What is tried, one after the other: Apple's compiler has no OpenMP."""
PATIENCE = 60  # seconds for the compiler
PRODUCT, NORM, COPY = range(3)


class Operation(ctypes.Structure):
    """Say what to do with which memory: `operation` of `native.c`. Strides are in numbers, not bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "phase")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "scale", "shift", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "steps", "channels", "width")),
        *((f"{name}_{stride}", ctypes.c_int64) for name in ("x", "out", "residual") for stride in ("batch", "step")),
        *((name, ctypes.c_int64) for name in ("film_batch", "film_number", "groups", "adds")),
        ("eps", ctypes.c_float),
    )


class Library:
    """Hold the compiled operations."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.run.argtypes = (ctypes.c_void_p, *(ctypes.c_int64,) * 3)
        self._library.run.restype = None
        for name in ("panel_width", "operation_size"):
            getattr(self._library, name).restype = ctypes.c_int64
        self.panel = int(self._library.panel_width())
        if self._library.operation_size() != ctypes.sizeof(Operation):
            raise OSError(f"{path} is not of this version")

    def run(self, operations: ctypes.Array[Operation], number: int, threads: int) -> None:
        """Do a denoising step."""
        self._library.run(operations, len(operations), number, threads)


def describe(kind: int, x: Tensor, out: Tensor, **more: float | None) -> Operation:
    """Return the operation that makes `out` (B, T, C) of `x` (B, T, ...), whose channels lie in order."""
    (batch, steps, channels), strides = out.shape, (*x.stride()[:2], *out.stride()[:2])
    named = dict(zip(("x_batch", "x_step", "out_batch", "out_step"), strides, strict=True))
    places = {"x": x.data_ptr(), "out": out.data_ptr()}
    return Operation(kind=kind, batch=batch, steps=steps, channels=channels, **places, **(named | more))


@cache
def find_library() -> Library | None:
    """Return the compiled operations, or None where they cannot be had."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    if compiler is None:
        log.info("no C compiler is there: a chunk of actions takes longer on this CPU")
        return None
    try:
        library = Library(compiled(Path(compiler), default_cache_dir() / "native"))
        compare(library)
    except (OSError, subprocess.SubprocessError, ArithmeticError) as error:
        log.warning("%s cannot be used (%s): a chunk of actions takes longer on this CPU", SOURCE.name, error)
        return None
    return library


def compiled(compiler: Path, folder: Path) -> Path:
    """Return the library for this CPU, compiled if it is not in the folder yet.

    Raises:
        OSError, SubprocessError: it cannot be compiled, or the folder cannot be written to.
    """
    machine = (platform.machine(), read_cpu("model name"), read_cpu("flags"), str(compiler.resolve()))
    content = SOURCE.read_bytes() + repr((FAST, WAYS, machine)).encode()
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / path.name
        for number, way in enumerate(WAYS):
            command = [str(compiler), *FAST, *way, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
            if done.returncode == 0:
                made.replace(path)  # in one step: others may be at it, too
                return path
            log.debug("%s: %s", command, done.stderr)
            if number == len(WAYS) - 1:
                raise OSError(f"{compiler} ends with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    raise AssertionError


def compare(library: Library) -> None:
    """Compare a product of all kinds of rows, and a norm, with PyTorch's.

    Raises:
        ArithmeticError: they are not the same to rounding.
    """
    draw = torch.Generator().manual_seed(0)
    channels, width = 2 * library.panel, 600
    x, weight, bias = (torch.randn(shape, generator=draw) for shape in ((1, 13, width), (channels, width), (channels,)))
    panels = weight.unflatten(0, (-1, library.panel)).transpose(1, 2).contiguous()
    sums, out = torch.empty(1, 13, channels), torch.empty(1, 13, channels)
    affine = {"weight": bias.data_ptr(), "bias": bias.data_ptr(), "groups": 4, "eps": 1e-5}
    operations = (
        describe(PRODUCT, x, sums, phase=0, width=width, weight=panels.data_ptr(), bias=bias.data_ptr()),
        describe(NORM, sums, out, phase=1, **affine),
    )
    library.run((Operation * 2)(*operations), 0, 2)
    wanted = functional.linear(x, weight, bias)
    normalised = functional.mish(functional.group_norm(wanted.transpose(1, 2), 4, bias, bias)).transpose(1, 2)
    for one, other in ((sums, wanted), (out, normalised)):
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
            raise ArithmeticError("it computes something else")
