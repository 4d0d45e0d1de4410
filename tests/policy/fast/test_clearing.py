"""Memsets of CUDA graphs become kernels, and do what they did."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from getiaction.policy.fast.clearing import CLEAR, LARGEST, clear, clear_by_kernels, replace_memsets, try_once

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA GPU has graphs")


def test_the_kernel_compiles(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="PyTorch's builds without CUDA have no assembler")
    (tmp_path / "clear.ptx").write_bytes(CLEAR.rstrip(b"\0"))
    command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90", str(tmp_path / "clear.ptx"), "-o", str(tmp_path / "out")]
    subprocess.run(command, check=True)
    assert (tmp_path / "out").stat().st_size > 0


@needs_gpu
@pytest.mark.parametrize(("size", "count"), [(1, 0), (4, 1), (1000, 1), (LARGEST, 1), (LARGEST + 4, 0)])
def test_what_is_cleared_is_clear_when_it_is_read(size: int, count: int) -> None:
    bytes_of = torch.full((size,), 7, dtype=torch.uint8, device="cuda")
    around, read = torch.full((size + 64,), 7, dtype=torch.uint8, device="cuda"), torch.empty_like(bytes_of)
    own, stream = around[32 : 32 + size], torch.cuda.Stream(priority=-2)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
        graph.capture_begin()
        own.add_(bytes_of)
        clear(own)
        read.copy_(own + 0)
        own.add_(bytes_of)
        graph.capture_end()
    assert replace_memsets(graph) == count
    assert clear_by_kernels(graph) == 0
    graph.instantiate()
    for _ in range(20):
        read.fill_(9)
        graph.replay()
        assert not bool(read.any())
        assert bool((own == 7).all())
    assert bool((around[:32] == 7).all())
    assert bool((around[32 + size :] == 7).all())


@needs_gpu
@pytest.mark.parametrize("broken", [lambda _: 0, lambda _: 1, replace_memsets])
def test_what_works_is_tried_first(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[torch.cuda.CUDAGraph], int]
) -> None:
    """A graph that clears nothing is noticed, and so is one in which nothing was replaced."""
    monkeypatch.setattr("getiaction.policy.fast.clearing.replace_memsets", broken)
    if broken is not replace_memsets:
        monkeypatch.setattr("getiaction.policy.fast.clearing.clear", lambda numbers: None)
    try_once.cache_clear()
    with contextlib.nullcontext() if broken is replace_memsets else pytest.raises(ArithmeticError):
        try_once(torch.cuda.current_device())
    try_once.cache_clear()
