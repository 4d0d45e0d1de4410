"""Check a config's noise: does training reach what acting starts from, can the sampler denoise it?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from getiaction.config.build import build_noise_scheduler
from getiaction.config.problems import Problem
from getiaction.config.sampling import few_steps
from getiaction.config.schema import Config
from getiaction.policy.noising import Noising

SOLVERS = ("DPMSolver", "UniPC")  # multistep solvers, which divide by the distance between steps
NOISE_REACHED = 0.02  # largest cumulative alpha at the last step that still counts as noise


def check_noise(config: Config) -> Iterator[Problem]:
    """Check the noise schedule, the steps of the sampler, and what counts in the loss."""
    noise_scheduler = build_noise_scheduler(config)
    try:
        noising = Noising(noise_scheduler, config.scheduler.get("prediction_type"))
    except ValueError as error:
        yield Problem(str(error))
        return
    if not adds_noise(noising):
        scheduler = config.scheduler
        yield Problem(
            f"scheduler.beta_schedule={scheduler.get('beta_schedule')} with scheduler.beta_start="
            f"{scheduler.get('beta_start')} and scheduler.beta_end={scheduler.get('beta_end')} must add some noise at "
            "each step, and not more than all: use betas of 1e-6 to 1, or scheduler.beta_schedule=squaredcos_cap_v2"
        )
        return
    yield from check_sampler(config, noise_scheduler)
    yield from check_start(config, noise_scheduler, noising)
    if config.scheduler.get("clip_sample") and config.policy.normalization.action != "min_max":
        yield Problem(
            f"scheduler.clip_sample=true clips actions to {config.scheduler.get('clip_sample_range', 1.0)}, but "
            f"policy.normalization.action={config.policy.normalization.action} reaches further: use min_max, or "
            "scheduler.clip_sample=false",
            is_error=False,
        )


def adds_noise(noising: Noising) -> bool:
    """Tell whether each step adds some noise, and keeps a share of the actions that is a number."""
    return bool((noising.signal.isfinite() & (noising.noise > 0)).all())


def check_sampler(config: Config, noise_scheduler: Any) -> Iterator[Problem]:
    """Check that the sampler can denoise in the steps that it is given."""
    asked, steps = config.policy.num_inference_steps, int(noise_scheduler.config.num_train_timesteps)
    taken = asked or steps
    if taken > steps:
        yield Problem(
            f"policy.num_inference_steps={asked} must be at most scheduler.num_train_timesteps={steps}: use "
            f"policy.num_inference_steps={steps}, or null"
        )
    name = type(noise_scheduler).__name__
    if name.startswith(SOLVERS) and taken >= steps > 1:
        yield Problem(
            f"policy.num_inference_steps={asked} of scheduler.num_train_timesteps={steps}: {name} takes a step twice "
            f"there, and acts with NaN: use policy.num_inference_steps={max(steps // 5, 1)}"
        )
    elif 1 <= taken <= steps and (problem := few_steps(noise_scheduler, taken, "policy.num_inference_steps")):
        yield problem


def check_start(config: Config, noise_scheduler: Any, noising: Noising) -> Iterator[Problem]:
    """Check that training sees the noise which acting starts from, and that it counts."""
    scheduler, weighting = config.scheduler, config.policy.loss_weighting
    weight = Noising(noise_scheduler, scheduler.get("prediction_type"), weighting).weight
    if float(weight[-1]) == 0:
        yield Problem(
            f"policy.loss_weighting={weighting} with scheduler={type(noise_scheduler).__name__} leaves pure noise, "
            "which acting starts from, out of training: use policy.loss_weighting=none",
            is_error=False,
        )
    alpha = float(noising.signal[-1]) ** 2
    if alpha > NOISE_REACHED:
        yield Problem(
            f"scheduler.beta_schedule={scheduler.get('beta_schedule')} over scheduler.num_train_timesteps="
            f"{noise_scheduler.config.num_train_timesteps} ends at cumulative alpha {alpha:.2f}, above "
            f"{NOISE_REACHED}: training never sees the noise that acting starts from; use "
            "scheduler.beta_schedule=squaredcos_cap_v2",
            is_error=False,
        )
