"""Type the composed config. The YAML files in `conf/` hold the defaults and the documentation of each key.

The groups `backbone`, `unet`, `scheduler` and `optimizer` name what they build with `_target_`, so they stay open
mappings: a new one is a YAML file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class NormalizationConfig:
    visual: str = MISSING
    state: str = MISSING
    env: str = MISSING
    action: str = MISSING


@dataclass
class PolicyConfig:
    n_obs_steps: int = MISSING
    horizon: int = MISSING
    n_action_steps: int = MISSING
    num_inference_steps: int | None = MISSING
    drop_n_last_frames: int | None = MISSING
    do_mask_loss_for_padding: bool = MISSING
    loss_weighting: str = MISSING
    use_separate_rgb_encoder_per_camera: bool = MISSING
    normalization: NormalizationConfig = MISSING


@dataclass
class DatasetConfig:
    repo_id: str = MISSING
    root: str | None = MISSING
    revision: str | None = MISSING
    sources: list[Any] | None = MISSING
    episodes: list[int] | None = MISSING
    observations: list[str] | None = MISSING
    val_fraction: float = MISSING
    val_episodes: list[int] | None = MISSING
    delta_timestamps: dict[str, list[float]] | None = MISSING
    image_stats: str = MISSING
    cache_dir: str | None = MISSING


@dataclass
class LrSchedulerConfig:
    name: str = MISSING
    num_warmup_steps: int = MISSING


@dataclass
class EmaConfig:
    enabled: bool = MISSING
    power: float = MISSING
    max_decay: float = MISSING


@dataclass
class TrainingConfig:
    batch_size: int = MISSING
    gradient_accumulation_steps: int = MISSING
    max_steps: int | None = MISSING
    max_epochs: int | None = MISSING
    max_grad_norm: float | None = MISSING
    observation_noise: float = MISSING
    noise_draws: int = MISSING
    log_every: int = MISSING
    save_every: int | None = MISSING
    keep_checkpoints: int | None = MISSING
    init_from: str | None = MISSING
    resume: Any = MISSING


@dataclass
class ValidationConfig:
    every: int | None = MISSING
    max_samples: int = MISSING
    max_sampled: int = MISSING


@dataclass
class EvaluationConfig:
    every: int | None = MISSING
    episodes: int = MISSING
    final_episodes: int | None = MISSING
    seed: int = MISSING
    num_envs: int | None = MISSING
    num_workers: int | None = MISSING
    videos: bool = MISSING
    keep_best: bool = MISSING


@dataclass
class HardwareConfig:
    device: str = MISSING
    mixed_precision: str = MISSING
    num_processes: int = MISSING
    num_nodes: int = MISSING
    rendezvous: str | None = MISSING
    hang_timeout: int | None = MISSING
    data_placement: str = MISSING
    num_threads: int | None = MISSING
    channels_last: bool = MISSING
    convolutions: str = MISSING
    tf32: bool = MISSING
    cuda_graphs: bool = MISSING
    compile: bool = MISSING
    compile_mode: str = MISSING
    sync_batch_norm: bool = MISSING


@dataclass
class TrackerConfig:
    name: str = MISSING
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING


@dataclass
class Config:
    """Hold everything that decides a run."""

    name: str = MISSING
    seed: int = MISSING
    strict: bool = MISSING
    output_dir: str = MISSING
    policy: PolicyConfig = MISSING
    backbone: dict[str, Any] = MISSING
    unet: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    lr_scheduler: LrSchedulerConfig = MISSING
    ema: EmaConfig = MISSING
    dataset: DatasetConfig = MISSING
    training: TrainingConfig = MISSING
    validation: ValidationConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    env: dict[str, Any] = MISSING
    mirror: dict[str, Any] = MISSING
    hardware: HardwareConfig = MISSING
    tracker: TrackerConfig = MISSING
    sweep_metric: str = MISSING

    @property
    def resumes(self) -> bool:
        """Tell whether this run goes on with one that exists."""
        return self.training.resume not in (None, False, "auto")

    @property
    def evaluates(self) -> bool:
        """Tell whether this run rolls its policy out."""
        return self.evaluation.every is not None or self.evaluation.final_episodes is not None

    @property
    def uses_images(self) -> bool:
        """Tell whether the policy has an image encoder."""
        return self.backbone.get("_target_") is not None

    @property
    def drop_n_last_frames(self) -> int:
        """Return the frames at each episode's end that start no sample, derived if not given."""
        given = self.policy.drop_n_last_frames
        return (
            self.policy.horizon - self.policy.n_action_steps - self.policy.n_obs_steps + 1 if given is None else given
        )


@dataclass
class EvaluateConfig:
    """Hold everything that decides an evaluation."""

    checkpoint: str = MISSING
    episodes: int = MISSING
    seed: int = MISSING
    num_envs: int | None = MISSING
    num_workers: int | None = MISSING
    batch_size: int | None = MISSING
    num_inference_steps: int | None = MISSING
    n_action_steps: int | None = MISSING
    mixed_precision: str = MISSING
    tf32: bool = MISSING
    videos: bool = MISSING
    device: str = MISSING
    num_threads: int | None = MISSING
    output_dir: str = MISSING
    env: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None


@dataclass
class DemonstrateConfig:
    """Hold everything that decides demonstrations."""

    env: dict[str, Any] = MISSING
    episodes: int = MISSING
    seed: int = MISSING
    midway: float = MISSING
    disturbance: float = MISSING
    num_workers: int | None = MISSING
    repo_id: str = MISSING
    output_dir: str = MISSING
