"""Assemble an evaluation: policy, environment, episodes, and what is written of them."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from getiaction.config.build import build_group
from getiaction.config.precision import CHOICES, autocast, rounding
from getiaction.config.schema import EvaluateConfig
from getiaction.config.trust import unknown_targets
from getiaction.errors import InputError
from getiaction.interop.description import describe
from getiaction.interop.weights import fingerprint
from getiaction.keys import is_camera
from getiaction.policy import BatchedActor, DiffusionPolicy, Features
from getiaction.report.evaluation import NUMBERS, draw_sheet, film, write_numbers
from getiaction.run_folder import CONFIG, run_of
from getiaction.simulation.environment import Environment
from getiaction.simulation.evaluation import Crowd, EpisodeLog, run_episodes
from getiaction.simulation.metrics import Summary, summarize
from getiaction.simulation.rollout import MakeEnvironment

log = logging.getLogger(__name__)
NO_SIMULATOR = "env=none: there is no simulator for this data"


@dataclass(frozen=True)
class Evaluation:
    """Say which episodes to run, and how.

    Args:
        env: the config of the environment, a leaf of `conf/env/`.
        seeds: one per episode.
        batch_size: rows of one call of the policy; None: by device.
        num_inference_steps: None: the policy's own.
        mixed_precision: "no", "bf16" or "fp16".
        videos: film three episodes and draw how all ended.
        anew: move what a folder holds of another evaluation aside, instead of refusing the folder.
    """

    env: Mapping[str, Any]
    seeds: range
    crowd: Crowd
    batch_size: int | None = None
    num_inference_steps: int | None = None
    mixed_precision: str = "no"
    videos: bool = True
    anew: bool = False

    def run(
        self,
        policy: DiffusionPolicy,
        folder: Path,
        described: Mapping[str, Any],
        stopping: Callable[[], int] = lambda: 0,
    ) -> Summary:
        """Roll the policy out and write `folder`: episodes as they end, then numbers, sheet and films.

        Raises:
            Stopped: `stopping`, asked now and then, said so, here or on another rank.
        """
        make = build_environment(self.env)
        act = BatchedActor(policy, batch_size=self.batch_size, num_inference_steps=self.num_inference_steps)
        identity = self.identify(policy, act)
        writes = self.crowd.team.rank == 0
        kept = EpisodeLog(folder / "episodes.jsonl" if writes else None, identity, anew=self.anew)
        before, start = len(kept.episodes), time.perf_counter()
        with autocast(self.mixed_precision, act.device):
            episodes = run_episodes(
                act,
                make,
                kept,
                self.seeds,
                keys=policy.features.observation_keys,
                n_obs_steps=policy.n_obs_steps,
                batch_size=act.batch_size,
                crowd=self.crowd,
                stopping=stopping,
            )
        added, minutes = len(kept.episodes) - before, (time.perf_counter() - start) / 60
        rate = added / minutes if added else rate_before(folder)
        if added:
            log.info("%.0f episodes/min", rate)
        summary = summarize(episodes)
        if not writes:
            return summary
        write_numbers(folder, summary, episodes, {**identity, "episodes_per_minute": rate, **described})
        if self.videos:
            environment = make()
            draw_sheet(folder, environment, episodes)
            film(folder, environment, episodes)
        return summary

    def identify(self, policy: DiffusionPolicy, act: BatchedActor) -> dict[str, Any]:
        """Return all that the result depends on but the seeds: episodes of another are not mixed with these."""
        described = describe(policy)
        return {
            "weights": fingerprint(policy.state_dict()),
            **{key: described[key] for key in ("policy", "scheduler", "normalization")},
            "env": dict(self.env),
            "batch_size": act.batch_size,
            "num_inference_steps": self.num_inference_steps or policy.num_inference_steps,
            "device": act.device.type,
            **rounding(self.mixed_precision, act.device.type),
        }


def rate_before(folder: Path) -> float | None:
    """Return the episodes per minute of an evaluation that was complete already; None if it did not say."""
    path = folder / NUMBERS
    return json.loads(path.read_text()).get("episodes_per_minute") if path.exists() else None


def build_environment(env: Mapping[str, Any]) -> MakeEnvironment:
    """Return what makes an environment of this config.

    Raises:
        InputError: it names none, or cannot be built.
    """
    if env.get("_target_") is None:
        raise InputError(f"{NO_SIMULATOR}; a policy can be evaluated where there is one, env=pusht")
    return build_group("env", {**env, "_convert_": "all"})


def check_environment(make: MakeEnvironment, features: Features) -> Environment:
    """Check that an environment shows what a policy needs, and takes what it does; return one.

    Raises:
        InputError: it cannot be built; an observation is missing or has another shape, or the actions differ.
    """
    try:
        environment = make()
    except (TypeError, ValueError) as error:
        raise InputError(f"env cannot be built: {error}") from error
    has = environment.observation_shapes
    if missing := [key for key in features.observation_keys if key not in has]:
        raise InputError(
            f"the policy needs {', '.join(missing)}, env={environment.name} shows {', '.join(has)}: evaluate it in the "
            "environment that its data come from, or leave that observation out of training (dataset.observations)"
        )
    for key in features.observation_keys:
        if tuple(has[key]) != tuple(features.shapes[key]):
            size = f": use env.image_size={list(features.shapes[key][1:])}" if is_camera(key) else ""
            raise InputError(
                f"{key} is {has[key]} in env={environment.name}, the policy needs {features.shapes[key]}{size}"
            )
    if environment.action_dim != features.action_dim:
        raise InputError(
            f"env={environment.name} takes actions of {environment.action_dim} numbers, the policy makes "
            f"{features.action_dim}: evaluate it in the environment that its data come from"
        )
    return environment


def check_evaluate(config: EvaluateConfig) -> None:
    """Check the numbers of an evaluation.

    Raises:
        InputError: all errors, one a line.
    """
    least = {"episodes": 1, "seed": 0, "num_envs": 1, "num_workers": 0, "num_inference_steps": 1, "num_threads": 1}
    values = {key: getattr(config, key) for key in least}
    problems = [
        f"{key}={value} must be a whole number of at least {least[key]}"
        for key, value in values.items()
        if value is not None and value < least[key]
    ]
    if config.batch_size is not None and (config.batch_size < 1 or config.batch_size % 16):
        problems.append(f"batch_size={config.batch_size} must be a multiple of 16, or rows would not all be equal")
    if config.mixed_precision not in CHOICES:
        problems.append(f"mixed_precision={config.mixed_precision} must be one of {', '.join(CHOICES)}")
    if problems:
        raise InputError("\n       ".join(problems))


def find_env(pretrained: Path) -> dict[str, Any]:
    """Return the environment that the run of a policy folder names in its `config.yaml`.

    Raises:
        InputError: the folder belongs to no run, or to one without a simulator.
    """
    run = run_of(pretrained)
    config = run / CONFIG if run else None
    env = (yaml.safe_load(config.read_text()) or {}).get("env") if config and config.exists() else None
    if env is None:
        raise InputError(f"{pretrained} belongs to no run that names its simulator: say which, env=pusht")
    if env.get("_target_") is None:
        raise InputError(f"{NO_SIMULATOR} ({config}); env=pusht evaluates it there all the same")
    for target in unknown_targets(env).values():  # the run may be somebody else's: nothing of theirs is run
        raise InputError(f"{config} names the simulator {target}, which is not ours: say which, env=pusht")
    return env


def measure_latency(policy: DiffusionPolicy, environment: Environment, num_inference_steps: int | None) -> float:
    """Return the milliseconds that one action chunk for one robot takes, the median of five."""
    environment.reset(0)
    seen = environment.observe(policy.features.observation_keys)
    batch = {
        key: torch.from_numpy(np.stack([value] * policy.n_obs_steps)[None]).to(policy.device)
        for key, value in seen.items()
    }  # (1, To, ...)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        policy.predict_action_chunk(batch, num_inference_steps=num_inference_steps).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) * 1e3  # the first one warms up


def say(summary: Summary) -> str:
    """Return the line that people read."""
    means = ", ".join(f"max {name} {value}" for name, value in summary.largest.items())
    return (
        f"{summary.episodes} episodes: score A {summary.score}, success B {summary.success}, {means}, "
        f"{summary.length.mean:.0f} steps"
    )


def flat(summary: Summary) -> dict[str, float]:
    """Return score and success with their intervals, as columns of metrics."""
    found = {"score": summary.score, "success": summary.success}
    columns = {f"{name}_{end}": asdict(value)[end] for name, value in found.items() for end in ("low", "high")}
    return {name: value.mean for name, value in found.items()} | columns
