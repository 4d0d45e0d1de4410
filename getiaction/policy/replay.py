"""Replay what a function does on a CUDA GPU as one CUDA graph: a thousand small kernels, launched at once.

Who launches kernels one by one waits for the host where they are small: a chunk of ten denoising steps has more than a
thousand, and so has a training step. A graph does the same sums in the same order.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

log = logging.getLogger(__name__)
# Nobody may draw from the device's generator, or wait for the device, while a graph is captured.
LOCK = threading.RLock()
WARM_UP = 2  # calls before the capture: cuDNN and cuBLAS choose, and allocate, what they need
GLOBAL_HOOKS = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_backward_pre_hooks,
)
KEPT = 4  # graphs of a policy, the ones used last; each holds the memory of its call
PATIENCE = 4 * KEPT  # how many may have been given up before other calls are no longer tried


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
        with LOCK, torch.cuda.device(self._device):  # a replay looks at the device's generator, too
            return self._replay_or_call(inputs)

    def _replay_or_call(self, inputs: tuple[Tensor, ...]) -> Tensor:
        before, here = self._calls, getattr(self._warm, "calls", 0)
        self._calls, self._warm.calls = before + 1, here + 1
        wanted = self._graph is None and not self._refused and before >= WARM_UP
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
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        reason: str | None = None  # not the error, which holds every tensor that its frames hold
        with torch.cuda.stream(self._stream), let_go_of_shared_memory():
            begun = ended = False
            try:
                self._inputs = tuple(one.clone() for one in inputs)
                torch.cuda.synchronize()
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
        if reason is None:
            self._graph = graph
            return
        self._refused, self._inputs, self._result = True, (), None
        log.warning("warning: this cannot be a CUDA graph, so its kernels are launched one by one: %s", reason)


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


def first_line(error: BaseException) -> str:
    """Return what an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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


class Replays:
    """Keep the graphs of one module's calls: one for each kind of call, the last few of them.

    A copy of the module, or a pickled one, has none.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Replay] = OrderedDict()
        self._held: Held | None = None
        self._listeners: Listeners | None = None
        self._done: torch.cuda.Event | None = None
        self._given_up = 0

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
        with LOCK:  # a graph's inputs and results lie in one place
            if self._held is None or self._listeners is None or not self._held.unchanged():
                self._kept.clear()
                self._held, self._listeners, self._given_up = Held(module), Listeners(module), 0
            if self._listeners.there() or (key not in self._kept and self._given_up >= PATIENCE):
                return make()(*inputs)
            here = torch.cuda.current_stream(inputs[0].device)
            if self._done is not None:
                here.wait_event(self._done)  # another stream may have been here
            if key not in self._kept:
                self._kept[key] = Replay(make(), inputs[0].device, is_pure=True)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
                self._given_up += 1
                if self._given_up == PATIENCE:
                    log.warning("warning: so many kinds of calls take turns that new ones become no CUDA graphs")
            result = self._kept[key](*inputs)
            self._done = here.record_event()
        return result


class Held:
    """Remember which layers a module has, and where their weights lie; it holds none of them itself."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = [
            (weakref.ref(layer), children, places)
            for layer in module.modules()
            if (children := children_of(layer)) + (places := places_of(layer))
        ]

    def unchanged(self) -> bool:
        """Tell whether all layers are what they were, and their weights lie where they did."""
        for held, children, places in self._layers:
            layer = held()
            if layer is None or len(layer._modules) != len(children):
                return False
            if len(layer._parameters) + len(layer._buffers) != len(places):
                return False
            for name, child in children:
                if layer._modules.get(name) is not child():
                    return False
            for name, place in places:
                weight = layer._parameters.get(name, layer._buffers.get(name))
                if (None if weight is None else weight.data_ptr()) != place:
                    return False
        return True


def children_of(layer: nn.Module) -> list[tuple[str, Callable[[], nn.Module | None]]]:
    """Return what tells a layer's children, by name, without holding them; None is a child, too."""
    return [(name, weakref.ref(child) if child is not None else _nobody) for name, child in layer._modules.items()]


def _nobody() -> None:
    return None


def places_of(layer: nn.Module) -> list[tuple[str, int | None]]:
    """Return where a layer's own weights and buffers lie."""
    own = (*layer._parameters.items(), *layer._buffers.items())
    return [(name, None if value is None else value.data_ptr()) for name, value in own]


class Listeners:
    """Know whether somebody listens to a module's layers, whom a replay would not call."""

    def __init__(self, module: nn.Module) -> None:
        self._hooks = [hooks for layer in module.modules() for hooks in hooks_of(layer)]

    def there(self) -> bool:
        """Tell whether there is one."""
        return any(self._hooks) or any(GLOBAL_HOOKS)


def hooks_of(layer: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the hooks that are called when a layer is, or its gradients are computed; they may change."""
    return layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks


@contextlib.contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Keep captures of other threads away from kernels that are launched one by one, and may draw."""
    with LOCK if device.type == "cuda" and not torch.compiler.is_compiling() else contextlib.nullcontext():
        yield


def is_watched(*layers: nn.Module) -> bool:
    """Tell whether somebody listens to one of these layers."""
    return any(GLOBAL_HOOKS) or any(any(hooks_of(layer)) for layer in layers)


def can_replay(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Tell whether a call of a module, without gradients, can be a graph: in inference, with all inputs on one GPU."""
    if module.training or torch.compiler.is_compiling() or any(one.device.type != "cuda" for one in inputs):
        return False
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def rounding() -> tuple[Any, ...]:
    """Return what else decides which kernels run, and on what tensors: precision, and how cuDNN chooses."""
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    tf32 = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    return cast, *tf32, *cudnn, torch.is_inference_mode_enabled()
