"""Assemble a run from a config: data, policy, optimiser, trainer."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from getiaction.config.build import (
    build_features,
    build_lr_scheduler,
    build_mirror,
    build_optimizer,
    build_policy,
    fetch_weights,
)
from getiaction.config.data import build_batches, load_data, split
from getiaction.config.evaluation import Evaluation, build_environment, check_environment, flat, say
from getiaction.config.fine_tuning import check_init_from, start_from
from getiaction.config.memory import check_memory
from getiaction.config.placement import place, replays_steps
from getiaction.config.precision import allow_tf32, choose_precision
from getiaction.config.problems import report
from getiaction.config.record import describe_machine
from getiaction.config.schema import Config, EvaluationConfig
from getiaction.config.sweep import in_sweep
from getiaction.data.episodes import Episodes
from getiaction.data.mixture import Mixture
from getiaction.data.statistics import compute_statistics
from getiaction.errors import InputError
from getiaction.interop.lerobot import write_policy
from getiaction.interop.lerobot_files import not_for_lerobot
from getiaction.policy import DiffusionPolicy
from getiaction.policy.fast.casts import keep_shadows
from getiaction.run_folder import CHECKPOINTS, EVALUATION
from getiaction.simulation.evaluation import Crowd, Stopped
from getiaction.training.checkpoint import CheckpointStore, point_last_at, read_average, read_state
from getiaction.training.ema import Ema
from getiaction.training.heap import keep_freed_memory
from getiaction.training.loop import Plan, Trainer
from getiaction.training.memory_order import update_in_memory_order
from getiaction.training.metrics import MetricsWriter, tracker_setup
from getiaction.training.ranks import Ranks, Watchdog
from getiaction.training.resume import check_resumable, resume
from getiaction.training.stepper import update_many_at_once, writes_casts

log = logging.getLogger(__name__)

DEFAULT_THREADS = torch.get_num_threads()


def start_accelerator(config: Config, folder: Path) -> Accelerator:
    """Set up devices, precision and trackers."""
    hardware = config.hardware
    AcceleratorState._reset_state(reset_partial_state="WORLD_SIZE" not in os.environ)  # a sweep trains several configs
    torch.set_num_threads(hardware.num_threads or DEFAULT_THREADS)  # a sweep may have set it
    allow_tf32(hardware.tf32)
    torch.backends.cudnn.benchmark = True
    if hardware.device == "cpu" and "WORLD_SIZE" in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as `environment_for` does, for who starts them by torchrun himself
    on_cpu = hardware.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu:
        keep_freed_memory()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=choose_precision(
            hardware.mixed_precision, "cpu" if on_cpu else "cuda" if torch.cuda.is_available() else "mps"
        ),
        log_with=tracker_setup(config.tracker.name) or None,
        project_dir=str(folder),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=1)),  # one decodes while the others wait
            DistributedDataParallelKwargs(broadcast_buffers=not hardware.sync_batch_norm),  # they are the same then
        ],
    )
    if config.tracker.name != "local":
        group = config.tracker.group or (folder.parent.name if in_sweep() else None)
        wandb = {"name": folder.name, "entity": config.tracker.entity, "group": group, "dir": str(folder)}
        described = asdict(config) if config.tracker.name == "wandb" else None  # TensorBoard takes no lists
        accelerator.init_trackers(config.tracker.project, config=described, init_kwargs={"wandb": wandb})
    if not accelerator.is_main_process:
        logging.disable(logging.INFO)  # one process speaks for all
    return accelerator


def build_trainer(config: Config, mixture: Mixture, accelerator: Accelerator, folder: Path) -> Trainer:
    """Build everything that a run needs, or bring it back to where it was.

    Raises:
        InputError: the data cannot be read, or are not those of the run that resumes.
    """
    if config.uses_images and fetches_weights(config):
        fetch_weights(config)
    store = CheckpointStore(folder / CHECKPOINTS, write_policy=write_policy, keep=config.training.keep_checkpoints)
    checkpoint = store.newest(log.warning) if config.resumes else None
    state = read_state(checkpoint) if checkpoint else None

    episodes = load_data(config, mixture, accelerator)
    policy = place(new_policy(config, mixture, episodes), config.hardware, accelerator)
    batches, validator = build_batches(config, mixture, episodes, policy, accelerator)
    data = episodes.fingerprint()
    if state:
        check_resumable(state, batches.share, data)

    plan = make_plan(config, batches.order.num_samples, batches.share.global_batch_size)
    optimizer = build_optimizer(config, policy.parameters(), parts=batches.share.parts)
    if accelerator.device.type == "cpu":  # elsewhere its hook would count as a listener: see `Stepper.ahead`
        update_in_memory_order(optimizer)
    ema = Ema(policy, power=config.ema.power, max_decay=config.ema.max_decay) if config.ema.enabled else None
    stepper = None
    if accelerator.device.type == "cuda" and accelerator.num_processes == 1:
        followed = ema.follow(policy, accelerator.device) if ema is not None else None
        casts = accelerator.mixed_precision == "bf16" and not config.hardware.compile and writes_casts(optimizer)
        shadows = keep_shadows(policy, torch.bfloat16) if casts else None
        alone = config.training.gradient_accumulation_steps == 1
        stepper = update_many_at_once(optimizer, followed, shadows, narrow=casts and alone)
    lr_scheduler = build_lr_scheduler(config, optimizer, plan.max_steps)
    if config.hardware.compile:
        torch._dynamo.reset()  # what a sweep compiled before would make this run's sizes symbolic, and it slower
        policy.compile(mode=config.hardware.compile_mode)  # in place: the average was copied before, and keys stay
    metrics = MetricsWriter(folder, accelerator, start_step=state.step if state else 0)
    model, prepared = accelerator.prepare(policy, optimizer)
    trainer = Trainer(
        accelerator=accelerator,
        policy=policy,
        model=model,
        optimizer=prepared,
        lr_scheduler=lr_scheduler,
        batches=batches,
        store=store,
        metrics=metrics,
        plan=plan,
        ema=ema,
        validator=validator,
        evaluate=partial(evaluate_in_training, config, folder) if config.evaluates else None,
        keep_best=config.evaluation.keep_best,
        data=data,
        watchdog=Watchdog(config.hardware.hang_timeout if accelerator.num_processes > 1 else None),
        replays=replays_steps(config.hardware, accelerator),
        stepper=stepper,
        saves_aside=accelerator.device.type == "cuda",  # a CPU has no time for both
    )
    if checkpoint and state:
        resume(trainer, state, read_average(checkpoint))
        if accelerator.is_main_process:
            point_last_at(store.folder, checkpoint.name)  # a kill may have come before
        done = ": nothing is left to do" if state.step >= plan.max_steps else ""
        log.info("resuming %s at step %d of %d%s", folder, state.step, plan.max_steps, done)
    announce(trainer, mixture, episodes, config.optimizer.get("scale_lr", "none"))
    return trainer


def fetches_weights(config: Config) -> bool:
    """Tell whether a run begins with ImageNet's weights, if its backbone names some, and not with a policy's."""
    return not config.resumes and config.training.init_from is None


def new_policy(config: Config, mixture: Mixture, episodes: Episodes) -> DiffusionPolicy:
    """Build the policy that a run begins with; one that resumes gets its weights later."""
    training = episodes.select(split(config, mixture)[0])
    statistics = compute_statistics(training, config.dataset.image_stats, build_mirror(config))
    features = build_features(config, mixture.metadata)
    policy = build_policy(config, features, statistics, fetch_weights=fetches_weights(config))
    if not config.resumes:
        start_from(config, policy)
    if reasons := not_for_lerobot(policy):
        log.warning("warning: checkpoints of this run open here, but not in LeRobot: %s", "; ".join(reasons))
    return policy


def evaluate_in_training(
    config: Config, folder: Path, policy: DiffusionPolicy, step: int, last: bool, stopping: Callable[[], int]
) -> dict[str, float] | None:
    """Roll a policy out as the config says; return its metrics, or None if it was stopped."""
    wanted = config.evaluation
    episodes = final_episodes(wanted) if last else wanted.episodes
    policy = as_saved(policy)
    evaluation = Evaluation(
        config.env,
        range(wanted.seed, wanted.seed + episodes),
        Crowd(wanted.num_envs, wanted.num_workers, Ranks()),
        videos=wanted.videos,
        anew=True,  # a run that goes on elsewhere, or under other rules, begins an evaluation that was stopped again
    )
    results = folder / EVALUATION / f"{step:06d}"
    described = {"step": step, **describe_machine(policy.device)}
    try:
        summary = evaluation.run(policy, results, described, stopping)
    except Stopped:
        return None
    log.info("step %d: %s; films: %s", step, say(summary), results)
    return flat(summary)


def as_saved(policy: DiffusionPolicy) -> DiffusionPolicy:
    """Return the policy that opens from a checkpoint of this one: with the same sums, to the bit."""
    copied = copy.deepcopy(policy)
    for weight in copied.parameters():
        weight.data = weight.data.contiguous()
    return copied


def final_episodes(wanted: EvaluationConfig) -> int:
    """Return how many episodes the last evaluation has."""
    return wanted.episodes if wanted.final_episodes is None else wanted.final_episodes


def check_buildable(config: Config, mixture: Mixture) -> None:
    """Build everything once without memory or data: what a group refuses is an error before anything is decoded.

    Raises:
        InputError: the policy, the optimiser or the simulator cannot be built, or they do not fit.
    """
    features = build_features(config, mixture.metadata)
    policy = build_policy(config, features, {}, fetch_weights=False, device="meta")
    if not config.resumes:
        check_init_from(config, policy)
    if config.evaluates:
        check_environment(build_environment(config.env), features)
    report(list(check_memory(config, policy)), strict=config.strict)
    check_optimizer(config)


def check_optimizer(config: Config) -> None:
    """Take a step with the optimiser and its schedule: some look at what they are given only then.

    Raises:
        InputError: they cannot be built, or take no step.
    """
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = build_optimizer(config, [weight])
    schedule = build_lr_scheduler(config, optimizer, 1)
    try:
        optimizer.step()
        schedule.step()
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"optimizer takes no step with what it is given ({error}): {config.optimizer}") from error


def make_plan(config: Config, samples: int, global_batch_size: int) -> Plan:
    """Turn epochs into steps; with both lengths given, whichever comes first."""
    training = config.training
    steps = [] if training.max_steps is None else [training.max_steps]
    if training.max_epochs is not None:
        steps.append(-(-training.max_epochs * samples // global_batch_size))
    return Plan(
        max_steps=max(min(steps), 1),
        seed=config.seed,
        max_grad_norm=training.max_grad_norm,
        noise_draws=training.noise_draws,
        log_every=training.log_every,
        validate_every=config.validation.every,
        save_every=training.save_every,
        evaluate_every=config.evaluation.every,
        evaluate_last=config.evaluates,
        episodes=config.evaluation.episodes,
        final_episodes=final_episodes(config.evaluation),
        epoch_samples=samples,
    )


def announce(trainer: Trainer, mixture: Mixture, episodes: Episodes, scale_lr: str) -> None:
    """Say in a few lines what is about to happen."""
    policy, batches, plan = trainer.policy, trainer.batches, trainer.plan
    share, device = batches.share, batches.gatherer.device
    parameters = sum(weight.numel() for weight in policy.parameters()) / 1e6
    epochs = plan.max_steps * share.global_batch_size / plan.epoch_samples
    where = "memory-mapped on the host" if batches.gatherer.mapped else f"on {device}"
    sees = ", ".join(policy.features.observation_keys)
    log.info("policy: %.1f M parameters, sees %s", parameters, sees)
    log.info(
        "data: %d frames, %d samples, %.2f GB %s", episodes.num_frames, plan.epoch_samples, episodes.nbytes / 1e9, where
    )
    if len(mixture.sources) > 1:
        measured = trainer.validator.sources if trainer.validator else {}
        for number, (source, share_of) in enumerate(zip(mixture.sources, batches.order.shares, strict=True)):
            own = f", its loss is val_loss_{number}" if number in measured else ""
            count = f"its episodes count from {source.offset}"
            log.info("data: %.0f%% of %s; %s%s", 100 * share_of, source.describe(), count, own)
    split = f"{share.batch_size} per device x {share.processes} processes x {share.accumulation} accumulation"
    rate = f"learning rate {trainer.optimizer.param_groups[0]['initial_lr']:.3g} (optimizer.scale_lr={scale_lr})"
    log.info("batch: %s = %d; %d steps, %.1f epochs; %s", split, share.global_batch_size, plan.max_steps, epochs, rate)
