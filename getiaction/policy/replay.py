"""Replay what a function does on a CUDA GPU as one CUDA graph: a thousand small kernels, launched at once.

Who launches kernels one by one waits for the host where they are small: a chunk of ten denoising steps has more than a
thousand, and so has a training step. A graph does the same sums in the same order.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
WARM_UP = 2  # calls before the capture: cuDNN and cuBLAS choose, and allocate, what they need
KEPT = 4  # graphs of a policy, the ones used last; each holds the memory of its call


class Replay:
    """Do what a function of tensors does; from the third call on, by replaying a CUDA graph.

    Args:
        function: launches the same kernels at every call. It must not wait for the device, copy from the host, draw
            random numbers, or look at its inputs' values. Other tensors that it reads or writes must stay where they
            lie; their values may change. It should not hold what holds this object: a graph's memory would wait for
            the garbage collector.
        device: a GPU.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function, self._device, self._calls = function, device, 0
        self._stream = torch.cuda.Stream(device)  # of all calls: autograd remembers which one a gradient comes from
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Tell whether the last call was a replay."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what the function makes of its inputs, whose shapes and types must be the same at every call."""
        with torch.cuda.device(self._device):
            return self._replay_or_call(inputs)

    def _replay_or_call(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if self._graph is None and self._calls >= WARM_UP and not self._refused:
            self._capture(inputs)
        self._calls += 1
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
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._inputs = tuple(one.clone() for one in inputs)
        torch.clear_autocast_cache()  # its copies of weights end with the caller's autocast, a graph does not
        try:
            # other threads may allocate pinned memory meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._function(*self._inputs)
            self._graph = graph
        except RuntimeError as error:  # a layer of somebody else's that waits for the device, say
            torch.cuda.set_stream(here)
            self._refused, self._inputs = True, ()
            reason = str(error).strip().splitlines()[0]
            log.warning("warning: this cannot be a CUDA graph, so its kernels are launched one by one: %s", reason)
        torch.clear_autocast_cache()  # and the graph's lie where it will write again


class Replays:
    """Keep the graphs of one module's calls: one for each kind of call, the last few of them.

    A copy of the module, or a pickled one, has none.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Replay] = OrderedDict()
        self._held: Held | None = None
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def __call__(
        self, module: nn.Module, kind: Hashable, make: Callable[[], Callable[..., Tensor]], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """Call a function that reads `module`, or replay it.

        Args:
            kind: what decides, beside the inputs' shapes and types, which kernels the function launches.
            make: makes the function, as `Replay` takes it.
        """
        key = (kind, rounding(), tuple((one.shape, one.dtype, one.device) for one in inputs))
        with self._lock:  # a graph's inputs and results lie in one place
            if self._held is None or not self._held.unchanged():
                self._kept.clear()
                self._held = Held(module)
            if self._held.watched():
                return make()(*inputs)
            here = torch.cuda.current_stream(inputs[0].device)
            if self._done is not None:
                here.wait_event(self._done)  # another stream may have been here
            if key not in self._kept:
                self._kept[key] = Replay(make(), inputs[0].device)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            result = self._kept[key](*inputs)
            self._done = here.record_event()
        return result


class Held:
    """Remember a module's layers, and where their weights lie."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._places = [
            (store, name, value.data_ptr())
            for one in self._modules
            for store in (one._parameters, one._buffers)
            for name, value in store.items()
            if value is not None
        ]

    def unchanged(self) -> bool:
        """Tell whether the weights lie where they did."""
        return all(
            (value := store.get(name)) is not None and value.data_ptr() == place for store, name, place in self._places
        )

    def watched(self) -> bool:
        """Tell whether somebody listens to a layer, whom a replay would not call."""
        return any(one._forward_hooks or one._forward_pre_hooks for one in self._modules)


def can_replay(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Tell whether a call of a module, without gradients, can be a graph: in inference, with all inputs on one GPU."""
    if module.training or torch.compiler.is_compiling() or any(one.device.type != "cuda" for one in inputs):
        return False
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def rounding() -> tuple[Any, ...]:
    """Return what else decides which kernels run, and on what tensors: precision, and how cuDNN chooses."""
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    tf32 = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.fp32_precision
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    return cast, *tf32, *cudnn, torch.is_inference_mode_enabled()
