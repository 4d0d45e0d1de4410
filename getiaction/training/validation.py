"""Measure a policy on held-out episodes: the loss with fixed noise, and the error of the actions that it samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from getiaction.data.gather import Batch, Gatherer
from getiaction.keys import ACTION, ACTION_IS_PAD
from getiaction.policy import DiffusionPolicy
from getiaction.random import Purpose, derive_seed, generator


@dataclass(frozen=True)
class Sampled:
    """Hold sampled action chunks beside the recorded ones, in the dataset's units.

    Args:
        predicted: (n, Ta, Da).
        recorded: (n, Ta, Da).
        valid: (n, Ta), False past the end of an episode.
    """

    predicted: Tensor
    recorded: Tensor
    valid: Tensor

    @property
    def mean_absolute_error(self) -> float:
        """Return the mean over all valid steps and dimensions."""
        errors = (self.predicted - self.recorded).abs().mean(-1)[self.valid]
        return float(errors.mean()) if len(errors) else float("nan")


class Validator:
    """Validate on a fixed spread of held-out samples: noise, denoising steps and crops are the same each time.

    Args:
        gatherer: of the held-out episodes.
        max_samples: samples for the loss.
        max_sampled: samples for the error of sampled actions; 0 skips it.
        batch_size: samples at a time.
        seed: of the run.
        sizes: the held-out samples of each dataset of a mixture, which lie one dataset after the other.
    """

    def __init__(
        self,
        gatherer: Gatherer,
        *,
        max_samples: int,
        max_sampled: int,
        batch_size: int,
        seed: int,
        sizes: tuple[int, ...] = (),
    ) -> None:
        self.gatherer, self.batch_size, self.seed = gatherer, batch_size, seed
        self.ids = spread(len(gatherer.windows), max_samples)
        self.sampled_ids = spread(len(gatherer.windows), max_sampled)
        self.sources = sources_of(self.ids, sizes) if len(sizes) > 1 else {}

    @torch.no_grad()
    def losses(self, policy: DiffusionPolicy) -> dict[str, float]:
        """Return the mean loss, `val_loss`; of several datasets also each one's own, `val_loss_<n>`.

        A sample has the same noise in both: the datasets' means, weighted by their samples, make the mean of all.
        """
        noise, timesteps = draw_noise(policy, len(self.ids), generator(self.seed, Purpose.VALIDATION))
        device = self.gatherer.device

        def measure(part: slice) -> Tensor:
            batch = self.gatherer.gather(self.ids[part])
            loss = policy(batch, noise[part].to(device), timesteps[part].to(device))
            return loss.float() * len(noise[part])

        total = torch.zeros((), device=device)
        own = {number: torch.zeros((), device=device) for number in self.sources}
        for part in self._parts(self.ids):
            summed = measure(part)
            total += summed
            for number, source in self.sources.items():
                if common := intersection(part, source):  # only a batch that has two datasets is measured again
                    own[number] += summed if common == part else measure(common)
        means = {f"val_loss_{n}": float(own[n]) / (where.stop - where.start) for n, where in self.sources.items()}
        return {"val_loss": float(total) / len(self.ids), **means}

    def sample(self, policy: DiffusionPolicy) -> Sampled:
        """Sample actions and return them beside the recorded ones."""
        device = self.gatherer.device
        draw = torch.Generator(device).manual_seed(derive_seed(self.seed, Purpose.VALIDATION, 1))
        first = policy.n_obs_steps - 1
        executed = slice(first, first + policy.n_action_steps)
        parts: list[Batch] = []
        for part in self._parts(self.sampled_ids):
            batch = self.gatherer.gather(self.sampled_ids[part])
            recorded, valid = batch[ACTION][:, executed], ~batch[ACTION_IS_PAD][:, executed]
            parts.append({"predicted": policy.act_on(batch, generator=draw), "recorded": recorded, "valid": valid})
        return Sampled(
            **{key: torch.cat([part[key] for part in parts]).float().cpu() for key in ("predicted", "recorded")},
            valid=torch.cat([part["valid"] for part in parts]).cpu(),
        )

    def __call__(self, policy: DiffusionPolicy) -> dict[str, float]:
        """Return `val_loss`, each dataset's own if there are several, and `val_action_error` in the dataset's units."""
        with evaluating(policy):
            metrics = self.losses(policy)
            if len(self.sampled_ids):
                metrics["val_action_error"] = self.sample(policy).mean_absolute_error
        return metrics

    def _parts(self, ids: np.ndarray) -> list[slice]:
        starts = range(0, len(ids), self.batch_size)
        return [slice(start, min(start + self.batch_size, len(ids))) for start in starts]


@contextlib.contextmanager
def evaluating(policy: DiffusionPolicy) -> Iterator[None]:
    """Hold a policy in evaluation mode: batch norm uses its running statistics and leaves them as they are."""
    was_training = policy.training
    policy.eval()
    yield
    policy.train(was_training)


def spread(count: int, most: int) -> np.ndarray:
    """Return at most `most` of `count` ids, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64)) if most else np.empty(0, np.int64)


def sources_of(ids: np.ndarray, sizes: tuple[int, ...]) -> dict[int, slice]:
    """Return which of the ascending `ids` (n,) are of each dataset, by its number; one without any is left out.

    Args:
        sizes: the samples of each dataset, which lie one dataset after the other.
    """
    bounds = np.searchsorted(ids, np.cumsum([0, *sizes])).tolist()
    return {n: slice(first, stop) for n, (first, stop) in enumerate(pairwise(bounds)) if stop > first}


def intersection(one: slice, other: slice) -> slice | None:
    """Return what two slices have in common, or None."""
    first, stop = max(one.start, other.start), min(one.stop, other.stop)
    return slice(first, stop) if first < stop else None


def draw_noise(policy: DiffusionPolicy, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw noise (count, T, Da) and denoising steps (count,) on the CPU."""
    noise = torch.randn(count, policy.horizon, policy.features.action_dim, generator=draw)
    return noise, torch.randint(policy.num_train_timesteps, (count,), generator=draw)
