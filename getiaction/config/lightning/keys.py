"""Name every key of the format: what it is called here, or why it has no effect here.

`model.init_args` are those of the first GetiAction's `Diffusion` and of LeRobot's `DiffusionConfig`; `data.init_args`
those of its `LeRobotDataModule`; `trainer` those of Lightning's `Trainer`.
"""

from __future__ import annotations

MODEL = {  # the value is taken as it stands
    "n_obs_steps": "policy.n_obs_steps",
    "horizon": "policy.horizon",
    "n_action_steps": "policy.n_action_steps",
    "drop_n_last_frames": "policy.drop_n_last_frames",
    "num_inference_steps": "policy.num_inference_steps",
    "do_mask_loss_for_padding": "policy.do_mask_loss_for_padding",
    "use_separate_rgb_encoder_per_camera": "policy.use_separate_rgb_encoder_per_camera",
    "vision_backbone": "backbone.resnet",
    "resize_shape": "backbone.resize_shape",
    "crop_shape": "backbone.crop_shape",
    "crop_is_random": "backbone.crop_is_random",
    "spatial_softmax_num_keypoints": "backbone.num_keypoints",
    "down_dims": "unet.down_dims",
    "kernel_size": "unet.kernel_size",
    "n_groups": "unet.n_groups",
    "diffusion_step_embed_dim": "unet.diffusion_step_embed_dim",
    "use_film_scale_modulation": "unet.use_film_scale_modulation",
    "gradient_checkpointing": "unet.gradient_checkpointing",
    "num_train_timesteps": "scheduler.num_train_timesteps",
    "beta_schedule": "scheduler.beta_schedule",
    "beta_start": "scheduler.beta_start",
    "beta_end": "scheduler.beta_end",
    "prediction_type": "scheduler.prediction_type",
    "clip_sample": "scheduler.clip_sample",
    "clip_sample_range": "scheduler.clip_sample_range",
    "learning_rate": "optimizer.lr",
    "optimizer_betas": "optimizer.betas",
    "optimizer_eps": "optimizer.eps",
    "optimizer_weight_decay": "optimizer.weight_decay",
    "scheduler_name": "lr_scheduler.name",
    "scheduler_warmup_steps": "lr_scheduler.num_warmup_steps",
    "compile_model": "hardware.compile",
    "compile_mode": "hardware.compile_mode",
    "device": "hardware.device",
}
MODEL_SPECIAL = {  # translated by `translate.py`
    "optimizer_lr": "optimizer.lr",
    "pretrained_backbone_weights": "backbone.weights",
    "use_group_norm": "backbone.norm",
    "crop_ratio": "backbone.crop_shape",
    "noise_scheduler_type": "scheduler",
    "normalization_mapping": "policy.normalization",
    "use_amp": "hardware.mixed_precision",
    "input_features": "dataset.observations",
    "pretrained_path": "training.init_from",
    "pretrained_revision": "training.init_from",
    "policy_name": None,
    "config_kwargs": None,
}
MODEL_WITHOUT_EFFECT = {
    "output_features": "the dataset says what an action is",
    "stats": "statistics are computed from the training episodes",
    "dataset_stats": "statistics are computed from the training episodes",
    "use_peft": "there are no adapters here",
    "push_to_hub": "`getiaction push` does that",
    "repo_id": "`getiaction push --repo-id` does that",
    "private": "`getiaction push --private` does that",
    "tags": "`getiaction push` writes them",
    "license": "`getiaction push --license` does that",
}
MODEL_DEFAULTS = {  # the class's own, where they are not those of conf/train.yaml
    "down_dims": [512, 1024, 2048],
    "num_inference_steps": None,
}
DORMANT = (  # its own optimiser took the learning rate only
    "optimizer_betas",
    "optimizer_eps",
    "optimizer_weight_decay",
    "scheduler_name",
    "scheduler_warmup_steps",
)

DATA = {
    "repo_id": "dataset.repo_id",
    "root": "dataset.root",
    "episodes": "dataset.episodes",
    "revision": "dataset.revision",
    "train_batch_size": "training.batch_size",
    "batch_size": "training.batch_size",
    "max_episode_steps": "env.max_steps",
    "num_rollouts_val": "evaluation.episodes",
}
DATA_SPECIAL = {
    "delta_timestamps": "dataset.delta_timestamps",
    "val_gyms": "env",
    "test_gyms": "env",
    "num_rollouts_test": None,
}
DATA_DEFAULTS = {"train_batch_size": 16}
DATA_WITHOUT_EFFECT = {
    "data_format": "batches have one format here",
    "image_transforms": "pictures are resized and cropped by model.init_args, and not transformed otherwise",
    "tolerance_s": "windows are counted in frames, not in seconds",
    "force_cache_sync": "the cache is keyed by the dataset's content",
    "download_videos": "what is needed is fetched, and nothing else",
    "video_backend": "PyAV decodes once, into a cache",
    "batch_encoding_size": "nothing is encoded in training",
    "dataset": "a file cannot hold a dataset: name it with repo_id or root",
    "val_batch_size": "validation takes train_batch_size",
    "num_workers": "there are no loader processes: batches are cut from memory",
    "pin_memory": "batches are cut on the device where they fit",
}

TRAINER = {
    "max_epochs": "training.max_epochs",
    "max_steps": "training.max_steps",
    "gradient_clip_val": "training.max_grad_norm",
    "accumulate_grad_batches": "training.gradient_accumulation_steps",
    "log_every_n_steps": "training.log_every",
    "sync_batchnorm": "hardware.sync_batch_norm",
}
TRAINER_SPECIAL = {
    "accelerator": "hardware.device",
    "devices": "hardware.num_processes",
    "strategy": "hardware.num_processes",
    "precision": "hardware.mixed_precision",
    "gradient_clip_algorithm": None,
    "check_val_every_n_epoch": "validation.every",
    "val_check_interval": "validation.every",
    "enable_checkpointing": "training.save_every",
    "logger": "tracker",
}
TRAINER_WITHOUT_EFFECT = {
    "num_nodes": "say hardware.num_nodes and hardware.rendezvous under getiaction:, and start it on each machine",
    "callbacks": "the loop has none; curves, checkpoints and rollouts are its own",
    "default_root_dir": "runs land in outputs/<name>/<date_time>; give output_dir under getiaction: to change it",
    "enable_progress_bar": "there is one on the main process",
    "enable_model_summary": "one line tells the size",
    "num_sanity_val_steps": "everything is checked before the first step",
    "deterministic": "a seed decides the run on a CPU as it is",
    "benchmark": "cuDNN chooses its kernels by timing them",
    "detect_anomaly": "a loss that is not finite stops the run",
    "profiler": "metrics.jsonl tells the waiting for data",
    "inference_mode": "validation takes no gradients",
    "use_distributed_sampler": "each process takes its share of every batch",
    "reload_dataloaders_every_n_epochs": "the data stay in memory",
    "limit_train_batches": "max_steps says the length",
    "limit_val_batches": "validation.max_samples says how much",
    "limit_test_batches": "episodes say how much",
    "limit_predict_batches": "there is no predict",
    "overfit_batches": "dataset.episodes says on what to train",
    "fast_dev_run": "max_steps says the length",
    "max_time": "max_steps says the length; SIGTERM saves and stops",
    "min_epochs": "training never ends early",
    "min_steps": "training never ends early",
    "barebones": "logging costs nothing that could be measured",
    "plugins": "there are none",
    "model_registry": "checkpoints are folders",
}
LIGHTNING_MAX_EPOCHS = 1000  # Lightning's length where neither epochs nor steps are given

SECTIONS = ("model", "data", "trainer", "seed_everything", "ckpt_path", "getiaction")
POLICY_CLASSES = ("Diffusion", "LeRobotPolicy")
DATA_CLASSES = ("LeRobotDataModule",)
GYMS = {"PushTGym": "pusht", "PushT": "pusht"}
LOGGERS = {"WandbLogger": "wandb", "TensorBoardLogger": "tensorboard", "CSVLogger": "local"}
PRECISIONS = {
    "32": "no",
    "32-true": "no",
    "16": "auto",
    "16-mixed": "auto",
    "bf16": "bf16",
    "bf16-mixed": "bf16",
}
ACCELERATORS = {"auto": "auto", "gpu": "cuda", "cuda": "cuda", "cpu": "cpu", "mps": "mps"}
STRATEGIES = ("auto", "ddp", "ddp_spawn", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
