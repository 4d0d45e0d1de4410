"""Let a CUDA graph clear memory by kernels, instead of by memsets, for which those before and after wait longer.

cuDNN clears a few counters before many of its convolutions. Launched one by one that takes a microsecond; in a graph,
on an H200, it is 9 from the kernel before to the one after: benchmarks/NOTES.md.
Source: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GRAPH.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

LARGEST = 2**20  # bytes; more is for what was made for it
THREADS = 128
SLEEP = 100_000  # cycles
WORD = 4  # bytes
CLEAR = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry clear(.param .u64 first, .param .u64 count)
{
    .reg .pred %past;
    .reg .b32 %block, %threads, %thread;
    .reg .b64 %place, %wanted, %own, %number;
    mov.u32 %block, %ctaid.x;
    mov.u32 %threads, %ntid.x;
    mov.u32 %thread, %tid.x;
    cvt.u64.u32 %number, %thread;
    mad.wide.u32 %place, %block, %threads, %number;
    ld.param.u64 %wanted, [count];
    setp.ge.u64 %past, %place, %wanted;
    @%past ret;
    ld.param.u64 %own, [first];
    cvta.to.global.u64 %own, %own;
    shl.b64 %place, %place, 2;
    add.u64 %own, %own, %place;
    st.global.u32 [%own], 0;
    ret;
}
\0"""


def clear_by_kernels(graph: torch.cuda.CUDAGraph) -> int:
    """Replace the memsets of a graph that write a few zeros, where a small one showed that it works; return how many.

    Args:
        graph: captured on the current device with `keep_graph=True`, and not instantiated yet.

    Raises:
        RuntimeError: the driver refused something; the graph still does what it did.
        ImportError: NVIDIA's bindings are not here, which PyTorch's builds for CUDA bring.
        ArithmeticError: what was to be clear was not, or too early, or too late.
    """
    try_once(torch.cuda.current_device())
    return replace_memsets(graph)


@cache
def try_once(device: int) -> None:
    """Compare a small graph on the current device with what it did before; see `clear_by_kernels` for errors.

    A kernel that did not wait for those before it, or for which those after it did not, would come while the first
    still sleeps.
    """
    graph, stream = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream(device, priority=-2)
    numbers, seen, ones = (torch.ones(64, device=f"cuda:{device}") for _ in range(3))
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.cuda._sleep(SLEEP)
        numbers.add_(ones)
        clear(numbers)
        seen.copy_(numbers)
        numbers.add_(ones)
        graph.capture_end()
        replaced = replace_memsets(graph)
        graph.instantiate()
        for _ in range(3):
            seen.fill_(7.0)
            graph.replay()
            if not bool((seen == 0).all() & (numbers == 1).all()):
                raise ArithmeticError("a kernel in the place of a memset does something else")
    if not replaced:
        raise ArithmeticError("no memset was found where there is one")


def clear(numbers: torch.Tensor) -> None:
    """Write zeros over what lies side by side, by a memset on the current stream; PyTorch takes a kernel."""
    from cuda.bindings import driver

    stream = torch.cuda.current_stream(numbers.device).cuda_stream
    _call(driver.cuMemsetD8Async, numbers.data_ptr(), 0, numbers.nbytes, stream)


def replace_memsets(graph: torch.cuda.CUDAGraph) -> int:
    """Do what `clear_by_kernels` does, without a trial before."""
    from cuda.bindings import driver

    raw = driver.CUgraph(graph.raw_cuda_graph())
    kind = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET
    nodes = _list(driver.cuGraphGetNodes, raw)
    memsets = [one for one in nodes if _call(driver.cuGraphNodeGetType, one) == kind]
    return sum(_replace(driver, raw, one) for one in memsets)


def _replace(driver: Any, graph: Any, memset: Any) -> bool:
    """Put a kernel in the place of a memset, if it writes a few zeros."""
    given = _call(driver.cuGraphMemsetNodeGetParams, memset)
    size = given.width * given.elementSize
    if given.value or given.height != 1 or not 0 < size <= LARGEST or size % WORD or int(given.dst) % WORD:
        return False
    before = _list(driver.cuGraphNodeGetDependencies, memset)
    after = _list(driver.cuGraphNodeGetDependentNodes, memset)
    words = size // WORD
    wanted = driver.CUDA_KERNEL_NODE_PARAMS()
    wanted.func = _load_kernel(torch.cuda.current_device())
    wanted.gridDimX, wanted.gridDimY, wanted.gridDimZ = -(-words // THREADS), 1, 1
    wanted.blockDimX, wanted.blockDimY, wanted.blockDimZ = THREADS, 1, 1
    wanted.sharedMemBytes = 0
    wanted.kernelParams = (int(given.dst), words), (ctypes.c_uint64, ctypes.c_uint64)
    kernel = _call(driver.cuGraphAddKernelNode, graph, before, len(before), wanted)
    try:
        _hurry(driver, kernel, after)
        if after:
            _call(driver.cuGraphAddDependencies, graph, [kernel] * len(after), after, None, len(after))
    except BaseException:
        driver.cuGraphDestroyNode(kernel)  # it would clear at any time
        raise
    _call(driver.cuGraphDestroyNode, memset)
    return True


def _hurry(driver: Any, kernel: Any, after: list[Any]) -> None:
    """Give a kernel the priority of the first one that waits for it, as a stream has it for what is launched there."""
    kind = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    for node in after:
        if _call(driver.cuGraphNodeGetType, node) == kind:
            priority = driver.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_PRIORITY
            wanted = _call(driver.cuGraphKernelNodeGetAttribute, node, priority)
            _call(driver.cuGraphKernelNodeSetAttribute, kernel, priority, wanted)
            return


@cache
def _load_kernel(device: int) -> Any:
    """Compile the kernel for the current device."""
    from cuda.bindings import driver

    return _call(driver.cuModuleGetFunction, _call(driver.cuModuleLoadData, CLEAR), b"clear")


def _list(ask: Callable[..., Any], about: Any) -> list[Any]:
    """Return all nodes that the driver names, which wants to be told how many."""
    count = _result(ask(about))[-1]
    return list(_result(ask(about, count))[0]) if count else []


def _call(ask: Callable[..., Any], *given: Any) -> Any:
    """Return what the driver answers, one thing or None."""
    found = _result(ask(*given))
    return found[0] if found else None


def _result(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    code, *found = answer
    if int(code):
        raise RuntimeError(f"the driver answered {code!r}")
    return tuple(found)
