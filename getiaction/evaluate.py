"""Roll a policy out in its simulator: `python -m getiaction.evaluate checkpoint=RUN_FOLDER episodes=50`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from getiaction.config.compose import main as hydra_main
from getiaction.config.folders import job_folder
from getiaction.config.overrides import command_for
from getiaction.config.schema import EvaluateConfig
from getiaction.simulation.metrics import Summary
from getiaction.startup import release_collector

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, folder: Path) -> Summary:
    """Evaluate what `config` says; write numbers, films and a sheet to `folder`.

    Raises:
        InputError: there is no policy, no simulator for it, or the two do not fit; nothing has been written.
    """
    import torch

    from getiaction.config.evaluation import (
        Evaluation,
        build_environment,
        check_environment,
        check_evaluate,
        find_env,
        measure_latency,
        say,
    )
    from getiaction.config.precision import allow_tf32, autocast, choose_precision
    from getiaction.config.record import describe_machine, pick_device
    from getiaction.config.sampling import change_action_steps, change_scheduler, check_steps
    from getiaction.files import claimed
    from getiaction.interop.lerobot import find_policy_folder, load_policy
    from getiaction.simulation.evaluation import Crowd

    check_evaluate(config)
    device = pick_device(config.device)
    pretrained = find_policy_folder(config.checkpoint)
    env = config.env if config.env is not None else find_env(pretrained)
    make = build_environment(env)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    allow_tf32(config.tf32)
    policy = load_policy(pretrained, device=device)
    environment = check_environment(make, policy.features)
    if config.scheduler is not None:
        change_scheduler(policy, config.scheduler)
    check_steps(policy, config.num_inference_steps)
    if config.n_action_steps is not None:
        change_action_steps(policy, config.n_action_steps)
    precision = choose_precision(config.mixed_precision, device.type)
    log.info("policy: %s, sees %s", pretrained, ", ".join(policy.features.observation_keys))
    evaluation = Evaluation(
        env,
        range(config.seed, config.seed + config.episodes),
        Crowd(config.num_envs, config.num_workers),
        batch_size=config.batch_size,
        num_inference_steps=config.num_inference_steps,
        mixed_precision=precision,
        videos=config.videos,
    )
    with autocast(precision, device):
        latency = measure_latency(policy, environment, config.num_inference_steps)
    described = {"checkpoint": str(pretrained), "latency_ms": latency, **describe_machine(device)}
    release_collector()
    with claimed(folder):
        summary = evaluation.run(policy, folder, described)
    log.info("%s; one action chunk takes %.0f ms", say(summary), latency)
    log.info("results: %s", folder)
    return summary


def run_hydra_job(config: EvaluateConfig) -> float:
    """Evaluate under Hydra; return the score, which a sweep may maximise."""
    folder = job_folder(config.output_dir)
    try:
        return evaluate(config, folder).score.mean
    except KeyboardInterrupt:
        log.info("stopped; what ended is kept. To go on: %s", command_for("evaluate", sys.argv[1:], folder))
        sys.exit(130)


def main() -> None:
    """Run as a command."""
    hydra_main(run_hydra_job, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
