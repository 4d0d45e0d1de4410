"""The moving average: its decay, its arithmetic, and what it copies instead of averaging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from getiaction.training.ema import Ema


def reference_decay(step: int, *, power: float = 0.75, max_decay: float = 0.9999) -> float:
    """Return what `EMAModel.get_decay` of real-stanford/diffusion_policy returns at `optimization_step` = `step`."""
    counted = max(0, step - 0 - 1)
    return 0.0 if counted <= 0 else min(1 - (1 + counted) ** -power, max_decay)


def reference_averages(weights: list[float]) -> list[float]:
    """Return the average after each update, in plain Python."""
    average, averages = weights[0], []
    for step, weight in enumerate(weights):
        average = average * reference_decay(step) + weight * (1 - reference_decay(step))
        averages.append(average)
    return averages


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (1, 0.0), (2, 0.40539644), (3, 0.56130866), (11, 0.83443997), (101, 0.96861238), (10**7, 0.9999)],
)
def test_decay_warms_up_like_the_reference(step: int, expected: float) -> None:
    assert Ema(nn.Linear(1, 1)).decay(step) == pytest.approx(expected, abs=1e-7)


def test_decay_counts_steps_like_the_reference() -> None:
    ema = Ema(nn.Linear(1, 1))
    assert [ema.decay(step) for step in range(300)] == pytest.approx([reference_decay(step) for step in range(300)])


def test_decay_ends_at_its_maximum() -> None:
    ema = Ema(nn.Linear(1, 1), max_decay=0.5)
    assert [ema.decay(step) for step in (10, 100, 1000)] == [0.5, 0.5, 0.5]


def test_power_sets_the_warm_up() -> None:
    assert Ema(nn.Linear(1, 1), power=1.0).decay(4) == pytest.approx(reference_decay(4, power=1.0))


def test_updates_equal_a_plain_computation() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema, weights, averages = Ema(module), [0.5, -1.0, 2.0, 7.0, -3.0, 0.25], []
    for step, weight in enumerate(weights):
        module.weight.data.fill_(weight)
        ema.update(module, step)
        averages.append(ema.average.weight.item())
    assert averages == pytest.approx(reference_averages(weights), rel=1e-5)


def test_a_run_averages_its_own_weights(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "training.max_steps=6")
    name, weight = next(iter(trainer.policy.named_parameters()))
    raw: list[float] = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: raw.append(weight.detach().flatten()[0].item()))
    trainer.fit()
    averaged = trainer.ema.average.get_parameter(name).flatten()[0].item()
    assert len(raw) == 6
    assert averaged == pytest.approx(reference_averages(raw)[-1], rel=1e-5)


def test_batch_norm_statistics_are_copied() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = Ema(module)
    for step in range(5):
        module(torch.randn(8, 3, generator=torch.Generator().manual_seed(step)))
        ema.update(module, step)
    norm, average = module[1], ema.average[1]
    assert average.num_batches_tracked.item() == 5
    assert torch.equal(average.running_mean, norm.running_mean)
    assert torch.equal(average.running_var, norm.running_var)
    assert average.running_mean.data_ptr() != norm.running_mean.data_ptr()


def test_average_is_for_use_not_for_training() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    ema = Ema(module)
    ema.update(module, 3)
    assert not any(weight.requires_grad for weight in ema.average.parameters())
    assert not any(part.training for part in ema.average.modules())
    assert module.training
    assert all(weight.requires_grad for weight in module.parameters())


def test_average_starts_as_a_copy() -> None:
    module = nn.Linear(2, 2)
    before = copy.deepcopy(module.state_dict())
    ema = Ema(module)
    module.weight.data.add_(1)
    assert torch.equal(ema.average.weight, before["weight"])


def test_a_frozen_weight_stays_exactly_as_it_is() -> None:
    module = nn.Linear(4, 4).requires_grad_(False)
    ema = Ema(module)
    for step in range(20):
        ema.update(module, step)
    assert torch.equal(ema.average.weight, module.weight)
