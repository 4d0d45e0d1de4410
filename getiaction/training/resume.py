"""Go on with a run that was stopped."""

from __future__ import annotations

import torch
from torch import Tensor

from getiaction.data.batches import Share
from getiaction.errors import InputError
from getiaction.training.checkpoint import TrainingState
from getiaction.training.loop import Trainer


def check_resumable(state: TrainingState, share: Share, data: str) -> None:
    """Check that a run that goes on from `state` would see the samples that it would have seen.

    Raises:
        InputError: its global batch, or its data, differ.
    """
    if share.global_batch_size != state.global_batch_size:
        raise InputError(
            f"training.resume: the run has a global batch of {state.global_batch_size}, now it is training.batch_size="
            f"{share.batch_size} x {share.processes} processes x training.gradient_accumulation_steps="
            f"{share.accumulation} = {share.global_batch_size}: change one of them so that it stays the same"
        )
    if data != state.data:
        raise InputError(
            "training.resume: the episodes are not those that the run was trained on (their number, lengths or actions "
            "differ): give the same data with dataset.root= or dataset.sources=, or start a new run"
        )


def resume(trainer: Trainer, state: TrainingState, average: dict[str, Tensor] | None) -> None:
    """Bring a fresh trainer to where a checkpoint was."""
    trainer.policy.load_state_dict(state.weights)
    if trainer.ema is not None and average is not None:
        trainer.ema.average.load_state_dict(average)
    trainer.optimizer.optimizer.load_state_dict(state.optimizer)
    lay_out_like_weights(trainer.optimizer.optimizer)
    trainer.update.forget()
    trainer.lr_scheduler.load_state_dict(state.lr_scheduler)
    if trainer.accelerator.scaler is not None and state.grad_scaler:
        trainer.accelerator.scaler.load_state_dict(state.grad_scaler)
    trainer.step = state.step
    trainer.latest = trainer.metrics.latest()


def lay_out_like_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory order of their weights (channels last): fused updates pair them by place."""
    for weight, entry in optimizer.state.items():
        for name, value in entry.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                entry[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
