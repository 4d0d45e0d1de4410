"""Test the U-Net: shapes, conditioning, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from getiaction.policy import ConditionalUnet1d
from getiaction.policy.unet import SinusoidalEmbedding

DIMS = (8, 16, 24, 32)


def random_inputs(*, horizon: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, horizon, 3), torch.tensor([0, 7]), torch.randn(2, 5)  # actions, timesteps, condition


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_channels_last_in_memory_change_nothing(monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=3, cond_dim=5, down_dims=DIMS[:levels])
    inputs = torch.randn(40, 8, 3), torch.randint(50, (40,)), torch.randn(40, 5)
    seen: list[int] = []
    unet.final_conv.register_forward_pre_hook(lambda _, given: seen.append(given[0].ndim))
    found = []
    for many in (32, 1000):
        monkeypatch.setattr("getiaction.policy.unet.MANY", many)
        unet.zero_grad()
        out = unet(*inputs)
        out.square().mean().backward()
        found.append([out.detach(), *(weight.grad.clone() for weight in unet.parameters())])
    assert seen == [4, 3]
    for rows, plain in zip(*found, strict=True):
        torch.testing.assert_close(rows, plain, rtol=1e-4, atol=2e-5)  # 1.2e-5 on an AMD EPYC


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_output_has_the_shape_of_the_actions(levels: int, kernel_size: int) -> None:
    unet = ConditionalUnet1d(action_dim=3, cond_dim=5, down_dims=DIMS[:levels], kernel_size=kernel_size)
    assert unet.time_factor == 2 ** (levels - 1)
    for horizon in (unet.time_factor, 3 * unet.time_factor):
        actions, timesteps, cond = random_inputs(horizon=horizon)
        assert unet(actions, timesteps, cond).shape == (2, horizon, 3)


@pytest.mark.parametrize("film_scale", [True, False])
def test_every_input_matters_and_samples_do_not_mix(film_scale: bool) -> None:
    unet = ConditionalUnet1d(action_dim=3, cond_dim=5, down_dims=DIMS[:2], use_film_scale_modulation=film_scale)
    actions, timesteps, cond = random_inputs()
    before = unet(actions, timesteps, cond)
    for inputs in ((actions + 1, timesteps, cond), (actions, timesteps + 1, cond), (actions, timesteps, cond + 1)):
        assert not torch.allclose(unet(*inputs), before, atol=1e-4)
    other = torch.cat([actions[:1], actions[1:] + 1])
    torch.testing.assert_close(unet(other, timesteps, cond)[0], before[0])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=3, cond_dim=5, down_dims=DIMS[:3])
    inputs = random_inputs()
    gradients = []
    for unet.gradient_checkpointing in (False, True):
        unet.zero_grad()
        unet(*inputs).square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in unet.named_parameters()})
    plain, checkpointed = gradients
    torch.testing.assert_close(plain, checkpointed)


def test_step_embedding_is_sines_then_cosines() -> None:
    embedded = SinusoidalEmbedding(4)(torch.tensor([0, 1, 50]))  # frequencies 1 and 1 / 10000
    expected = torch.tensor(
        [[0, 0, 1, 1], [0.8414710, 0.0001, 0.5403023, 1.0], [-0.2623749, 0.005, 0.9649660, 0.9999875]]
    )
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("film_scale", [True, False])
def test_computing_the_modulation_ahead_changes_nothing(film_scale: bool) -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1d(
        action_dim=3, cond_dim=5, down_dims=DIMS[:3], use_film_scale_modulation=film_scale
    ).double()
    actions, cond = torch.randn(2, 8, 3).double(), torch.randn(2, 5).double()
    timesteps = torch.tensor([9, 5, 0])
    films = unet.modulation(timesteps, cond)
    for number, timestep in enumerate(timesteps):
        plain = unet(actions, timestep.expand(len(actions)), cond)
        denoised = unet.denoise(actions, [film[number] for film in films])
        torch.testing.assert_close(denoised, plain, rtol=1e-12, atol=1e-12)
