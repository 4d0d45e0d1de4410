"""When the gradients of weights may be computed beside a backward pass; that they are right, GPU tests tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy import DiffusionPolicy, Features
from getiaction.policy.fast import convolution
from getiaction.policy.fast.beside import Beside, are_leaves, beside, come_from_one_place, lay_as, using

CPU = torch.device("cpu")


def test_a_weight_that_is_used_twice_is_found() -> None:
    layers, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), torch.randn(2, 3)
    assert come_from_one_place(layers(x).sum())
    assert not come_from_one_place(layers(layers(x)).sum())
    assert not come_from_one_place(layers(x).sum() + layers[0].weight.pow(2).sum())
    assert not come_from_one_place((layers[0].weight * layers[0].weight).sum())
    shared = layers(x)  # what is used twice may be anything but a weight
    assert come_from_one_place((shared * shared).sum())


@pytest.mark.parametrize("separate", [False, True])
def test_no_weight_of_a_policy_is_used_twice(make_policy: Callable[..., DiffusionPolicy], separate: bool) -> None:
    """Or its weights would learn after the backward pass, and nobody would be told."""
    cameras = {f"observation.images.{name}": (3, 40, 40) for name in ("top", "wrist")}
    policy = make_policy(
        Features(action_dim=2, state_dim=3, cameras=cameras), use_separate_rgb_encoder_per_camera=separate
    )
    batch: dict[str, Tensor] = {name: torch.rand(1, 2, 3, 34, 34) for name in cameras}
    batch |= {"observation.state": torch.rand(1, 2, 3), "action": torch.rand(1, 8, 2)}
    batch["action_is_pad"] = torch.zeros(1, 8, dtype=torch.bool)
    assert come_from_one_place(policy(batch, torch.randn(2, 8, 2), torch.tensor([3, 7])))


def test_weights_that_are_computed_are_no_leaves() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    assert are_leaves(weight, None, torch.randn(2))
    assert not are_leaves(weight, weight * 2)
    assert not are_leaves(nn.Parameter(torch.randn(3, 1).expand(3, 4)))


def test_gradients_come_to_lie_as_weights_do() -> None:
    gradient = torch.randn(2, 3, 4, 5)
    assert lay_as(gradient, gradient.stride()) is gradient
    last = gradient.contiguous(memory_format=torch.channels_last)
    laid = lay_as(gradient, last.stride())
    assert laid.stride() == last.stride()
    assert torch.equal(laid, gradient)


def test_only_one_backward_pass_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Tensor, ...]] = []
    own, x = Beside(CPU), torch.randn(3)
    launching, joined = own.launching, []
    monkeypatch.setattr(own, "launching", lambda *read: launched.append(read) or launching(*read))
    monkeypatch.setattr(own, "join", lambda: joined.append(len(launched)))
    with beside(True, x):
        pass
    with using(own):
        with beside(True, x):
            pass
        with beside(False, x):
            pass
        with beside(True, torch.empty(1, device="meta")):
            pass
    with beside(True, x):
        pass
    assert launched == [(x,)]
    assert joined == [1]


@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_pictures_weights_may_stay_in_two_bytes(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    """Four have nothing more in them."""
    monkeypatch.setattr(convolution, "learns_under_autocast", lambda *_: True)
    layer, x = convolution.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)
    layer.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    found = []
    for own in (Beside(CPU, narrow=True), Beside(CPU)):
        for weight in layer.parameters():
            weight.grad, weight.grad_dtype = None, None
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).square().sum()
        with using(own):
            loss.backward()
        found.append([weight.grad for weight in layer.parameters()])
    for narrow, wide in zip(*found, strict=True):
        assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
        assert narrow.stride() == wide.stride()
        assert torch.equal(narrow.float(), wide)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no streams")


@needs_gpu
def test_a_capture_with_nothing_beside_it_is_none_of_its_business() -> None:
    own, number, graph = Beside(torch.device("cuda")), torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
    with own.launching():
        number.add_(1)
    own.join()
    with torch.cuda.graph(graph), using(own):
        number.add_(1)
    graph.replay()
    assert float(number) == 2


@needs_gpu
def test_what_is_read_is_kept_until_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that comes late still finds its numbers, however soon they are let go."""
    device = torch.device("cuda")
    own = Beside(device)
    result = torch.empty(1000, 1000, device=device)
    for _ in range(20):
        numbers = torch.ones(1000, 1000, device=device)
        with using(own), beside(True, numbers):
            torch.cuda._sleep(10**7)
            result.copy_(numbers)
            del numbers
            torch.zeros(1000, 1000, device=device)
        torch.zeros(1000, 1000, device=device)
        assert bool((result == 1).all())
    monkeypatch.setattr("getiaction.policy.fast.beside.MOST", 100)
    with own.launching(torch.ones(100, device=device)):
        pass
    assert not own._read


@needs_gpu
def test_updates_wait_for_gradients_and_gradients_not_for_updates() -> None:
    device = torch.device("cuda")
    own, gradient, weight, other = Beside(device), *(torch.zeros(1000, device=device) for _ in range(3))
    for number in range(1, 20):
        with using(own):
            with beside(True, gradient):
                torch.cuda._sleep(10**6)
                gradient.fill_(number)
            with own.updating():
                torch.cuda._sleep(10**7)
                weight.copy_(gradient)
            with beside(True, gradient):
                begun = torch.cuda.current_stream().record_event()
                other.fill_(number)
                ended = torch.cuda.current_stream().record_event()
            ended.synchronize()
            assert begun.query()
        assert bool((weight == number).all())
        assert bool((other == number).all())
