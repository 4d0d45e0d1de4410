"""Replay what a function does on a CUDA GPU as one CUDA graph: a thousand small kernels, launched at once.

Who launches kernels one by one waits for the host where they are small: a chunk of ten denoising steps has more than a
thousand, and so has a training step. A graph does the same sums in the same order.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from getiaction.errors import first_line
from getiaction.policy.fast.clearing import clear_by_kernels

log = logging.getLogger(__name__)
# Nobody may draw from the device's generator, or wait for the device, while a graph is captured.
LOCK = threading.RLock()
WARM_UP = 2  # calls before the capture: cuDNN and cuBLAS choose, and allocate, what they need


class Replay:
    """Do what a function of tensors does; from the third call on, by replaying a CUDA graph.

    Args:
        function: launches the same kernels at every call. It must not wait for the device, copy from the host, draw
            random numbers, or look at its inputs' values. Other tensors that it reads or writes must stay where they
            lie; their values may change. It should not hold what holds this object: a graph's memory would wait for
            the garbage collector.
        device: a GPU.
        is_pure: the function changes nothing, so a thread may call it and capture it at once.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, *, is_pure: bool = False) -> None:
        self._function, self._device, self._is_pure, self._calls = function, device, is_pure, 0
        self._warm = threading.local()  # cuBLAS and cuDNN keep what they need for each thread
        # of all calls: autograd remembers which one a gradient comes from; ahead of what is launched beside it
        self._stream = torch.cuda.Stream(device, priority=-2)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.refused = False
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Tell whether the last call was a replay."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what the function makes of its inputs, whose shapes and types must be the same at every call."""
        with LOCK, torch.cuda.device(self._device):  # a replay looks at the device's generator, too
            return self._replay_or_call(inputs)

    def _replay_or_call(self, inputs: tuple[Tensor, ...]) -> Tensor:
        before, here = self._calls, getattr(self._warm, "calls", 0)
        self._calls, self._warm.calls = before + 1, here + 1
        wanted = self._graph is None and not self.refused and before >= WARM_UP
        if wanted and here >= WARM_UP:
            self._capture(inputs)
        elif wanted and self._is_pure:  # threads that call once each
            result = self._call(inputs)
            self._capture(inputs)
            return result
        if self._graph is None:
            return self._call(inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        assert self._result is not None
        self._graph.replay()
        return self._result.clone()

    def _call(self, inputs: tuple[Tensor, ...]) -> Tensor:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = self._function(*inputs)
        here.wait_stream(self._stream)
        return result

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        graph, pool = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.graph_pool_handle()
        reason: str | None = None  # not the error, which holds every tensor that its frames hold
        with torch.cuda.stream(self._stream), let_go_of_shared_memory():
            begun = ended = False
            try:
                torch.cuda.synchronize()  # whoever made the inputs, or still reads memory that was let go
                self._inputs = tuple(one.clone() for one in inputs)
                torch.cuda.empty_cache()  # the graph has its own memory
                # other threads may allocate pinned memory meanwhile
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                begun = True
                self._result = self._function(*self._inputs)
            except RuntimeError as error:  # a layer of somebody else's that waits for the device, say; or no memory
                reason = first_line(error)
            finally:
                try:
                    if begun:
                        graph.capture_end()
                        ended = True
                except RuntimeError as error:
                    reason = reason or first_line(error)
                if begun and not ended:
                    forget(graph, pool, self._device)
            reason = reason or make_ready(graph)
        torch.cuda.current_stream().wait_stream(self._stream)  # which copied the inputs
        if reason is None:
            self._graph = graph
            return
        self.refused, self._inputs, self._result = True, (), None
        log.warning("warning: this cannot be a CUDA graph, so its kernels are launched one by one: %s", reason)


def make_ready(graph: torch.cuda.CUDAGraph) -> str | None:
    """Let a graph that was captured be replayed; return what is in the way, if something is."""
    try:
        clear_by_kernels(graph)
    except Exception as error:  # whatever other bindings, or drivers, say: as it is it does the same, more slowly
        log.debug("memsets stay: %s", first_line(error))
    try:
        graph.instantiate()
    except RuntimeError as error:  # no memory, say
        return first_line(error)
    return None


@contextlib.contextmanager
def let_go_of_shared_memory() -> Iterator[None]:
    """Let a capture allocate what PyTorch otherwise keeps for all: a graph remembers places, and does not own these.

    Autocast's copies of weights end with the caller's autocast; cuBLAS's workspaces end when anybody clears them, as
    `torch.compile` does for its own graphs.
    Source: torch/_inductor/cudagraph_trees.py, clear_cublas_manager.
    """
    torch.clear_autocast_cache()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch._C._cuda_clearCublasWorkspaces()


def forget(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Clean up after a capture that CUDA broke off, which PyTorch leaves as if it went on.

    Its memory would stay reserved, and the device's random generator would refuse to draw until the next capture.
    """
    if not is_over(graph):
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with contextlib.suppress(RuntimeError):
                end(device.index or 0, pool)
    with contextlib.suppress(RuntimeError):
        nothing, number = torch.cuda.CUDAGraph(), torch.zeros((), device=device)
        with torch.cuda.graph(nothing, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            number.add_(1)


def is_over(graph: torch.cuda.CUDAGraph) -> bool:
    """Tell whether PyTorch knows that the capture ended; it then releases the memory itself, and only it may."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Keep captures of other threads away from kernels that are launched one by one, and may draw."""
    with LOCK if device.type == "cuda" and not torch.compiler.is_compiling() else contextlib.nullcontext():
        yield
