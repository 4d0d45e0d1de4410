"""Our Mish is PyTorch's, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy.fast.activation import Mish


def values_and_gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.arange(len(x)).to(x.dtype)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_pytorchs(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-110, 110, 441), torch.linspace(-3, 3, 100)]).to(dtype)
    for ours, theirs in zip(values_and_gradients(Mish(), x), values_and_gradients(nn.Mish(), x), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs)


def test_without_a_gradient_the_value_is_the_same() -> None:
    x = torch.linspace(-30, 30, 101)
    with torch.no_grad():
        torch.testing.assert_close(Mish()(x.requires_grad_()), nn.Mish()(x))


def test_a_gradient_is_the_difference_quotient() -> None:
    x = torch.linspace(-6, 6, 50)
    step = 1e-2
    quotient = (Mish()(x + step) - Mish()(x - step)) / (2 * step)
    _, gradient = values_and_gradients(Mish(), x)
    torch.testing.assert_close(gradient, quotient * torch.arange(50), atol=5e-2, rtol=1e-3)


def test_extremes_stay_finite() -> None:
    y, gradient = values_and_gradients(Mish(), torch.tensor([-1e30, -500.0, 0.0, 500.0, 1e30]))
    assert y.tolist() == pytest.approx([0, 0, 0, 500, 1e30])
    assert gradient.isfinite().all()


def test_the_second_derivative_is_pytorchs() -> None:
    x = torch.linspace(-5, 5, 41)
    found = []
    for module in (Mish(), nn.Mish()):
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(point).sum(), point, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), point)[0])
    torch.testing.assert_close(*found)


def test_compiled_it_has_the_same_gradient() -> None:
    x = torch.linspace(-3, 3, 7)
    compiled = torch.compile(Mish(), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(values_and_gradients(compiled, x), values_and_gradients(nn.Mish(), x), strict=True):
        torch.testing.assert_close(ours, theirs)
