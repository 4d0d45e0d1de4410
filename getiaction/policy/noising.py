"""Mix actions with noise, for training: how much of each at every step, what the network is asked for, how it counts.

At step t a trajectory x becomes s(t) x + n(t) z, z standard normal. DDPM and its kin have s = sqrt(alpha), n = sqrt(1 -
alpha), alpha the cumulative product; flow matching goes straight from one to the other, s = 1 - sigma, n = sigma.
Source: Ho et al., arXiv:2006.11239; flow matching: Lipman et al., arXiv:2210.02747, Liu et al., arXiv:2209.03003.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

FLOW = "flow_prediction"
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", FLOW)
LOSS_WEIGHTINGS = ("none", "min_snr")
GAMMA = 5.0  # where the signal-to-noise ratio stops counting for more; the paper's value


class Noising(nn.Module):
    """Hold the tables of a noise scheduler, one entry a step, (S,) each.

    Args:
        scheduler: a diffusers scheduler with `alphas_cumprod`, or one of flow matching, fresh.
        prediction_type: epsilon (the noise), sample (the actions), v_prediction, or flow_prediction (noise - actions);
            None takes the scheduler's.
        loss_weighting: none, or min_snr (Hang et al., arXiv:2303.09556): errors count as those of the actions do, by
            the signal-to-noise ratio, up to `GAMMA`.

    Raises:
        ValueError: the scheduler has no such tables, or it cannot be asked for this.
    """

    signal: Tensor
    noise: Tensor
    times: Tensor
    weight: Tensor

    def __init__(self, scheduler: Any, prediction_type: str | None = None, loss_weighting: str = "none") -> None:
        super().__init__()
        flows = is_flow(scheduler)
        self.prediction_type = prediction_type or scheduler.config.get("prediction_type", FLOW)
        self.loss_weighting = loss_weighting
        kinds = ("sample", FLOW) if flows else PREDICTION_TYPES[:3]
        if self.prediction_type not in kinds:
            raise ValueError(
                f"scheduler.prediction_type={self.prediction_type} means nothing to {type(scheduler).__name__}: use "
                + " or ".join(kinds)
            )
        if loss_weighting not in LOSS_WEIGHTINGS:
            raise ValueError(f"policy.loss_weighting={loss_weighting} must be one of {', '.join(LOSS_WEIGHTINGS)}")
        signal, noise, times = flow_tables(scheduler) if flows else diffusion_tables(scheduler)
        snr = (signal / noise) ** 2
        counts = torch.ones_like(snr)
        if loss_weighting == "min_snr":  # times k squared, where an error e in the target is k e in the actions
            by_type = {"epsilon": 1 / snr.clamp_min(1e-12), "sample": counts}
            counts = snr.clamp_max(GAMMA) * by_type.get(self.prediction_type, noise**2)
        for name, table in {"signal": signal, "noise": noise, "times": times, "weight": counts}.items():
            self.register_buffer(name, table.clone(), persistent=False)

    def mix(self, actions: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy actions, (B, T, Da) as both, at the steps (B,)."""
        signal, amount = self.signal[timesteps][:, None, None], self.noise[timesteps][:, None, None]  # (B, 1, 1)
        return signal * actions + amount * noise

    def target(self, actions: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should say, (B, T, Da)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return actions
        if self.prediction_type == FLOW:
            return noise - actions
        signal, amount = self.signal[timesteps][:, None, None], self.noise[timesteps][:, None, None]  # (B, 1, 1)
        return signal * noise - amount * actions  # v: Salimans & Ho, arXiv:2202.00512


def is_flow(scheduler: Any) -> bool:
    """Tell whether a scheduler is one of flow matching: it knows the share of noise only, sigma."""
    return not hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "sigmas")


def diffusion_tables(scheduler: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return signal, noise, and the times that the network is told, (S,) each."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(f"scheduler={type(scheduler).__name__} has neither alphas_cumprod nor sigmas")
    alphas = alphas.float()
    return alphas.sqrt(), (1 - alphas).sqrt(), torch.arange(len(alphas), device=alphas.device)


def missed_noise(scheduler: Any, num_inference_steps: int) -> float:
    """Return by how much the cumulative alpha at the first denoising step is above that at the schedule's end.

    Spaced from the schedule's beginning ("leading", diffusers' usual), few steps begin in its middle, where they take
    pure noise for half-denoised actions. 0 for flow matching, which begins with noise.
    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, section 3.3.
    """
    if is_flow(scheduler):
        return 0.0
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    alphas = scheduler.alphas_cumprod
    return float(alphas[int(scheduler.timesteps[0])] - alphas[-1])


def flow_tables(scheduler: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return signal, noise, and times for flow matching, from little noise to much, as for diffusion."""
    sigmas = scheduler.sigmas.float().flip(0)  # (S,)
    return 1 - sigmas, sigmas, sigmas * scheduler.config.num_train_timesteps
