"""Copies of weights follow the weights, whoever changes them, and are left alone while nobody does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy.fast.copies import LOOKED_AT, Copy, stride_over

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


@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (64, 641), (512, 512, 3, 3), (1, 5), (7,), (1024, 1)])
def test_numbers_of_all_rows_and_columns_are_looked_at(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    seen = torch.arange(size)[:: stride_over(size)]
    assert min(size, LOOKED_AT) <= 2 * len(seen)
    assert len(seen) <= 2 * LOOKED_AT + 1
    for length in [torch.Size(shape[dim:]).numel() for dim in range(len(shape))]:  # of a row, a plane, ...
        if length > 1:
            assert len(set((seen % length).tolist())) > min(length, len(seen)) // 2


@pytest.mark.parametrize("columns", [8, 5, 4, 3, 1])
def test_halves_of_rows_may_take_turns(columns: int) -> None:
    weight = torch.randn(2, columns)
    copy = Copy(weight, weight, torch.bfloat16, width=8, in_pairs=True)
    copy.refresh()
    wanted = torch.zeros(2, 8, dtype=torch.bfloat16)
    wanted[:, :columns] = weight
    assert torch.equal(copy.copy[:, 0::2], wanted[:, :4])
    assert torch.equal(copy.copy[:, 1::2], wanted[:, 4:])


def test_an_interrupted_copy_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 320)
    copy = make(weight)
    copy.refresh()
    weight.mul_(2)
    with monkeypatch.context() as patched:
        patched.setattr(copy, "_parts", [(Interrupted(), weight)])
        with pytest.raises(KeyboardInterrupt):
            copy.refresh()
    copy.refresh()
    assert torch.equal(copy.copy, weight.t().bfloat16())


class Interrupted:
    def copy_(self, _: Tensor) -> None:
        raise KeyboardInterrupt


def test_memory_that_is_looked_at_can_be_let_go() -> None:
    weight = torch.randn(64, 320)
    make(weight).refresh()
    weight.untyped_storage().resize_(0)  # NumPy's views would forbid that
    assert weight.untyped_storage().nbytes() == 0
