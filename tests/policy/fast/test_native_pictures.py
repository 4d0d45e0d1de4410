"""The gradient of a convolution's weights by C, on a CPU: PyTorch's, for any shape, layout and number of threads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy.fast import native, native_layers, native_pictures
from getiaction.policy.fast.convolution import Conv2d
from getiaction.policy.fast.native_layers import use_native

SHAPES: dict[str, tuple[int, int, tuple[int, int], int, dict[str, Any]]] = {  # C, C', (h, w), B, what else is special
    "as in a ResNet": (64, 64, (21, 21), 3, {"padding": 1}),
    "every second place": (32, 64, (9, 9), 4, {"padding": 1, "stride": 2}),
    "every second place, even sides": (32, 48, (8, 6), 5, {"padding": 1, "stride": 2}),
    "two taps": (32, 32, (7, 7), 3, {"kernel_size": 2, "stride": 2}),
    "odd channels": (21, 17, (5, 8), 7, {"padding": 1}),
    "large windows, wide padding": (16, 16, (6, 5), 3, {"kernel_size": 5, "padding": 4}),
    "more padding than is seen": (16, 16, (20, 1), 2, {"padding": 5, "stride": 10}),
    "no padding": (16, 20, (7, 9), 2, {}),
    "strides past the end": (16, 16, (8, 8), 2, {"stride": 3}),
    "more than one place at a time": (16, 16, (3, 3), 90, {"padding": 1}),
    "one place": (256, 256, (1, 1), 3, {"padding": 1}),
    "with a bias": (24, 18, (4, 4), 3, {"padding": 1, "bias": True}),
}


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Skip where there is no C compiler."""
    if native.find_library() is None:
        pytest.skip("needs a C compiler")
    assert native_layers.works()


def make(name: str) -> tuple[Conv2d, Tensor]:
    """Return a layer that learns by C, and pictures."""
    torch.manual_seed(0)
    wide, high, sides, batch, special = SHAPES[name]
    layer = Conv2d(wide, high, **{"kernel_size": 3, "bias": False, **special}).to(memory_format=torch.channels_last)
    x = torch.randn(batch, wide, *sides).contiguous(memory_format=torch.channels_last)
    assert use_native(layer)
    return layer, x


def learn(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what comes out, and the gradients of what went in and of the weights."""
    x = x.detach().requires_grad_()
    out = layer(x)
    weights = torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the gradients that C computes."""
    counted, weigh = list[int](), native_pictures.Weigher.weigh

    def count(own: native_pictures.Weigher, *given: Any) -> Tensor:
        counted.append(1)
        return weigh(own, *given)

    monkeypatch.setattr(native_pictures.Weigher, "weigh", count)
    return counted


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_pytorchs(name: str, calls: list[int]) -> None:
    """As near to float64's as PyTorch's in float32."""
    layer, x = make(name)
    found = learn(layer, x)
    assert len(calls) == 1
    layer.by_native = False
    usual, exact = learn(layer, x), learn(copy.deepcopy(layer).double(), x.double())
    for ours, theirs, right in zip(found, usual, exact, strict=True):
        assert ours.shape == right.shape
        apart, own, size = (float(one.double().norm()) for one in (ours - right, theirs - right, right))
        assert apart <= 4 * own + 1e-6 * size  # all are zeros where only padding is seen
    assert torch.equal(found[0], usual[0])
    assert found[2].stride() == layer.weight.stride()


@pytest.mark.parametrize("name", ["as in a ResNet", "odd channels", "more than one place at a time"])
def test_numbers_are_the_same_bit_by_bit_for_any_threads(name: str) -> None:
    layer, x = make(name)
    before, seen = torch.get_num_threads(), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        seen.append(learn(layer, x)[2])
    torch.set_num_threads(before)
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("how", ["weights", "gradient", "pictures", "expanded gradient", "a part of more channels"])
def test_numbers_may_lie_anyhow(how: str, calls: list[int]) -> None:
    layer, x = make("every second place, even sides")
    wanted = learn(layer, x)
    if how == "weights":
        layer.weight.data = layer.weight.data.contiguous()
        found = learn(layer, x)
        assert found[2].is_contiguous()
    elif how == "pictures":
        found = learn(layer, x.contiguous())  # which PyTorch convolves as they lie
        assert len(calls) == 1
    elif how == "a part of more channels":
        more = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, :32]
        found = learn(layer, more)
        assert len(calls) == 2
    else:
        out = layer(x)
        came = torch.ones_like(out) if how == "gradient" else torch.ones(1, 1, 1, 1).expand(out.shape)
        came = came.contiguous() if how == "gradient" else came
        [found_weight] = torch.autograd.grad(out, layer.weight, came)
        layer.by_native = False
        [wanted_weight] = torch.autograd.grad(layer(x), layer.weight, came)
        torch.testing.assert_close(found_weight, wanted_weight, rtol=1e-4, atol=1e-3)
        return
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.eval(),
        lambda layer: layer.weight.requires_grad_(False),
        lambda layer: setattr(layer, "groups", 2) or setattr(layer, "weight", nn.Parameter(torch.randn(64, 16, 3, 3))),
        lambda layer: setattr(layer, "dilation", (2, 2)),
        lambda layer: setattr(layer, "padding", (1, 0)),
        lambda layer: setattr(layer, "padding", 1),
        lambda layer: setattr(layer, "stride", 2),
        lambda layer: setattr(layer, "stride", (1, 2)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(64, 32, 3, 1))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(8, 32, 3, 3))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(64, 32, 1, 1))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(64, 1, 3, 3).expand(64, 32, 3, 3))),
    ],
)
def test_what_is_not_plain_is_left_to_pytorch(change: Any, calls: list[int]) -> None:
    layer, x = make("every second place")
    change(layer)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert calls == []


def test_a_wrong_number_of_channels_is_pytorchs_error() -> None:
    layer, x = make("every second place")
    with pytest.raises(RuntimeError, match="expected input"):
        layer(x[:, :16])


def test_second_derivatives_are_refused() -> None:
    layer, x = make("every second place")
    with pytest.raises(RuntimeError, match=r"has no second derivative.*hardware.convolutions=library"):
        torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)


def test_what_is_no_number_stays_none() -> None:
    layer, x = make("every second place")
    x[0, 0, 0, 0] = torch.nan
    [gradient] = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert gradient[:, 0].isnan().any()


@pytest.mark.parametrize("change", ["weight in two bytes", "weight in eight", "saved in two bytes", "several at once"])
def test_a_backward_pass_of_other_numbers_is_pytorchs(change: str, calls: list[int]) -> None:
    layer, x = make("every second place")

    def learn_otherwise() -> Any:
        layer.float()
        out = layer(x)
        came = torch.ones_like(out)
        if change == "several at once":
            return torch.autograd.grad(out, layer.weight, torch.stack([came, 2 * came]), is_grads_batched=True)[0]
        layer.to(torch.float64 if "eight" in change else torch.bfloat16 if "saved" not in change else torch.float32)
        try:
            return torch.autograd.grad(out, layer.weight, came)[0].float()
        except RuntimeError as error:
            return type(error)

    ways = []
    for by_native in (True, False):
        layer.by_native = by_native
        if "saved" in change:
            with torch.autograd.graph.saved_tensors_hooks(lambda one: one.bfloat16(), lambda one: one):
                ways.append(learn_otherwise())
        else:
            ways.append(learn_otherwise())
    assert calls == []
    if isinstance(ways[1], Tensor):
        torch.testing.assert_close(ways[0], ways[1], rtol=1e-2, atol=1e-2)
    else:
        assert ways[0] == ways[1]


def test_a_gradient_that_holds_no_numbers_is_pytorchs(calls: list[int]) -> None:
    layer, x = make("every second place")
    out = layer(x)
    came = torch._efficientzerotensor((4, *out.shape[2:], 64)).movedim(3, 1)
    [gradient] = torch.autograd.grad(out, layer.weight, came)
    assert not gradient.any()
    assert calls == []


class Nothing(torch.autograd.Function):
    """Have no gradient."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> None:
        return None


def test_what_has_no_gradient_gives_none() -> None:
    """Zeros would let a weight decay."""
    layer, x = make("every second place")
    Nothing.apply(layer(x)).sum().backward()
    assert layer.weight.grad is None
