"""Test loss and sampling against diffusers, against a perfect network, and by learning one batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy import DiffusionPolicy, Features, Normalizer

SCHEDULERS = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class Oracle(nn.Module):
    """Stand in for a perfectly trained U-Net: it knows the clean trajectory."""

    def __init__(self, policy: DiffusionPolicy, clean: Tensor) -> None:
        super().__init__()
        self.prediction_type, self.clean, self.scheduler = policy.prediction_type, clean, policy.noise_scheduler

    def forward(self, noisy: Tensor, times: Tensor, cond: Tensor) -> Tensor:
        if hasattr(self.scheduler, "alphas_cumprod"):
            alpha = self.scheduler.alphas_cumprod[times][:, None, None]
            signal, amount = alpha.sqrt(), (1 - alpha).sqrt()
        else:
            amount = times[:, None, None] / self.scheduler.config.num_train_timesteps
            signal = 1 - amount
        noise = (noisy - signal * self.clean) / amount
        return {
            "epsilon": noise,
            "sample": self.clean,
            "v_prediction": signal * noise - amount * self.clean,
            "flow_prediction": noise - self.clean,
        }[self.prediction_type]

    def modulation(self, times: Tensor, cond: Tensor) -> list[Tensor]:
        return [times[:, None].expand(-1, len(cond)), cond.expand(len(times), *cond.shape)]

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


@pytest.mark.parametrize("prediction_type", ["sample", "flow_prediction"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_perfect_network_flows_to_what_was_demonstrated(make_policy, prediction_type, shift) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(20, shift=shift)
    policy = make_policy(noise_scheduler=scheduler, prediction_type=prediction_type, n_obs_steps=3)
    batch = random_batch(policy)
    policy.diffusion.unet = Oracle(policy, policy.normalizer(batch)["action"])
    assert policy(batch, torch.randn(4, 8, 2), torch.tensor([1, 5, 12, 19])) < 1e-6
    acted = policy.predict_action_chunk(batch, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(acted, batch["action"][:, 2:6], rtol=1e-3, atol=1e-3)


def test_flow_matching_mixes_as_diffusers_does(make_policy) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(20)
    policy = make_policy(noise_scheduler=scheduler)
    batch, noise, timesteps = random_batch(policy), torch.randn(4, 8, 2), torch.tensor([0, 5, 12, 19])
    normalized = policy.normalizer(batch)
    times = scheduler.timesteps.flip(0)[timesteps]
    noisy = scheduler.scale_noise(normalized["action"], times, noise)
    predicted = policy.diffusion.unet(noisy, times, policy.encode(normalized))
    expected = functional.mse_loss(predicted, noise - normalized["action"])
    torch.testing.assert_close(policy(batch, noise, timesteps), expected)


def test_another_flow_of_diffusers_takes_its_own_steps(make_policy) -> None:
    policy = make_policy(noise_scheduler=FlowMatchHeunDiscreteScheduler(20))
    acted = policy.predict_action_chunk(random_batch(policy), generator=torch.Generator().manual_seed(0))
    assert acted.shape == (4, 4, 2)
    assert acted.isfinite().all()
    other = make_policy(noise_scheduler=FlowMatchHeunDiscreteScheduler(20), prediction_type="sample")
    with pytest.raises(ValueError, match="steps along a velocity only"):
        other.predict_action_chunk(random_batch(policy))


@pytest.mark.parametrize(
    ("scheduler", "prediction_type", "fix"),
    [
        (DDPMScheduler(20), "flow_prediction", "use epsilon or sample or v_prediction"),
        (FlowMatchEulerDiscreteScheduler(20), "epsilon", "use sample or flow_prediction"),
    ],
)
def test_what_a_scheduler_cannot_be_asked_for(make_policy, scheduler, prediction_type, fix) -> None:
    with pytest.raises(ValueError, match=rf"prediction_type={prediction_type} means nothing to .*: {fix}"):
        make_policy(noise_scheduler=scheduler, prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", [*PREDICTION_TYPES, "flow_prediction"])
def test_min_snr_counts_an_error_as_that_of_the_actions(make_policy, prediction_type) -> None:
    """The same wrong idea of the actions costs min(snr, 5) times its square, whatever the network is asked for."""
    kind = FlowMatchEulerDiscreteScheduler(20) if prediction_type == "flow_prediction" else DDPMScheduler(20)
    policy = make_policy(noise_scheduler=kind, prediction_type=prediction_type, loss_weighting="min_snr")
    batch, noise = random_batch(policy), torch.randn(4, 8, 2)
    clean = policy.normalizer(batch)["action"]
    policy.diffusion.unet = Oracle(policy, clean + 0.1)
    for step in (0, 3, 10, 18):
        timesteps = torch.full((4,), step)
        snr = (policy.noising.signal[step] / policy.noising.noise[step]) ** 2
        loss = policy.train()(batch, noise, timesteps)
        torch.testing.assert_close(loss, 0.01 * snr.clamp(max=5), rtol=1e-3, atol=1e-7)
        plain = policy.eval()(batch, noise, timesteps)  # validation stays comparable
        own = make_policy(noise_scheduler=kind, prediction_type=prediction_type)
        own.diffusion.unet = policy.diffusion.unet
        assert plain == own(batch, noise, timesteps)


def test_several_draws_of_noise_for_each_sample(make_policy) -> None:
    policy = make_policy(do_mask_loss_for_padding=True)
    batch, noise, timesteps = random_batch(policy), torch.randn(12, 8, 2), torch.randint(20, (12,))
    batch["action_is_pad"][0, 5:] = True
    repeated = {key: value.repeat_interleave(3, dim=0) for key, value in batch.items()}
    torch.testing.assert_close(policy(batch, noise, timesteps), policy(repeated, noise, timesteps))


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


@pytest.mark.parametrize(
    ("times", "rule"),
    [
        ({"n_action_steps": 16}, r"n_action_steps=16 must be 1 to horizon - n_obs_steps \+ 1 = 15"),
        ({"n_action_steps": 0}, "n_action_steps=0 must be 1 to"),
        ({"horizon": 10}, "horizon=10 must be divisible by 4"),
    ],
)
def test_times_that_do_not_fit_are_refused(times: dict[str, int], rule: str) -> None:
    parts = {"normalizer": Normalizer({}, {}), "noise_scheduler": DDPMScheduler(10), "encoder": None}
    with pytest.raises(ValueError, match=rule):
        DiffusionPolicy(Features(action_dim=2, state_dim=3), **parts, **times)


def test_cameras_need_an_encoder(make_policy) -> None:
    features = Features(action_dim=2, cameras={"observation.image": (3, 36, 36)})
    with pytest.raises(ValueError, match=r"observation\.image need an encoder: set backbone"):
        make_policy(features, encoder=None)


def test_one_batch_can_be_learnt_by_heart(make_policy) -> None:
    policy = make_policy(num_inference_steps=None)
    batch = random_batch(policy)
    repeated = {key: value.repeat(16, *[1] * (value.ndim - 1)) for key, value in batch.items()}  # 16 noises a sample
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(300):
        loss = policy(repeated, torch.randn(64, 8, 2), torch.randint(20, (64,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    acted = policy.predict_action_chunk(batch, generator=torch.Generator().manual_seed(0))
    assert (acted - batch["action"][:, 1:5]).abs().mean() < 0.3  # actions span 6
