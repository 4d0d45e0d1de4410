"""Test loss and sampling against diffusers, against a perfect network, and by learning one batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy import DiffusionPolicy, Features

SCHEDULERS = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class Oracle(nn.Module):
    """Stand in for a perfectly trained U-Net: it knows the clean trajectory."""

    def __init__(self, policy: DiffusionPolicy, clean: Tensor) -> None:
        super().__init__()
        self.alphas_cumprod, self.prediction_type, self.clean = policy.alphas_cumprod, policy.prediction_type, clean

    def forward(self, noisy: Tensor, timesteps: Tensor, cond: Tensor) -> Tensor:
        alpha = self.alphas_cumprod[timesteps][:, None, None]
        noise = (noisy - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * self.clean
        return {"epsilon": noise, "sample": self.clean, "v_prediction": velocity}[self.prediction_type]

    def modulation(self, timesteps: Tensor, cond: Tensor) -> list[Tensor]:
        return [timesteps[:, None].expand(-1, len(cond)), cond.expand(len(timesteps), *cond.shape)]

    def denoise(self, noisy: Tensor, films: list[Tensor]) -> Tensor:
        return self(noisy, *films)


def random_batch(policy: DiffusionPolicy, batch_size: int = 4) -> dict[str, Tensor]:
    return {
        "observation.state": 6 * torch.rand(batch_size, policy.n_obs_steps, 3) - 2,
        "action": 6 * torch.rand(batch_size, policy.horizon, 2) - 2,
        "action_is_pad": torch.zeros(batch_size, policy.horizon, dtype=torch.bool),
    }


@pytest.mark.parametrize("make_scheduler", [DDPMScheduler, DDIMScheduler])
def test_noise_is_added_as_diffusers_does(make_policy, make_scheduler) -> None:
    scheduler = make_scheduler(20, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    policy = make_policy(noise_scheduler=scheduler)
    batch, noise, timesteps = random_batch(policy), torch.randn(4, 8, 2), torch.tensor([0, 5, 12, 19])
    normalized = policy.normalizer(batch)
    noisy = scheduler.add_noise(normalized["action"], noise, timesteps)
    predicted = policy.diffusion.unet(noisy, timesteps, policy.encode(normalized))
    expected = functional.mse_loss(predicted, normalized["action"])
    torch.testing.assert_close(policy(batch, noise, timesteps), expected)


@pytest.mark.parametrize("make_scheduler", [DDPMScheduler, DDIMScheduler])
def test_the_velocity_is_diffusers(make_policy, make_scheduler) -> None:
    scheduler = make_scheduler(20, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    policy = make_policy(noise_scheduler=scheduler)
    batch, noise, timesteps = random_batch(policy), torch.randn(4, 8, 2), torch.tensor([0, 5, 12, 19])
    normalized = policy.normalizer(batch)
    noisy = scheduler.add_noise(normalized["action"], noise, timesteps)
    predicted = policy.diffusion.unet(noisy, timesteps, policy.encode(normalized))
    expected = functional.mse_loss(predicted, scheduler.get_velocity(normalized["action"], noise, timesteps))
    torch.testing.assert_close(policy(batch, noise, timesteps), expected)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("make_scheduler", SCHEDULERS)
def test_a_perfect_network_costs_nothing_and_acts_as_demonstrated(make_policy, make_scheduler, prediction_type) -> None:
    scheduler = make_scheduler(20, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    policy = make_policy(noise_scheduler=scheduler, n_obs_steps=3, num_inference_steps=10)
    batch = random_batch(policy)
    policy.diffusion.unet = Oracle(policy, policy.normalizer(batch)["action"])
    assert policy(batch, torch.randn(4, 8, 2), torch.tensor([1, 5, 12, 19])) < 1e-6
    acted = policy.predict_action_chunk(batch, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(acted, batch["action"][:, 2:6], rtol=1e-3, atol=1e-3)  # To - 1 : To - 1 + Ta


def test_padded_actions_are_left_out_of_the_loss(make_policy) -> None:
    policy = make_policy(do_mask_loss_for_padding=True)
    batch, noise, timesteps = random_batch(policy), torch.randn(4, 8, 2), torch.tensor([0, 5, 12, 19])
    policy.diffusion.unet = nn.Identity()
    policy.diffusion.unet.forward = lambda noisy, timesteps, cond: torch.zeros_like(noisy)  # so the loss is noise ** 2
    torch.testing.assert_close(policy(batch, noise, timesteps), noise.square().mean())
    batch["action_is_pad"][0, 5:] = True
    batch["action_is_pad"][1, 1:] = True
    kept = torch.cat([noise[0, :5], noise[1, :1], noise[2], noise[3]])
    torch.testing.assert_close(policy(batch, noise, timesteps), kept.square().mean())
    batch["action_is_pad"][:] = True
    assert policy(batch, noise, timesteps) == 0


def test_the_generator_decides_the_actions(make_policy) -> None:
    policy = make_policy().eval()
    observations = random_batch(policy)
    first, again, other = (
        policy.predict_action_chunk(observations, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (4, 4, 2)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_cameras_need_an_encoder(make_policy) -> None:
    features = Features(action_dim=2, cameras={"observation.image": (3, 36, 36)})
    with pytest.raises(ValueError, match=r"observation\.image need an encoder: set backbone"):
        make_policy(features, encoder=None)


def test_one_batch_can_be_learnt_by_heart(make_policy) -> None:
    policy = make_policy(num_inference_steps=None)
    batch = random_batch(policy)
    repeated = {key: value.repeat(32, *[1] * (value.ndim - 1)) for key, value in batch.items()}  # 32 noises a sample
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(300):
        loss = policy(repeated, torch.randn(128, 8, 2), torch.randint(20, (128,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    acted = policy.predict_action_chunk(batch, generator=torch.Generator().manual_seed(0))
    assert (acted - batch["action"][:, 1:5]).abs().mean() < 0.3  # actions span 6
