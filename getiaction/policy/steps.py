"""Take a denoising step of DDPM, DDIM or flow matching with coefficients that were computed beforehand.

All estimate the clean sample, clip it, and mix it with what they had: with x the noisy sample and m the network's
output, x0 = clip(a x + b m) and the next sample is c x0 + d x + e m + s z, z standard normal. diffusers computes the
six numbers again at every step, on tensors of one element, which can take as long as a small network.
Source: DDPM: Ho et al., arXiv:2006.11239, formula 7; DDIM: Song et al., arXiv:2010.02502, formula 12; flow matching
(Euler's method): Liu et al., arXiv:2209.03003.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from getiaction.policy.noising import FLOW, is_flow

Generators = torch.Generator | list[torch.Generator] | None
Noise = Generators | Tensor  # where it comes from; or all of it, (steps that add noise, B, T, Da)
Take = Callable[[Tensor, int, Tensor, Noise], Tensor]
EULER = "FlowMatchEulerDiscreteScheduler"  # by name: importing it brings in SciPy's statistics, which take a second
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


@dataclass(frozen=True)
class Step:
    """Hold the numbers of one step: x0 = clip(a x + b m), the next sample c x0 + d x + e m + s z."""

    a: float
    b: float
    c: float
    d: float
    e: float
    s: float

    def take(self, output: Tensor, sample: Tensor, clip: float | None, noise: Tensor | None) -> Tensor:
        """Return the next sample, (B, T, Da) as all of them; `noise` is needed where `s` is not 0."""
        clean = output if self.a == 0 and self.b == 1 else torch.add(sample * self.a, output, alpha=self.b)
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        following = clean * self.c
        for part, weight in ((sample, self.d), (output, self.e), (noise, self.s)):
            if weight:
                assert part is not None
                following = torch.add(following, part, alpha=weight)
        return following


def start(scheduler: Any, num_inference_steps: int, prediction_type: str | None = None) -> tuple[Tensor, Take]:
    """Return the times to denoise at, (S,), and what takes the steps: from (output, number, sample, generator).

    Args:
        prediction_type: what the network says; None takes the scheduler's. Only flow matching lets it be another.

    Raises:
        ValueError: the scheduler takes steps of its own, which cannot use such a prediction.
    """
    if (steps := known_steps(scheduler, num_inference_steps, prediction_type)) is not None:
        timesteps, known = steps
        clip, noisy = clip_of(scheduler), sum(step.s != 0 for step in known)
        ahead: list[Tensor] = []  # noise of the steps that are left

        def take_known(output: Tensor, number: int, sample: Tensor, generator: Noise) -> Tensor:
            step, noise = known[number], None
            if step.s and isinstance(generator, list | Tensor):
                if not ahead:
                    drawn = generator if isinstance(generator, Tensor) else draw_all(output, noisy, generator)
                    ahead.extend(drawn.unbind(0))
                noise = ahead.pop(0)
            elif step.s:
                assert not isinstance(generator, list | Tensor)
                noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
            return step.take(output, sample, clip, noise)

        return timesteps, take_known
    if is_flow(scheduler) and prediction_type not in (None, FLOW):
        kind = type(scheduler).__name__
        raise ValueError(f"{kind} steps along a velocity only, not prediction_type={prediction_type}")
    scheduler.set_timesteps(num_inference_steps)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def take(output: Tensor, number: int, sample: Tensor, generator: Noise) -> Tensor:
        extra = {"generator": generator} if takes_generator else {}
        return scheduler.step(output, scheduler.timesteps[number], sample, **extra).prev_sample

    return scheduler.timesteps, take


def draw_all(like: Tensor, count: int, generator: Generators) -> Tensor:
    """Draw the noise of `count` steps, each like `like` (B, T, Da): the numbers that would come step by step.

    Those of a generator for each row come to the device in one copy: the host would wait for one at each step.
    """
    if not isinstance(generator, list):
        drawn = [randn_tensor(like.shape, generator, like.device, like.dtype) for _ in range(count)]
        return torch.stack(drawn)

    def one_row(draw: torch.Generator) -> Tensor:  # (T, Da)
        return torch.randn(like.shape[1:], generator=draw, device=draw.device, dtype=like.dtype)

    rows = [torch.stack([one_row(draw) for draw in generator]) for _ in range(count)]  # count x (B, T, Da)
    return torch.stack(rows).to(like.device)


def clip_of(scheduler: Any) -> float | None:
    """Return where DDPM or DDIM clips the clean sample, or None."""
    return float(scheduler.config.clip_sample_range) if scheduler.config.get("clip_sample") else None


@lru_cache(maxsize=16)
def known_steps(
    scheduler: Any, num_inference_steps: int, prediction_type: str | None = None
) -> tuple[Tensor, list[Step]] | None:
    """Return the times to denoise at, (S,), and their numbers; None for a scheduler of another form."""
    kind, config = type(scheduler), scheduler.config
    if kind.__name__ == EULER:
        return None if config.stochastic_sampling else flow_steps(scheduler, num_inference_steps, prediction_type)
    if kind not in (DDPMScheduler, DDIMScheduler) or config.thresholding:
        return None
    if kind is DDPMScheduler and config.variance_type not in VARIANCES:
        return None
    scheduler = copy.copy(scheduler)  # its state is not ours to change: other threads may ask, too
    scheduler.set_timesteps(num_inference_steps)
    alphas, timesteps = scheduler.alphas_cumprod.double(), scheduler.timesteps.cpu().long()
    steps = []
    for t in timesteps.tolist():
        alpha = float(alphas[t])
        if kind is DDPMScheduler:
            before = int(scheduler.previous_timestep(t))
            alpha_before = float(alphas[before]) if before >= 0 else 1.0
            steps.append(ddpm_step(alpha, alpha_before, config.prediction_type, config.variance_type, is_last=t == 0))
        else:
            before = t - config.num_train_timesteps // num_inference_steps
            alpha_before = float(alphas[before] if before >= 0 else scheduler.final_alpha_cumprod)
            steps.append(ddim_step(alpha, alpha_before, config.prediction_type))
    return timesteps, steps


def clean_from(alpha: float, prediction_type: str) -> tuple[float, float]:
    """Return a and b, given the cumulative product of alphas."""
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if prediction_type == "epsilon":
        return 1 / signal, -noise / signal
    return (0.0, 1.0) if prediction_type == "sample" else (signal, -noise)


def ddpm_step(alpha: float, before: float, prediction_type: str, variance_type: str, *, is_last: bool) -> Step:
    """Return DDPM's step from cumulative alpha to the one `before`."""
    a, b = clean_from(alpha, prediction_type)
    kept = alpha / before
    variance = 1 - kept if variance_type == "fixed_large" else max((1 - before) / (1 - alpha) * (1 - kept), 1e-20)
    return Step(
        a=a,
        b=b,
        c=before**0.5 * (1 - kept) / (1 - alpha),
        d=kept**0.5 * (1 - before) / (1 - alpha),
        e=0.0,
        s=0.0 if is_last else variance**0.5,
    )


def ddim_step(alpha: float, before: float, prediction_type: str) -> Step:
    """Return DDIM's step, without noise, from cumulative alpha to the one `before`."""
    a, b = clean_from(alpha, prediction_type)
    signal, noise, rest = alpha**0.5, (1 - alpha) ** 0.5, (1 - before) ** 0.5
    if prediction_type == "epsilon":
        d, e = 0.0, 1.0
    else:
        d, e = (1 / noise, -signal / noise) if prediction_type == "sample" else (noise, signal)
    return Step(a=a, b=b, c=before**0.5, d=rest * d, e=rest * e, s=0.0)


def flow_steps(scheduler: Any, num_inference_steps: int, prediction_type: str | None) -> tuple[Tensor, list[Step]]:
    """Return the times and Euler's steps of flow matching, from each share of noise to the next.

    The sample lies on the straight line from the actions to the noise, so the next one divides what lies between.
    """
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    sigmas, steps = scheduler.sigmas.double().tolist(), []
    for sigma, following in itertools.pairwise(sigmas):
        a, b = (0.0, 1.0) if prediction_type == "sample" else (1.0, -sigma)
        steps.append(Step(a=a, b=b, c=1 - following / sigma, d=following / sigma, e=0.0, s=0.0))
    return scheduler.timesteps.cpu(), steps
