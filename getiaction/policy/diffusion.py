"""Diffusion Policy: the loss that trains it and the sampler that acts.

From a batch to a loss: normalise, encode the observations, add noise to the actions, predict it, compare.
Source: Chi et al., "Diffusion Policy", arXiv:2303.04137; DDPM: Ho et al., arXiv:2006.11239.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from getiaction.keys import ACTION, ACTION_IS_PAD, OBS_ENV_STATE, OBS_STATE
from getiaction.policy.encoder import ImageEncoder
from getiaction.policy.fast.casts import cast_ahead, cast_once
from getiaction.policy.fast.replay import LOCK, launching
from getiaction.policy.fast.replays import Replays, can_replay
from getiaction.policy.fast.unroll import unroll
from getiaction.policy.fast.watch import is_watched
from getiaction.policy.features import Features
from getiaction.policy.noising import Noising
from getiaction.policy.normalizer import Normalizer
from getiaction.policy.steps import Generators, Noise, draw_all, known_steps, start
from getiaction.policy.unet import ConditionalUnet1d


class DiffusionModel(nn.Module):
    """Hold the two networks under LeRobot's names: `rgb_encoder` (one, or one per camera) and `unet`."""

    rgb_encoder: nn.ModuleList | ImageEncoder
    unet: ConditionalUnet1d


class DiffusionPolicy(nn.Module):
    """Predict action sequences by denoising, conditioned on To observation steps.

    Args:
        features: what the policy sees and does.
        normalizer: brings batches to the network's range.
        noise_scheduler: a diffusers scheduler with `alphas_cumprod` (DDPM, DDIM, DPM-Solver, ...), or flow matching's.
        encoder: makes an encoder from an image shape, `partial(ImageEncoder, resnet="resnet18")`; None without cameras.
        unet: makes the U-Net from `action_dim` and `cond_dim`.
        n_obs_steps: To.
        horizon: T, counted from the first observation.
        n_action_steps: Ta, executed from the last observation on; at most T - To + 1.
        num_inference_steps: denoising steps when acting; None means all of them.
        use_separate_rgb_encoder_per_camera: one encoder for each camera, or one shared.
        do_mask_loss_for_padding: leave actions past the episode's end out of the loss.
        drop_n_last_frames: frames at each episode's end that start no sample in training, remembered for who trains the
            policy further; None means as many as keep the executed actions of all others within the episode.
        prediction_type, loss_weighting: as `Noising` takes them.

    Raises:
        ValueError: the parts do not fit each other.
    """

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
        drop_n_last_frames: int | None = None,
        prediction_type: str | None = None,
        loss_weighting: str = "none",
    ) -> None:
        super().__init__()
        self.features, self.normalizer, self.noise_scheduler = features, normalizer, noise_scheduler
        self.n_obs_steps, self.horizon, self.n_action_steps = n_obs_steps, horizon, n_action_steps
        self.num_train_timesteps = int(noise_scheduler.config.num_train_timesteps)
        self.num_inference_steps = num_inference_steps or self.num_train_timesteps
        self.use_separate_rgb_encoder_per_camera = use_separate_rgb_encoder_per_camera
        self.do_mask_loss_for_padding = do_mask_loss_for_padding
        within = horizon - n_action_steps - n_obs_steps + 1
        if within < 0 or n_action_steps < 1:
            raise ValueError(
                f"n_action_steps={n_action_steps} must be 1 to horizon - n_obs_steps + 1 = {horizon - n_obs_steps + 1}"
            )
        self.drop_n_last_frames = within if drop_n_last_frames is None else drop_n_last_frames
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
        if horizon % (factor := getattr(self.diffusion.unet, "time_factor", 1)):
            raise ValueError(f"horizon={horizon} must be divisible by {factor}, which its U-Net halves it by")
        self.noising = Noising(noise_scheduler, prediction_type, loss_weighting)
        self.cuda_graphs, self._replays = True, Replays()

    @property
    def device(self) -> torch.device:
        """Return where the policy lies."""
        return self.noising.signal.device

    @property
    def prediction_type(self) -> str:
        """Return what the U-Net predicts."""
        return self.noising.prediction_type

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
            noise: (B K, T, Da), standard normal: K draws for each sample, one sample's after the other's.
            timesteps: (B K,) integers in [0, num_train_timesteps).
        """
        with cast_ahead(self, self.device):
            return self._loss(self.normalizer(batch, skip=self._left_to_encoders(batch)), noise, timesteps)

    def _left_to_encoders(self, batch: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the cameras whose uint8 pictures their own encoder normalises: in training on a GPU."""
        cameras = self.features.cameras
        learns = self.device.type == "cuda" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        alone = len(cameras) == 1 or self.use_separate_rgb_encoder_per_camera
        if not (learns and alone) or is_watched(self.normalizer, *self.encoders):
            return ()
        return tuple(camera for camera in cameras if batch[camera].dtype == torch.uint8)

    def _loss(self, batch: Mapping[str, Tensor], noise: Tensor, timesteps: Tensor) -> Tensor:
        actions, is_pad, cond = batch[ACTION], batch[ACTION_IS_PAD], self.encode(batch)  # (B, T, Da), (B, T), (B, ...)
        if (draws := len(noise) // len(actions)) > 1:  # the observations are encoded once for all K
            actions, is_pad, cond = (part.repeat_interleave(draws, dim=0) for part in (actions, is_pad, cond))
        noisy_actions = self.noising.mix(actions, noise, timesteps)
        prediction = self.diffusion.unet(noisy_actions, self.noising.times[timesteps], cond)
        target = self.noising.target(actions, noise, timesteps)
        loss = functional.mse_loss(prediction.float(), target, reduction="none")  # (B K, T, Da)
        if self.training and self.noising.loss_weighting != "none":  # validation stays comparable
            loss = loss * self.noising.weight[timesteps][:, None, None]
        if not self.do_mask_loss_for_padding:
            return loss.mean()
        valid = (~is_pad)[:, :, None].expand_as(loss)
        return (loss * valid).sum() / valid.sum().clamp_min(1)

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Encode normalised observations, (B, To, ...) each, into one vector (B, cond_dim).

        Pictures may be as recorded, uint8, where each camera has an encoder of its own.
        """
        parts = [batch[OBS_STATE]] if OBS_STATE in self.features.vectors else []
        if self.encoders:
            parts.append(self._encode_images([batch[camera] for camera in self.features.cameras]))
        if OBS_ENV_STATE in self.features.vectors:
            parts.append(batch[OBS_ENV_STATE])
        return torch.cat([part.flatten(2) for part in parts], dim=-1).flatten(1)

    def _encode_images(self, cameras: list[Tensor]) -> Tensor:
        """Encode N cameras, (B, To, C, h, w) each, into (B, To, N * feature_dim)."""
        steps, names = cameras[0].shape[1], list(self.features.cameras)
        if self.use_separate_rgb_encoder_per_camera:
            each = zip(self.encoders, names, cameras, strict=True)
            encoded = [self._encode_by(encoder, name, images.flatten(0, 1)) for encoder, name, images in each]
            return rearrange(torch.stack(encoded), "n (b s) f -> b s (n f)", s=steps)
        images = cameras[0] if len(cameras) == 1 else torch.stack(cameras, dim=2).flatten(1, 2)  # (B, To N, C, h, w)
        if len(cameras) > 1 and images.dtype == torch.uint8:
            raise ValueError(f"{', '.join(names)} share an encoder, so their pictures must be normalised before")
        encoded_all = self._encode_by(self.encoders[0], names[0], images.flatten(0, 1))  # (B To N, F)
        return rearrange(encoded_all, "(b s n) f -> b s (n f)", s=steps, n=len(cameras))

    def _encode_by(self, encoder: ImageEncoder, camera: str, images: Tensor) -> Tensor:
        """Encode one camera's pictures, (B, C, h, w), normalised or uint8, into (B, feature_dim)."""
        if images.dtype == torch.uint8:
            return cast(Tensor, encoder(images, self.normalizer.ranges(camera)))
        return cast(Tensor, encoder(images))

    # --- acting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_action_chunk(
        self,
        observations: Mapping[str, Tensor],
        *,
        noise: Tensor | None = None,
        generator: Generators = None,
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

        On a CUDA GPU, calls of one shape are replayed as a CUDA graph from the third on (see `fast.replays`), unless
        `cuda_graphs` is set to False.
        """
        steps = num_inference_steps or self.num_inference_steps
        seen = tuple(observations[key] for key in self.features.observation_keys)
        known = known_steps(self.noise_scheduler, steps, self.prediction_type)
        if known is None or not self.cuda_graphs or not can_replay(self, seen):
            return self.act_on(self.prepare(observations), noise=noise, generator=generator, num_inference_steps=steps)
        noisy = sum(step.s != 0 for step in known[1])

        def make() -> Callable[..., Tensor]:
            times = known[0].to(self.device)  # a graph cannot copy them from the host
            policy = weakref.proxy(self)

            def act(noise: Tensor, step_noise: Tensor, *seen: Tensor) -> Tensor:
                prepared = policy.prepare(dict(zip(policy.features.observation_keys, seen, strict=True)))
                cond = policy.encode(policy.normalizer(prepared))
                return policy.executed(policy.sample(cond, noise, step_noise, steps, times))

            return act

        kind = (self.noise_scheduler, steps, self.prediction_type, self.n_obs_steps, self.n_action_steps)
        with LOCK:
            noise = self._draw(len(seen[0]), generator) if noise is None else noise.to(self.device)
            step_noise = draw_all(noise, noisy, generator) if noisy else noise[:0]
            return self._replays(self, kind, make, (noise, step_noise, *seen))

    def prepare(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Resize and centre-crop recorded pictures, as training batches already are; keep the policy's inputs only.

        Args:
            observations: key -> (B, To, ...), raw units; pictures (B, To, C, H, W), uint8 or in [0, 1].

        Returns:
            The same, pictures (B, To, C, h, w) in [0, 1].
        """
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
        generator: Generators = None,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Do what `predict_action_chunk` does, for observations that are resized and cropped already."""
        with launching(self.device):
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
        generator: Noise = None,
        num_inference_steps: int | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """Denoise a normalised trajectory, (B, T, Da), given encoded observations (B, cond_dim).

        Args:
            noise: (B, T, Da), what denoising starts from; None draws it.
            generator: of that noise and of what the sampler adds; or one for each row; or all that it adds, drawn
                already, (steps that draw noise, B, T, Da).
            num_inference_steps: None: the policy's own.
            times: what `steps.start` returns, on the device already.
        """
        scheduler, steps = self.noise_scheduler, num_inference_steps or self.num_inference_steps
        if noise is None:
            noise = self._draw(len(cond), generator)
        timesteps, take = start(scheduler, steps, self.prediction_type)
        unet = self.diffusion.unet
        times = timesteps.to(cond.device) if times is None else times
        unrolled = unroll(unet, times, cond, self.horizon)
        films = [] if unrolled else unet.modulation(times, cond)
        scale = getattr(scheduler, "scale_model_input", None)  # flow matching needs none
        sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        with cast_once() if cond.device.type == "cuda" else contextlib.nullcontext():
            for number, timestep in enumerate(timesteps):
                noisy = scale(sample, timestep) if scale else sample
                output = unrolled(noisy, number) if unrolled else unet.denoise(noisy, [film[number] for film in films])
                sample = take(output.float(), number, sample, generator)
        return sample

    def _draw(self, count: int, generator: Noise) -> Tensor:
        """Draw what to start denoising from, (B, T, Da)."""
        if isinstance(generator, list | Tensor):
            raise ValueError("one generator for each row needs noise= to start from")
        shape = (count, self.horizon, self.features.action_dim)
        return torch.randn(shape, generator=generator, device=self.device)
