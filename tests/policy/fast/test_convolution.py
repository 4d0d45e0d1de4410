"""Convolutions whose weights' gradients are products give what PyTorch's give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy.fast import convolution
from getiaction.policy.fast.convolution import Conv1d, Conv2d, replace_convolutions

LAYERS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = [
    (Conv1d, {"kernel_size": 3, "padding": 1}, (4,)),
    (Conv1d, {"kernel_size": 5, "padding": 2, "bias": False}, (2,)),
    (Conv1d, {"kernel_size": 3, "padding": 1, "stride": 2}, (7,)),
    (Conv1d, {"kernel_size": 1}, (3,)),
    (Conv2d, {"kernel_size": 3, "padding": 1, "bias": False}, (2, 2)),
    (Conv2d, {"kernel_size": 3, "padding": 1}, (1, 1)),
    (Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2}, (5, 4)),
    (Conv2d, {"kernel_size": (3, 5), "padding": (0, 2), "stride": (1, 2)}, (4, 6)),
    (Conv2d, {"kernel_size": 1, "stride": 2, "bias": False}, (4, 4)),
]
LAID_OUT = [(*layer, last) for layer in LAYERS for last in (False, True) if layer[0] is Conv2d or not last]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let products pay for every size and type; list the shapes that they were asked for."""
    seen: list[tuple[int, ...]] = []
    plain = convolution.weight_gradient

    def watched(x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(convolution, "weight_gradient", watched)
    monkeypatch.setattr(convolution, "FEW", dict.fromkeys((torch.float64, torch.float32, torch.bfloat16), float("inf")))
    return seen


def twins(kind: type[nn.Module], options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return one layer as ours and as PyTorch's."""
    torch.manual_seed(0)
    ours = kind(6, 8, **options, dtype=dtype)
    theirs = kind.__base__(6, 8, **options, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what comes out, and the gradients of a loss that weighs each number differently."""
    x = x.clone().requires_grad_()
    out = layer(x)
    torch.manual_seed(1)
    loss = (out.double() * torch.randn(out.shape).double()).sum()
    return [out, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize(("kind", "options", "sides", "last"), LAID_OUT)
def test_all_gradients_are_pytorchs(kind: Any, options: Any, sides: tuple[int, ...], last: bool, calls: Any) -> None:
    ours, theirs = twins(kind, options, torch.float64)
    x = torch.randn(3, 6, *sides, dtype=torch.float64)
    if last:
        x, ours = x.to(memory_format=torch.channels_last), ours.to(memory_format=torch.channels_last)
    for value, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(value, expected)
    assert calls == [x.shape]
    assert torch.autograd.gradcheck(ours, x.requires_grad_())
    assert torch.autograd.gradgradcheck(ours, x)


@pytest.mark.parametrize(("kind", "options", "sides"), LAYERS)
def test_under_autocast_it_is_autocasts(kind: Any, options: Any, sides: tuple[int, ...], calls: Any) -> None:
    ours, theirs = twins(kind, options)
    x = torch.randn(3, 6, *sides)
    with torch.autocast("cpu", torch.bfloat16):
        found = list(zip(gradients(ours, x), gradients(theirs, x), strict=True))
    assert calls == [x.shape]
    for value, expected in found:
        assert value.dtype == expected.dtype
        assert (value - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_only_what_is_asked_for_has_a_gradient(frozen: str, calls: Any) -> None:
    layer = Conv1d(6, 8, 3, padding=1)
    x = torch.randn(3, 6, 4, requires_grad=frozen != "input")
    if frozen != "input":
        getattr(layer, frozen).requires_grad_(False)
    layer(x).sum().backward()
    given = {"input": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    assert [name for name, gradient in given.items() if gradient is None] == [frozen]


def test_products_are_taken_in_bf16_training_with_few_places_only(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = torch.randn(2, 64, 4), torch.randn(2, 64, 400)
    layer = Conv1d(64, 64, 3, padding=1)
    assert not convolution.pays(layer, few)  # float32 stays PyTorch's, to the bit
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution.pays(layer, few)
        assert not convolution.pays(layer, many)
        assert not convolution.pays(layer, few[:, :, None])  # channels last
        with torch.no_grad():
            assert not convolution.pays(layer, few)
        assert not convolution.pays(layer.eval(), few)


def test_replaced_convolutions_share_their_weights() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)))
    before, x = dict(network.named_parameters()), torch.randn(2, 3, 9, 9)
    expected = network(x)
    replace_convolutions(network)
    assert [type(layer) is Conv2d for layer in (network[0], *network[1])] == [True, False, True]
    assert all(weight is before[name] for name, weight in network.named_parameters())
    assert torch.equal(network(x), expected)
