"""Load the data that a config names, and make what trains and what validates on them."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from getiaction.config.build import build_mirror, observation_keys
from getiaction.config.schema import Config
from getiaction.data.batches import Share, TrainingBatches, is_resident
from getiaction.data.cache import load_episodes
from getiaction.data.episodes import Episodes
from getiaction.data.gather import Gatherer
from getiaction.data.mixture import Mixture
from getiaction.data.order import Order
from getiaction.data.windows import Windows
from getiaction.keys import is_camera
from getiaction.policy import DiffusionPolicy
from getiaction.policy.fast.kernels import find_crop
from getiaction.training.validation import Validator

log = logging.getLogger(__name__)


def load_data(config: Config, mixture: Mixture, accelerator: Accelerator) -> Episodes:
    """Load the chosen episodes; the main process decodes first, then one of each machine; others find the cache."""
    cameras = [key for key in observation_keys(config, mixture.metadata) if is_camera(key)]
    resize = config.backbone.get("resize_shape")
    cache_dir = Path(config.dataset.cache_dir).expanduser() if config.dataset.cache_dir else None
    with accelerator.main_process_first(), accelerator.local_main_process_first():  # machines may share a cache, or not
        parts = [
            load_episodes(
                source.metadata,
                source.chosen,
                cameras,
                resize=tuple(resize) if resize else None,
                cache_dir=cache_dir,
                announce=log.info,
            )
            for source in mixture.sources
        ]
    return mixture.concatenate(parts)


def split(config: Config, mixture: Mixture) -> tuple[list[int], list[int]]:
    """Split episodes into those for training and those held out."""
    return mixture.split(config.dataset.val_fraction, config.seed)


def build_batches(
    config: Config,
    mixture: Mixture,
    episodes: Episodes,
    policy: DiffusionPolicy,
    accelerator: Accelerator,
) -> tuple[TrainingBatches, Validator | None]:
    """Place the data, and make what trains and what validates on them."""
    training, validation = config.training, config.validation
    train_indices, val_indices = split(config, mixture)
    resident = is_resident(episodes, accelerator.device, config.hardware.data_placement)
    if resident and accelerator.device.type != "cpu" and episodes.num_frames < episodes.num_rows:
        episodes = episodes.compacted()  # so that only the chosen episodes go to the device
    gatherer = Gatherer(
        episodes,
        make_windows(config, episodes.select(train_indices)),
        device=accelerator.device,
        resident=resident,
        observations=policy.features.observation_keys,
        crop_shape=policy.encoders[0].crop_shape if policy.encoders else None,
        mirror=build_mirror(config),
        crop=find_crop() if accelerator.device.type == "cuda" else None,
    )
    share = Share(
        training.batch_size, training.gradient_accumulation_steps, accelerator.num_processes, accelerator.process_index
    )
    batches = TrainingBatches(
        gatherer,
        Order(
            len(gatherer.windows),
            share.global_batch_size,
            config.seed,
            sizes=mixture.count_samples(gatherer.windows),
            weights=mixture.weights,
        ),
        share,
        crop_is_random=bool(config.backbone.get("crop_is_random")),
        observation_noise=noise_of(policy, training.observation_noise),
        prefetch=not resident or accelerator.device.type == "cuda",  # its kernels take long to launch
    )
    if not val_indices:
        return batches, None
    held_out = make_windows(config, episodes.select(val_indices))
    validator = Validator(
        gatherer.with_windows(held_out),
        max_samples=validation.max_samples,
        max_sampled=validation.max_sampled,
        batch_size=training.batch_size,
        seed=config.seed,
        sizes=mixture.count_samples(held_out),
    )
    return batches, validator


def noise_of(policy: DiffusionPolicy, share: float) -> dict[str, Tensor]:
    """Return the standard deviation (D,) of the noise on each state, in raw units; nothing for none."""
    statistics = policy.normalizer.statistics if share else {}
    return {
        key: share * (statistics[key]["max"] - statistics[key]["min"]) / 2
        for key in policy.features.vectors
        if key in statistics
    }


def make_windows(config: Config, episodes: Episodes) -> Windows:
    """List the samples of some episodes."""
    return Windows(
        episodes,
        n_obs_steps=config.policy.n_obs_steps,
        horizon=config.policy.horizon,
        drop_n_last_frames=config.drop_n_last_frames,
    )
