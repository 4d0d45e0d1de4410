"""Diffusion Policy: the loss that trains it and the sampler that acts.

From a batch to a loss: normalise, encode the observations, add noise to the actions, predict it, compare.
Source: Chi et al., "Diffusion Policy", arXiv:2303.04137; DDPM: Ho et al., arXiv:2006.11239.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from getiaction.keys import ACTION, ACTION_IS_PAD, OBS_ENV_STATE, OBS_STATE
from getiaction.policy.encoder import ImageEncoder
from getiaction.policy.features import Features
from getiaction.policy.normalizer import Normalizer
from getiaction.policy.steps import start
from getiaction.policy.unet import ConditionalUnet1d
from getiaction.policy.unrolled import unroll

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class DiffusionModel(nn.Module):
    """Hold the two networks under LeRobot's names: `rgb_encoder` (one, or one per camera) and `unet`."""

    rgb_encoder: nn.ModuleList | ImageEncoder
    unet: ConditionalUnet1d


class DiffusionPolicy(nn.Module):
    """Predict action sequences by denoising, conditioned on To observation steps.

    Args:
        features: what the policy sees and does.
        normalizer: brings batches to the network's range.
        noise_scheduler: any diffusers scheduler with `alphas_cumprod` (DDPM, DDIM, DPM-Solver, ...).
        encoder: makes an encoder from an image shape, `partial(ImageEncoder, resnet="resnet18")`; None without cameras.
        unet: makes the U-Net from `action_dim` and `cond_dim`.
        n_obs_steps: To.
        horizon: T, counted from the first observation.
        n_action_steps: Ta, executed from the last observation on; at most T - To + 1.
        num_inference_steps: denoising steps when acting; None means all of them.
        use_separate_rgb_encoder_per_camera: one encoder for each camera, or one shared.
        do_mask_loss_for_padding: leave actions past the episode's end out of the loss.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        features: Features,
        *,
        normalizer: Normalizer,
        noise_scheduler: Any,
        encoder: Callable[..., ImageEncoder] | None = ImageEncoder,
        unet: Callable[..., ConditionalUnet1d] = ConditionalUnet1d,
        n_obs_steps: int = 2,
        horizon: int = 16,
        n_action_steps: int = 8,
        num_inference_steps: int | None = None,
        use_separate_rgb_encoder_per_camera: bool = False,
        do_mask_loss_for_padding: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.normalizer, self.noise_scheduler = features, normalizer, noise_scheduler
        self.n_obs_steps, self.horizon, self.n_action_steps = n_obs_steps, horizon, n_action_steps
        self.num_train_timesteps = int(noise_scheduler.config.num_train_timesteps)
        self.num_inference_steps = num_inference_steps or self.num_train_timesteps
        self.prediction_type = noise_scheduler.config.prediction_type
        self.use_separate_rgb_encoder_per_camera = use_separate_rgb_encoder_per_camera
        self.do_mask_loss_for_padding = do_mask_loss_for_padding
        if features.cameras and encoder is None:
            raise ValueError(
                f"the observations {', '.join(features.cameras)} need an encoder: set backbone, or leave them out"
            )

        self.diffusion = DiffusionModel()
        obs_dim = sum(features.vectors.values())
        if features.cameras and encoder is not None:
            count = len(features.cameras) if use_separate_rgb_encoder_per_camera else 1
            encoders = [encoder(features.image_shape) for _ in range(count)]
            self.diffusion.rgb_encoder = nn.ModuleList(encoders) if use_separate_rgb_encoder_per_camera else encoders[0]
            obs_dim += encoders[0].feature_dim * len(features.cameras)
        self.diffusion.unet = unet(action_dim=features.action_dim, cond_dim=obs_dim * n_obs_steps)
        self.register_buffer("alphas_cumprod", noise_scheduler.alphas_cumprod.float().clone(), persistent=False)

    @property
    def encoders(self) -> list[ImageEncoder]:
        """Return the encoders: one per camera, a shared one, or none."""
        if not self.features.cameras:
            return []
        encoder = self.diffusion.rgb_encoder
        return cast(list[ImageEncoder], list(encoder)) if isinstance(encoder, nn.ModuleList) else [encoder]

    # --- training -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor], noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the training loss, a scalar.

        Args:
            batch: raw units; `observation.*` (B, To, ...) with pictures as `ImageEncoder.prepare` leaves them,
                `action` (B, T, Da), `action_is_pad` (B, T).
            noise: (B, T, Da), standard normal.
            timesteps: (B,) integers in [0, num_train_timesteps).
        """
        batch = self.normalizer(batch)
        actions = batch[ACTION]  # (B, T, Da)
        alpha = self.alphas_cumprod[timesteps][:, None, None]  # (B, 1, 1)
        noisy_actions = alpha.sqrt() * actions + (1 - alpha).sqrt() * noise
        prediction = self.diffusion.unet(noisy_actions, timesteps, self.encode(batch))
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "sample":
            target = actions
        else:
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * actions  # v: Salimans & Ho, arXiv:2202.00512
        loss = functional.mse_loss(prediction.float(), target, reduction="none")  # (B, T, Da)
        if not self.do_mask_loss_for_padding:
            return loss.mean()
        valid = (~batch[ACTION_IS_PAD])[:, :, None].expand_as(loss)
        return (loss * valid).sum() / valid.sum().clamp_min(1)

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Encode normalised observations, (B, To, ...) each, into one vector (B, cond_dim)."""
        parts = [batch[OBS_STATE]] if OBS_STATE in self.features.vectors else []
        if self.encoders:
            parts.append(self._encode_images([batch[camera] for camera in self.features.cameras]))
        if OBS_ENV_STATE in self.features.vectors:
            parts.append(batch[OBS_ENV_STATE])
        return torch.cat([part.flatten(2) for part in parts], dim=-1).flatten(1)

    def _encode_images(self, cameras: list[Tensor]) -> Tensor:
        """Encode N cameras, (B, To, C, h, w) each, into (B, To, N * feature_dim)."""
        steps = cameras[0].shape[1]
        if self.use_separate_rgb_encoder_per_camera:
            pairs = zip(self.encoders, cameras, strict=True)
            encoded = [encoder(images.flatten(0, 1)) for encoder, images in pairs]  # N x (B To, F)
            return rearrange(torch.stack(encoded), "n (b s) f -> b s (n f)", s=steps)
        images = cameras[0] if len(cameras) == 1 else torch.stack(cameras, dim=2).flatten(1, 2)  # (B, To N, C, h, w)
        encoded_all = self.encoders[0](images.flatten(0, 1))  # (B To N, F)
        return rearrange(encoded_all, "(b s n) f -> b s (n f)", s=steps, n=len(cameras))

    # --- acting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_action_chunk(
        self,
        observations: Mapping[str, Tensor],
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Return the Ta actions to execute from the last observation on, in the dataset's units.

        Args:
            observations: `observation.*` (B, To, ...) in raw units, pictures as recorded: uint8 or float in [0, 1].
            noise: (B, T, Da) to start from; drawn from `generator` if None.
            generator: source of all randomness, on the policy's device; or one for each row, which need `noise`.
            num_inference_steps: overrides the policy's own.

        Returns:
            (B, Ta, Da).
        """
        return self.act_on(
            self.prepare(observations), noise=noise, generator=generator, num_inference_steps=num_inference_steps
        )

    def prepare(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Resize and centre-crop recorded pictures, as training batches already are; keep the policy's inputs only."""
        prepared = {key: observations[key] for key in self.features.observation_keys}
        for camera in self.features.cameras:
            pixels = prepared[camera]
            pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
            prepared[camera] = self.encoders[0].prepare(pixels)
        return prepared

    @torch.no_grad()
    def act_on(
        self,
        prepared: Mapping[str, Tensor],
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Do what `predict_action_chunk` does, for observations that are resized and cropped already."""
        cond = self.encode(self.normalizer(prepared))
        return self.executed(self.sample(cond, noise, generator, num_inference_steps))

    def executed(self, trajectory: Tensor) -> Tensor:
        """Return the Ta actions of a normalised trajectory, (B, T, Da), that are executed: (B, Ta, Da), raw units."""
        first = self.n_obs_steps - 1
        return self.normalizer.unnormalize(ACTION, trajectory[:, first : first + self.n_action_steps])

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Denoise a normalised trajectory, (B, T, Da), given encoded observations (B, cond_dim)."""
        scheduler = self.noise_scheduler
        if noise is None:
            shape = (len(cond), self.horizon, self.features.action_dim)
            if isinstance(generator, list):
                raise ValueError("one generator for each row needs noise= to start from")
            noise = torch.randn(shape, generator=generator, device=cond.device)
        timesteps, take = start(scheduler, num_inference_steps or self.num_inference_steps)
        unet = self.diffusion.unet
        films = unet.modulation(timesteps.to(cond.device).long(), cond)
        unrolled = unroll(unet, films, self.horizon)
        sample = noise * scheduler.init_noise_sigma
        for number, timestep in enumerate(timesteps):
            noisy = scheduler.scale_model_input(sample, timestep)
            output = unrolled(noisy, number) if unrolled else unet.denoise(noisy, [film[number] for film in films])
            sample = take(output.float(), number, sample, generator)
        return sample
