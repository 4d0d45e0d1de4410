"""Copies of weights follow the weights, whoever changes them, and are left alone while nobody does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy.fast.copies import Copy

SHAPES = [(64, 320), (3, 5), (1, 1), (128, 4096)]


def make(weight: Tensor) -> Copy:
    """Return a copy of (C, K) as (K, C), in bf16."""
    return Copy(weight, weight.t(), torch.bfloat16)


def step(weight: nn.Parameter) -> None:
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "an optimiser's step": step,
    "one number, counted": lambda weight: weight.detach()[-1, -1].fill_(7),
    "an average through .data": lambda weight: weight.data.mul_(0.9).add_(0.1),
    "a NumPy view": lambda weight: weight.detach().numpy().__imul__(2),
    "a list of tensors": lambda weight: torch._foreach_mul_([weight.detach()], 0.5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.randn(shape) + 3)
    copy = make(weight.detach())
    copy.refresh()
    place = copy.copy.data_ptr()
    assert torch.equal(copy.copy, weight.detach().t().bfloat16())
    CHANGES[change](weight)
    assert not torch.equal(copy.copy, weight.detach().t().bfloat16())
    copy.refresh()
    assert torch.equal(copy.copy, weight.detach().t().bfloat16())
    assert copy.copy.data_ptr() == place  # calls on it were made beforehand


def test_an_unchanged_weight_is_not_copied_again() -> None:
    copy = make(torch.randn(64, 320))
    copy.refresh()
    copy.copy.zero_()
    copy.refresh()
    assert not copy.copy.any()


def test_weights_that_count_no_changes_are_compared() -> None:
    with torch.inference_mode():
        weight = torch.randn(8, 16)
        copy = make(weight)
        copy.refresh()
        weight.neg_()
        copy.refresh()
    assert torch.equal(copy.copy, weight.t().bfloat16())


def test_transposed_weights_may_be_copied_too() -> None:
    weight = torch.randn(16, 8).t()
    copy = Copy(weight, weight, torch.float32)
    copy.refresh()
    assert copy.copy.is_contiguous()
    assert torch.equal(copy.copy, weight)
