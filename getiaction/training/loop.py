"""Train: batch, loss, backward, clip, step, EMA, log, validate, save.

What a step sees is a pure function of (seed, step): a run that was killed goes on exactly where its last checkpoint is.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from getiaction.data.batches import TrainingBatches
from getiaction.data.gather import Batch, to_device
from getiaction.errors import TrainingError
from getiaction.policy import DiffusionPolicy
from getiaction.progress import redraw_seconds
from getiaction.random import Purpose, generator
from getiaction.signals import stop_on_signals
from getiaction.training.background import Background, has_room, policy_on_host, state_on_host
from getiaction.training.checkpoint import CheckpointStore, TrainingState
from getiaction.training.clock import Clock, is_due
from getiaction.training.ema import Ema
from getiaction.training.lead import Lead
from getiaction.training.metrics import MetricsWriter, peak_memory
from getiaction.training.ranks import Watchdog, from_main, share_buffers
from getiaction.training.stepper import Stepper
from getiaction.training.update import Part, Update
from getiaction.training.validation import Validator, draw_noise, evaluating

log = logging.getLogger(__name__)
LOWER = "the weights are out of range; lower optimizer.lr, or clip: training.max_grad_norm=10.0"
AGREE_EVERY = 10  # steps between questions of several processes to each other whether to stop


@dataclass(frozen=True)
class Plan:
    """Say how long to train and when to look up. All counts are optimiser steps."""

    max_steps: int
    seed: int
    max_grad_norm: float | None = None
    noise_draws: int = 1  # for each sample of a step
    log_every: int = 50
    validate_every: int | None = None
    save_every: int | None = None
    evaluate_every: int | None = None
    evaluate_last: bool = False
    episodes: int = 0  # of an evaluation
    final_episodes: int = 0  # of the last one
    epoch_samples: int = 1  # samples in one epoch, for the `epoch` column


Evaluate = Callable[[DiffusionPolicy, int, bool, Callable[[], int]], dict[str, float] | None]


@dataclass(kw_only=True)
class Trainer:
    """Hold the parts of a run and train.

    Args:
        policy: the bare policy, on its device.
        model: the same as Accelerate prepared it: in mixed precision, or distributed.
        ema: None trains without averaging.
        validator: None if no episodes are held out.
        evaluate: rolls a policy out, given the step, whether it is the last, and what tells whether to stop, when it
            returns None; None if nothing is rolled out.
        keep_best: keep the policy with the best score as well.
        replays, stepper: as `Update` takes them.
        saves_aside: train on while a checkpoint is written, where the host has memory for a copy of all that is saved.
    """

    accelerator: Accelerator
    policy: DiffusionPolicy
    model: nn.Module
    optimizer: Any
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    batches: TrainingBatches
    store: CheckpointStore
    metrics: MetricsWriter
    plan: Plan
    ema: Ema | None = None
    validator: Validator | None = None
    evaluate: Evaluate | None = None
    keep_best: bool = False
    data: str = ""  # fingerprint of the episodes
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(None))
    replays: bool = False
    stepper: Stepper | None = None
    saves_aside: bool = False
    step: int = field(default=0, init=False)
    saved: int | None = field(default=None, init=False)  # the step of the newest checkpoint of this process
    background: Background = field(default_factory=Background, init=False)
    unread: list[Tensor] = field(default_factory=list, init=False)  # losses that nobody has waited for yet
    read: list[float] = field(default_factory=list, init=False)  # losses since the last line of metrics
    latest: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Put together what takes a step."""
        limit, self.lead = self.plan.max_grad_norm, Lead(self.accelerator.device)
        self.update = Update(
            self.accelerator, self.model, self.optimizer, limit, replays=self.replays, stepper=self.stepper
        )

    @property
    def best(self) -> DiffusionPolicy:
        """Return the policy to validate and save: the average, if there is one."""
        return self.ema.average if self.ema else self.policy  # type: ignore[return-value]

    def fit(self) -> dict[str, float]:
        """Train to the end of the plan; return the latest metrics.

        Raises:
            TrainingError: the loss is not finite; the last good checkpoint stays.
            SystemExit: a signal asked to stop; everything is saved.
        """
        plan = self.plan
        self.model.train()
        with stop_on_signals() as stopping, self._progress() as bar, self.background, self.watchdog.watching():
            clock = Clock()
            if self.step:  # what a run that was stopped here still owes
                self._evaluate(clock, stopping)
            for batches in clock.waiting(self.batches.iterate(self.step, plan.max_steps)):
                self._optimise(batches)
                self.step += 1
                self.watchdog.come_by()
                self.background.check()
                bar.update()
                last = self.step == plan.max_steps
                if last or self.step % plan.log_every == 0:
                    self._log(bar, clock)
                if last or is_due(self.step, plan.validate_every):
                    self._validate(clock)
                if last or is_due(self.step, plan.save_every):
                    self._save(clock)
                self._evaluate(clock, stopping)
                if not last and (number := self._agree(stopping())):
                    self._save(clock)
                    self._stop(clock, number)
            self._settle(clock)
        return self.latest

    def _optimise(self, batches: list[Batch]) -> None:
        """Take one optimiser step over this process's micro-batches."""
        share, device = self.batches.share, self.accelerator.device
        draws = self.plan.noise_draws
        noise, timesteps = draw_noise(
            self.policy, share.global_batch_size * draws, generator(self.plan.seed, Purpose.NOISE, self.step)
        )
        masked = self.policy.do_mask_loss_for_padding and share.global_batch_size > share.batch_size
        weights = self.batches.weights(self.step) if masked else [1.0] * share.accumulation
        parts = [
            Part(batch, to_device(noise[rows], device), to_device(timesteps[rows], device))
            for batch, rows in zip(batches, share.slices(draws), strict=True)
        ]
        if self.ema is not None:
            self.ema.prepare(self.step)
        loss = self.update(parts, weights)
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.update(self.policy, self.step)
        self.unread.append(loss.reshape(1))
        self.lead.keep()

    def _log(self, bar: tqdm, clock: Clock) -> None:
        self._read_losses()
        losses, self.read = self.read, []
        samples = len(losses) * self.batches.share.global_batch_size
        seconds, waited = clock.lap()
        loss = sum(losses) / len(losses)
        rate = samples / seconds
        seen = self.step * self.batches.share.global_batch_size
        self.latest.update(loss=loss)
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} samples/s", refresh=False)
        self.metrics.write(
            self.step,
            epoch=round(seen / self.plan.epoch_samples, 3),
            samples=seen,
            loss=loss,
            lr=self.lr_scheduler.get_last_lr()[0],
            samples_per_s=round(rate, 1),
            data_wait=round(waited / seconds, 4),
            **peak_memory(self.accelerator.device),
        )

    def _read_losses(self) -> None:
        """Read the losses of the last steps, means over processes. Only here, and in `Lead`, the host waits."""
        if not self.unread:
            return
        gathered = self.accelerator.gather(torch.cat(self.unread)[None])  # (processes, steps)
        losses = gathered.float().mean(0).tolist()
        self.unread.clear()
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise TrainingError(self._advice(self.step - len(losses) + offset, loss))
        self.read += losses

    def _advice(self, step: int, loss: float) -> str:
        """Explain a loss that is not finite: the step, its samples, and what helps."""
        with self.watchdog.resting(), contextlib.suppress(Exception):  # the loss is the worse news
            self.background.wait()
        self.accelerator.wait_for_everyone()  # the end of one process would end the others
        ids, kept = self.batches.ids(step)[:64], [saved for saved in self.store.steps() if saved <= step]
        windows = self.batches.gatherer.windows
        frames = [f"{windows.indices[episode]}:{frame}" for episode, frame in zip(*windows.locate(ids), strict=True)]
        lower = self.optimizer.param_groups[0].get("initial_lr", 1e-4) / 3
        saved = f"The last good checkpoint is step {kept[-1]}." if kept else "No checkpoint was saved yet."
        return (
            f"the loss is {loss} at step {step + 1}. Its batch begins with the samples {ids.tolist()} "
            f"(episode:frame {' '.join(frames)}). What helps: a lower rate, optimizer.lr={lower:.1e}; clipping, "
            "training.max_grad_norm=10.0; a longer warm-up, "
            f"lr_scheduler.num_warmup_steps=2000; full precision, hardware.mixed_precision=no. {saved}"
        )

    def _validate(self, clock: Clock) -> None:
        if self.validator is None:
            return
        with self._pausing(clock):
            if self.accelerator.is_main_process:
                with self.accelerator.autocast():
                    measured = self.validator(self.best)
                self.latest.update(measured)
                self.metrics.write(self.step, **measured)
                if not math.isfinite(measured["val_loss"]):  # of a last step that no training loss will tell of
                    log.warning(
                        "warning: the validation loss at step %d is %s: %s", self.step, measured["val_loss"], LOWER
                    )
                tqdm.write("  ".join([f"step {self.step}", *(f"{key} {value:.4f}" for key, value in measured.items())]))
            self.accelerator.wait_for_everyone()

    def _evaluate(self, clock: Clock, stopping: Callable[[], int]) -> None:
        """Roll the policy out, if that was not done before this run was stopped here."""
        last = self.step == self.plan.max_steps
        if self.evaluate is None or not (
            self.plan.evaluate_last if last else is_due(self.step, self.plan.evaluate_every)
        ):
            return
        self._save(clock)  # a kill costs nothing from here on, or once that is written
        episodes = self.plan.final_episodes if last else self.plan.episodes
        if from_main(self.metrics.holds(self.step, "score", episodes=episodes)):
            return
        with self._pausing(clock), evaluating(self.best):
            share_buffers(self.best)
            measured = self.evaluate(self.best, self.step, last, stopping)
            if measured is not None:
                self.latest.update(measured)
                if self.keep_best and self.accelerator.is_main_process:
                    self.background.wait()
                    self.store.save_best(self.best, step=self.step, score=measured["score"])
                # last: it tells a resumed run that all this is done
                self.metrics.write(self.step, **measured, episodes=episodes)
            else:
                self._stop(clock, self._any(stopping()))
            self.accelerator.wait_for_everyone()

    def _stop(self, clock: Clock, number: int) -> NoReturn:
        """End this process as a signal asked, when all is written."""
        self._settle(clock)
        raise SystemExit(128 + number)

    def _settle(self, clock: Clock) -> None:
        """Wait until all is written, for each process: the first that ends may end the others."""
        with self._pausing(clock):
            self.background.wait()
            self.accelerator.wait_for_everyone()

    def _save(self, clock: Clock) -> None:
        if self.saved == self.step:
            return
        with clock.paused():
            self._read_losses()
            if not all(torch.stack([weight.isfinite().all() for weight in self.best.parameters()]).tolist()):
                raise TrainingError(self._advice(self.step - 1, float("nan")))
        with self._pausing(clock):
            if self.accelerator.is_main_process:
                policy, state = self.best, self._state()
                self.background.wait()
                if self.saves_aside and has_room(policy, state):
                    self.background.start(self.store.save, policy_on_host(policy), state_on_host(state))
                else:
                    self.store.save(policy, state)
            self.accelerator.wait_for_everyone()
        self.saved = self.step

    def _state(self) -> TrainingState:
        """Return what decides how this run goes on, in the tensors that training goes on with."""
        scaler = self.accelerator.scaler
        return TrainingState(
            step=self.step,
            global_batch_size=self.batches.share.global_batch_size,
            data=self.data,
            weights=self.policy.state_dict(),
            optimizer=self.optimizer.optimizer.state_dict(),
            lr_scheduler=self.lr_scheduler.state_dict(),
            grad_scaler=scaler.state_dict() if scaler is not None else None,
        )

    @contextlib.contextmanager
    def _pausing(self, clock: Clock) -> Iterator[None]:
        """Leave out of the rate, and out of what the watchdog sees, work that some processes only wait for."""
        with clock.paused(), self.watchdog.resting():
            yield

    def _agree(self, number: int) -> int:
        """Return the signal that any process has received; several processes ask each other now and then."""
        if self.accelerator.num_processes == 1:
            return number
        return 0 if self.step % min(self.plan.log_every, AGREE_EVERY) else self._any(number)

    def _any(self, number: int) -> int:
        """Return the largest number of any process."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.plan.max_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=redraw_seconds(),
        )
