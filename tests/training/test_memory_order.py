"""Weights are updated as they lie: the same bits as PyTorch's own step, without its copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from getiaction.training.memory_order import update_in_memory_order

CHOICES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.Adam, {}),
]


def make_weights() -> list[nn.Parameter]:
    """Return weights whose channels lie last, 2-D and 1-D, one that is in order, and one that has no gradient."""
    torch.manual_seed(0)
    picture = torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    row = torch.randn(6, 3, 5).transpose(1, 2)
    return [nn.Parameter(one) for one in (picture, row, torch.randn(7), torch.randn(4, 3).t())]


def step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], number: int) -> None:
    torch.manual_seed(number)
    for weight in weights[:3]:
        weight.grad = torch.empty_like(weight).normal_()
    optimizer.step()


def assert_same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys() == {0, 1, 2}
    for number, entry in first["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, second["state"][number][name])
            assert value.stride() == second["state"][number][name].stride()


@pytest.mark.parametrize(("kind", "options"), CHOICES)
def test_the_same_bits_and_the_same_state(kind: Any, options: dict[str, Any]) -> None:
    weights, theirs = make_weights(), make_weights()
    ours, plain = kind(weights, fused=True, **options), kind(theirs, fused=True, **options)
    update_in_memory_order(ours)
    for number in range(3):
        step(ours, weights, number)
        step(plain, theirs, number)
        assert all(torch.equal(one, other) for one, other in zip(weights, theirs, strict=True))
        assert_same_state(ours, plain)
        assert all(one is other for one, other in zip(ours.param_groups[0]["params"], weights, strict=True))
    again = kind(weights, fused=True, **options)  # as a run that goes on
    update_in_memory_order(again)
    again.load_state_dict(ours.state_dict())
    step(again, weights, 3)
    step(plain, theirs, 3)
    assert_same_state(again, plain)
    again.zero_grad()
    assert all(weight.grad is None for weight in weights)


def test_a_state_that_is_loaded_or_changed_meanwhile_counts() -> None:
    weights, theirs = make_weights(), make_weights()
    ours, plain = torch.optim.AdamW(weights, fused=True), torch.optim.AdamW(theirs, fused=True)
    update_in_memory_order(ours)
    first = None
    for number in range(3):
        step(ours, weights, number)
        step(plain, theirs, number)
        first = first or copy.deepcopy(plain.state_dict())
    for optimizer, own in ((ours, weights), (plain, theirs)):
        optimizer.load_state_dict(copy.deepcopy(first))
        optimizer.state[own[1]]["exp_avg"] = torch.ones_like(own[1])
        step(optimizer, own, 3)
    assert all(torch.equal(one, other) for one, other in zip(weights, theirs, strict=True))
    assert_same_state(ours, plain)


def test_a_step_with_a_closure_is_pytorchs() -> None:
    weights = make_weights()
    optimizer = torch.optim.AdamW(weights, fused=True)
    update_in_memory_order(optimizer)
    for number in range(2):
        optimizer.zero_grad()

        def closure() -> float:
            loss = sum((weight**2).sum() for weight in weights)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        assert {int(entry["step"]) for entry in optimizer.state.values()} == {number + 1}


def test_no_gradient_is_copied() -> None:
    def copies(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        step(optimizer, weights, 0)
        with torch.profiler.profile() as profiler:
            step(optimizer, weights, 1)
        (fused,) = [event for event in profiler.events() if event.name == "aten::_fused_adamw_"]
        return sum(child.name == "aten::contiguous" for child in fused.cpu_children)

    weights, theirs = make_weights(), make_weights()
    ours, plain = torch.optim.AdamW(weights, fused=True), torch.optim.AdamW(theirs, fused=True)
    update_in_memory_order(ours)
    assert copies(theirs, plain) == 2
    assert copies(weights, ours) == 0


def test_other_optimisers_are_left_alone() -> None:
    for optimizer in (torch.optim.AdamW(make_weights()), torch.optim.SGD(make_weights(), fused=True)):
        update_in_memory_order(optimizer)
        assert not optimizer._optimizer_step_pre_hooks
