"""When a call is captured, and what is left if it cannot be: with a stand-in for CUDA, which captures by calling.

Its replays do nothing: what a graph computes, `test_replay.py` compares on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy.fast.replay import WARM_UP, Replay
from getiaction.policy.fast.replays import KEPT, PATIENCE, Replays

CPU = torch.device("cpu")
TWO = torch.ones(2)


class Graph:
    """Stand in for `torch.cuda.CUDAGraph`."""

    breaks: str | None = None  # "end": CUDA broke the capture off; "instantiate": no memory for the finished graph
    over = False

    def __init__(self, *, keep_graph: bool = False) -> None: ...

    def capture_begin(self, **_: Any) -> None:
        if Graph.breaks == "begin":
            raise RuntimeError("out of memory")

    def capture_end(self) -> None:
        if Graph.breaks == "end":
            raise RuntimeError("operation failed due to a previous error during capture")
        self.over = True

    def raw_cuda_graph(self) -> int:
        raise RuntimeError("there is no driver")

    def instantiate(self) -> None:
        if Graph.breaks == "instantiate":
            raise RuntimeError("out of memory")

    def pool(self) -> tuple[int, int]:
        if not self.over:
            raise RuntimeError("called without a preceding successful capture")
        return 0, 1

    def replay(self) -> None: ...


class Stream:
    """Stand in for `torch.cuda.Stream`."""

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> object:
        return object()


@pytest.fixture(autouse=True)
def released(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for CUDA; return what is released by hand."""
    calls: list[str] = []
    nothing: Callable[..., Any] = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    replaced: dict[str, Any] = {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "graph_pool_handle": lambda: (0, 1),
        **dict.fromkeys(("stream", "device", "graph", "synchronize", "empty_cache"), nothing),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_, name=name: calls.append(name), raising=False)
    monkeypatch.setattr(Graph, "breaks", None)
    return calls


def call(replay: Replay, times: int) -> None:
    for _ in range(times):
        replay(TWO)


def in_a_thread(replay: Replay, times: int) -> None:
    thread = threading.Thread(target=call, args=(replay, times))
    thread.start()
    thread.join()


def test_a_step_is_captured_by_a_thread_that_has_taken_some() -> None:
    calls: list[int] = []
    replay = Replay(lambda x: calls.append(threading.get_ident()) or x * 2, CPU)
    for _ in range(3):  # cuBLAS has no handle yet in any of these
        in_a_thread(replay, WARM_UP)
    assert not replay.captured
    call(replay, WARM_UP)
    assert not replay.captured
    call(replay, 1)
    assert replay.captured
    assert len(calls) == 4 * WARM_UP + 1


def test_what_changes_nothing_may_be_called_once_a_thread() -> None:
    calls: list[int] = []
    replay = Replay(lambda x: calls.append(1) or x * 2, CPU, is_pure=True)
    for _ in range(WARM_UP):
        in_a_thread(replay, 1)
    assert not replay.captured
    in_a_thread(replay, 1)
    assert replay.captured
    assert len(calls) == WARM_UP + 2  # a plain one first, so that this thread is warm, and the capture
    in_a_thread(replay, 1)
    assert len(calls) == WARM_UP + 2


def test_workspaces_are_the_graphs_own(released: list[str]) -> None:
    at_work: list[int] = []
    replay = Replay(lambda x: at_work.append(len(released)) or x * 2, CPU)
    call(replay, WARM_UP + 1)
    assert at_work == [0, 0, 1]
    assert released == ["_cuda_clearCublasWorkspaces"] * 2


@pytest.mark.parametrize("breaks", ["begin", "inside", "end", "instantiate"])
def test_what_cannot_be_captured_is_called_plainly_and_holds_no_memory(
    breaks: str, released: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    monkeypatch.setattr(Graph, "breaks", breaks)

    def work(x: Tensor) -> Tensor:
        activations = x * 2
        made.append(weakref.ref(activations))
        if breaks == "inside" and len(made) == WARM_UP + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return activations + 1

    replay = Replay(work, CPU)
    gc.collect()
    gc.disable()
    try:
        call(replay, WARM_UP + 1)
        assert all(one() is None for one in made), "the next, plain, call needs that memory"
    finally:
        gc.enable()
    assert not replay.captured
    assert caplog.text.count("cannot be a CUDA graph") == 1
    by_hand = [name for name in released if name != "_cuda_clearCublasWorkspaces"]
    assert by_hand == (["_cuda_endAllocateToPool", "_cuda_releasePool"] if breaks == "end" else [])
    count = len(made)
    assert replay(TWO).tolist() == [3, 3]
    assert len(made) == count + 1, "it is not tried again"


def test_an_error_that_is_not_cudas_ends_the_capture(released: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def work(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == WARM_UP + 1:
            monkeypatch.setattr(Graph, "breaks", "end")
            raise TypeError("a layer of somebody else's")
        return x

    replay = Replay(work, CPU)
    call(replay, WARM_UP)
    with pytest.raises(TypeError, match="somebody"):
        replay(TWO)
    assert "_cuda_releasePool" in released


def test_calls_of_many_shapes_in_turn_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    module, replays = nn.Linear(2, 2), Replays()

    def act(rows: int) -> None:
        replays(module, "kind", lambda: module.forward, (torch.ones(rows, 2),))

    with torch.no_grad():
        for _ in range(3 * PATIENCE):
            for rows in range(1, KEPT + 2):
                act(rows)
        assert caplog.text.count("become no CUDA graphs") == 1
        assert len(replays._kept) == KEPT
        for rows in range(1, KEPT + 2):
            for _ in range(WARM_UP + 1):
                act(rows)
        assert sum(one.captured for one in replays._kept.values()) == KEPT
        module.weight = nn.Parameter(module.weight.detach().clone())
        act(99)
    assert len(replays._kept) == 1, "another network begins anew"


def test_who_trains_waits_while_another_thread_captures() -> None:
    inside, order = threading.Event(), []

    def slow(x: Tensor) -> Tensor:
        inside.set()
        time.sleep(0.1)
        order.append("act")
        return x

    def train(x: Tensor) -> Tensor:
        order.append("train")
        return x

    acting = threading.Thread(target=Replay(slow, CPU), args=(TWO,))
    acting.start()
    inside.wait()
    Replay(train, CPU)(TWO)
    acting.join()
    assert order == ["act", "train"]
