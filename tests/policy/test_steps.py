"""Denoising steps with coefficients computed beforehand: diffusers' own, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from getiaction.policy.steps import draw_all, known_steps, start

TYPES = ("epsilon", "sample", "v_prediction")


def run(scheduler: Any, count: int, outputs: Tensor, *, seed: int, ours: bool) -> list[Tensor]:
    """Denoise with made-up network outputs; return the sample after every step."""
    generator, sample, samples = torch.Generator().manual_seed(seed), torch.ones(2, 4, 3) * 1.5, []
    if ours:
        timesteps, take = start(scheduler, count)
    else:
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps
    extra = {"generator": generator} if not isinstance(scheduler, EulerDiscreteScheduler) else {}
    for number, timestep in enumerate(timesteps):
        if ours:
            sample = take(outputs[number], number, sample, generator)
        else:
            sample = scheduler.step(outputs[number], timestep, sample, **extra).prev_sample
        samples.append(sample)
    return samples


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("count", [50, 10, 7])
@pytest.mark.parametrize(
    ("make", "more"),
    [
        (DDPMScheduler, {}),
        (DDPMScheduler, {"variance_type": "fixed_large", "clip_sample_range": 0.5}),
        (DDPMScheduler, {"variance_type": "fixed_small_log", "timestep_spacing": "trailing"}),
        (DDIMScheduler, {}),
        (DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 1}),
        (DDIMScheduler, {"timestep_spacing": "trailing"}),
    ],
)
def test_equal_to_diffusers(make: Any, more: dict[str, Any], count: int, clip: bool, prediction_type: str) -> None:
    torch.manual_seed(0)
    scheduler = make(100, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=clip, **more)
    assert known_steps(scheduler, count) is not None
    outputs = torch.randn(count, 2, 4, 3)
    ours = run(scheduler, count, outputs, seed=1, ours=True)
    theirs = run(scheduler, count, outputs, seed=1, ours=False)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("count", [50, 10, 1])
@pytest.mark.parametrize("more", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}])
def test_flow_matching_is_equal_to_diffusers(more: dict[str, Any], count: int) -> None:
    torch.manual_seed(0)
    outputs = torch.randn(count, 2, 4, 3)
    ours, theirs = (
        run(FlowMatchEulerDiscreteScheduler(100, **more), count, outputs, seed=1, ours=ours) for ours in (True, False)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (DPMSolverMultistepScheduler, {}),
        (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
        (EulerDiscreteScheduler, {}),
        (DDPMScheduler, {"variance_type": "learned"}),
        (DDIMScheduler, {"thresholding": True}),
    ],
)
def test_other_schedulers_take_their_own_steps_and_start_afresh(make: Any, more: dict[str, Any]) -> None:
    scheduler = make(100, **more)
    assert known_steps(scheduler, 10) is None
    if more:
        return
    outputs = torch.randn(10, 2, 4, 3)
    first = run(scheduler, 10, outputs, seed=1, ours=True)
    assert torch.equal(first[-1], run(scheduler, 10, outputs, seed=1, ours=True)[-1])  # nothing is left of the first
    assert torch.equal(first[-1], run(make(100), 10, outputs, seed=1, ours=False)[-1])


def test_a_schedule_that_ends_in_pure_noise() -> None:
    more = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler, outputs = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", **more), torch.randn(5, 2, 4, 3)
    ours, theirs = (run(scheduler, 5, outputs, seed=1, ours=ours) for ours in (True, False))
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-4, atol=1e-4)


def test_a_generator_for_each_row() -> None:
    scheduler = DDPMScheduler(100)
    timesteps, take = start(scheduler, 10)
    scheduler.set_timesteps(10)
    output, sample = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    drawn = [[torch.Generator().manual_seed(row) for row in (5, 6)] for _ in range(2)]
    ours = take(output, 0, sample, drawn[0])
    theirs = scheduler.step(output, timesteps[0], sample, generator=drawn[1]).prev_sample
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 16, 2), (2, 4, 3)])
def test_noise_that_is_drawn_ahead_is_what_comes_step_by_step(shape: tuple[int, ...]) -> None:
    first, second = ([torch.Generator().manual_seed(row) for row in range(shape[0])] for _ in range(2))
    one_by_one = [randn_tensor(shape, generator=first) for _ in range(5)]
    for ahead, expected in zip(draw_all(torch.zeros(shape), 5, second), one_by_one, strict=True):
        assert torch.equal(ahead, expected)


def test_rows_with_their_own_generators_get_diffusers_noise() -> None:
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    outputs, taken = torch.randn(10, 3, 8, 2), []
    for ours in (True, False):
        draws, sample = [torch.Generator().manual_seed(row) for row in range(3)], torch.ones(3, 8, 2)
        timesteps, take = start(scheduler, 10)
        scheduler.set_timesteps(10)
        for number, timestep in enumerate(timesteps):
            if ours:
                sample = take(outputs[number], number, sample, draws)
            else:
                sample = scheduler.step(outputs[number], timestep, sample, generator=draws).prev_sample
        taken.append(sample)
    torch.testing.assert_close(*taken)
