"""Say of what kind each value must be, and read it so: a file may quote its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from getiaction.config.value_checks import is_number
from getiaction.errors import InputError

Kind = tuple[str, Callable[[Any], bool]]


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


COUNT: Kind = ("a whole number of at least 1", lambda value: is_whole(value) and value >= 1)
INDEX: Kind = ("a whole number of at least 0", lambda value: is_whole(value) and value >= 0)
LENGTH: Kind = ("a whole number, or -1 for no limit", lambda value: is_whole(value) and value >= -1)
NUMBER: Kind = ("a number", is_number)
FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
WORD: Kind = ("a word", lambda value: isinstance(value, str | int | float) and not isinstance(value, bool))
PAIR: Kind = ("[height, width]", lambda value: is_list(value, COUNT) and len(value) == 2)
COUNTS: Kind = ("a list of numbers", lambda value: is_list(value, COUNT) and len(value) > 0)
INDICES: Kind = ("a list of whole numbers", lambda value: is_list(value, INDEX))
NUMBERS: Kind = ("a list of numbers", lambda value: is_list(value, NUMBER))
MAPPING: Kind = ("a mapping", lambda value: isinstance(value, dict))
ANY: Kind = ("", lambda _: True)

KINDS: dict[str, dict[str, Kind]] = {
    "model.init_args": {
        **dict.fromkeys(("n_obs_steps", "horizon", "n_action_steps", "num_inference_steps"), COUNT),
        **dict.fromkeys(("kernel_size", "n_groups", "diffusion_step_embed_dim", "num_train_timesteps"), COUNT),
        **dict.fromkeys(("spatial_softmax_num_keypoints",), COUNT),
        **dict.fromkeys(("drop_n_last_frames", "scheduler_warmup_steps"), INDEX),
        **dict.fromkeys(("do_mask_loss_for_padding", "use_separate_rgb_encoder_per_camera", "crop_is_random"), FLAG),
        **dict.fromkeys(("use_film_scale_modulation", "gradient_checkpointing", "clip_sample", "compile_model"), FLAG),
        **dict.fromkeys(("use_group_norm", "use_amp"), FLAG),
        **dict.fromkeys(("beta_start", "beta_end", "clip_sample_range", "learning_rate", "optimizer_lr"), NUMBER),
        **dict.fromkeys(("optimizer_eps", "optimizer_weight_decay", "crop_ratio"), NUMBER),
        **dict.fromkeys(("vision_backbone", "beta_schedule", "prediction_type", "scheduler_name"), WORD),
        **dict.fromkeys(("compile_mode", "device", "pretrained_backbone_weights", "noise_scheduler_type"), WORD),
        **dict.fromkeys(("pretrained_path", "pretrained_revision", "policy_name"), WORD),
        **dict.fromkeys(("resize_shape", "crop_shape"), PAIR),
        **dict.fromkeys(("normalization_mapping", "input_features", "config_kwargs"), MAPPING),
        "down_dims": COUNTS,
        "optimizer_betas": NUMBERS,
    },
    "data.init_args": {
        **dict.fromkeys(("repo_id", "root", "revision"), WORD),
        **dict.fromkeys(("train_batch_size", "batch_size", "max_episode_steps"), COUNT),
        **dict.fromkeys(("num_rollouts_val", "num_rollouts_test"), COUNT),
        "episodes": INDICES,
        "delta_timestamps": MAPPING,
    },
    "trainer": {
        **dict.fromkeys(("max_epochs", "max_steps"), LENGTH),
        **dict.fromkeys(("accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch"), COUNT),
        **dict.fromkeys(("gradient_clip_val", "val_check_interval"), NUMBER),
        **dict.fromkeys(("sync_batchnorm", "enable_checkpointing"), FLAG),
        **dict.fromkeys(("accelerator", "strategy", "precision", "gradient_clip_algorithm"), WORD),
    },
}
NULL_MEANS_SOMETHING = ("crop_shape", "num_inference_steps")  # no crop; as many as in training. Else: not given
WORDS_AS_WRITTEN = ("repo_id", "root", "revision", "pretrained_path", "pretrained_revision", "precision")


def read_values(section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a section, quoted numbers as numbers, and without those that are null and mean nothing.

    Raises:
        InputError: a value is of another kind than its key asks for.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            if name in NULL_MEANS_SOMETHING:
                found[name] = None
            continue
        if isinstance(value, str) and name not in WORDS_AS_WRITTEN:
            value = unquote(value)
        rule, fits = KINDS[section].get(name, ANY)
        if not fits(value):
            raise InputError(f"{section}.{name}={value!r} must be {rule}")
        found[name] = value
    return found


def unquote(value: str) -> Any:
    """Return what a word would be without its quotes, if that is a number or a truth; else the word."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for read in (int, float):
        try:
            return read(value)
        except ValueError:
            continue
    return value


def is_list(value: Any, kind: Kind) -> bool:
    """Tell whether a value is a list of this kind."""
    return isinstance(value, list | tuple) and all(kind[1](item) for item in value)
