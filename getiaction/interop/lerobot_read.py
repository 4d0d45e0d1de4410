"""Read policy folders that LeRobot wrote, today's and those of its older versions.

| LeRobot | config.json | normalisation |
| --- | --- | --- |
| 0.4 and later | `type`, `input_features`, `output_features` | processor files, named in `policy_preprocessor.json` |
| 2025, before that | the same | buffers among the weights, `normalize_inputs.buffer_*` |
| 2024 | no `type`; `input_shapes`, `input_normalization_modes`, ... | the same buffers |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from getiaction.errors import InputError
from getiaction.interop.layout import CONFIG, EXTRA, OURS, PREPROCESSOR
from getiaction.interop.lerobot_files import FEATURE_TYPES, SCHEDULER_KEYS, SCHEDULERS
from getiaction.interop.lerobot_statistics import (
    BUFFERS,
    Named,
    check_modes,
    in_shape,
    read_buffers,
    read_processors,
)
from getiaction.keys import ACTION, OBS_ENV_STATE, OBS_STATE, is_camera

log = logging.getLogger(__name__)

ADDED_LATER: dict[str, Any] = {  # keys that older versions did not write, with what they did
    "resize_shape": None,
    "crop_ratio": 1.0,
    "use_separate_rgb_encoder_per_camera": False,
    "gradient_checkpointing": False,
    "num_inference_steps": None,
    "do_mask_loss_for_padding": False,
    "drop_n_last_frames": None,
}
UNET_KEYS = (
    "down_dims",
    "kernel_size",
    "n_groups",
    "diffusion_step_embed_dim",
    "use_film_scale_modulation",
    "gradient_checkpointing",
)
POLICY_KEYS = (
    "n_obs_steps",
    "horizon",
    "n_action_steps",
    "num_inference_steps",
    "use_separate_rgb_encoder_per_camera",
    "do_mask_loss_for_padding",
    "drop_n_last_frames",
)
ENCODER_KEYS = (
    "vision_backbone",
    "use_group_norm",
    "crop_shape",
    "crop_is_random",
    "spatial_softmax_num_keypoints",
)
SHAPE_KEYS = (
    "type",
    "noise_scheduler_type",
    "input_features",
    "output_features",
    "normalization_mapping",
    "input_shapes",
    "output_shapes",
    "input_normalization_modes",
    "output_normalization_modes",
)
WITHOUT_EFFECT = (  # on how a policy acts
    "device",
    "use_amp",
    "use_peft",
    "push_to_hub",
    "repo_id",
    "private",
    "tags",
    "license",
    "pretrained_path",
    "pretrained_revision",
    "pretrained_backbone_weights",
    "compile_model",
    "compile_mode",
    "optimizer_lr",
    "optimizer_betas",
    "optimizer_eps",
    "optimizer_weight_decay",
    "scheduler_name",
    "scheduler_warmup_steps",
)


def read_foreign(folder: Path, weights: dict[str, Tensor]) -> tuple[dict[str, Any], Named, dict[str, Tensor]]:
    """Translate a folder of LeRobot's to what `description.build` takes.

    Args:
        weights: what `model.safetensors` holds.

    Returns:
        The description, the normalisation statistics, and the weights without the buffers of older versions.

    Raises:
        InputError: it is another kind of policy, or something in it has no equal here; the message names it.
    """
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} is no policy folder: it has neither {EXTRA} nor {CONFIG}")
    config = Config(folder, json.loads((folder / CONFIG).read_text()))
    config.check_type()
    shapes = config.shapes()
    buffers = {key: value for key, value in weights.items() if key.split(".")[0] in BUFFERS}
    if (folder / f"{PREPROCESSOR}.json").exists():
        modes, statistics = read_processors(folder)
    elif buffers:
        modes, statistics = config.modes(), read_buffers(buffers, shapes)
    else:
        raise InputError(
            f"{folder} has no normalisation statistics: neither {PREPROCESSOR}.json nor buffers among the weights"
        )
    check_modes(modes, folder)
    statistics = {key: in_shape(key, stats, shapes[key], folder) for key, stats in statistics.items() if key in shapes}
    for key in shapes:
        if modes[kind_of(key)] != "identity" and key not in statistics:
            log.warning("warning: %s has no statistics of %s, so it is not normalised", folder, key)
    rest = {key: value for key, value in weights.items() if key not in buffers}
    return {**config.describe(shapes), "normalization": modes}, statistics, rest


class Config:
    """Hold a `config.json` of LeRobot's, and say it in our words."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder, self.content = folder, content

    def __getitem__(self, key: str) -> Any:
        if key in self.content:
            return self.content[key]
        if key in ADDED_LATER:
            return ADDED_LATER[key]
        raise InputError(f"{self.folder / CONFIG} has no {key}: it is no diffusion policy of LeRobot's")

    def check_type(self) -> None:
        """Refuse what is no diffusion policy of LeRobot's, and what is only a part of one."""
        kind = self.content.get("type", "diffusion" if "input_shapes" in self.content else None)
        if kind == OURS:
            raise InputError(f"{self.folder} is not whole: it has no {EXTRA}; copy the whole folder")
        if kind != "diffusion":
            raise InputError(
                f"{self.folder} holds a policy of type {kind}, which has no equal here: this package has diffusion "
                "policies only; LeRobot itself runs that one"
            )
        known = {*ADDED_LATER, *UNET_KEYS, *POLICY_KEYS, *ENCODER_KEYS, *SCHEDULER_KEYS, *SHAPE_KEYS, *WITHOUT_EFFECT}
        if unknown := sorted(self.content.keys() - known):
            raise InputError(
                f"{self.folder / CONFIG} has {', '.join(unknown)}, which LeRobot's diffusion policy does not have "
                "up to 0.6.1: what it means is unknown here"
            )
        if self.content.get("use_peft"):
            raise InputError(f"{self.folder} holds a PEFT adapter, which has no equal here: merge it in LeRobot first")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return key -> shape of what the policy sees and does: states, cameras in their order, action."""
        if "input_shapes" in self.content:  # 2024
            seen = {key: tuple(shape) for key, shape in self["input_shapes"].items()}
            done = {key: tuple(shape) for key, shape in self["output_shapes"].items()}
        else:
            kinds = {OBS_STATE: "STATE", OBS_ENV_STATE: "ENV", ACTION: "ACTION"}
            seen, done = (
                {
                    key: tuple(feature["shape"])
                    for key, feature in self[name].items()
                    if feature["type"] == kinds.get(key, "VISUAL")  # LeRobot's policy passes over other states as well
                }
                for name in ("input_features", "output_features")
            )
        if list(done) != [ACTION]:
            raise InputError(f"{self.folder / CONFIG}: the output must be {ACTION}, got {', '.join(done) or 'nothing'}")
        if strange := [key for key, shape in seen.items() if len(shape) == 3 and not is_camera(key)]:
            raise InputError(f"{self.folder / CONFIG}: cameras must be named observation.*, not {', '.join(strange)}")
        if strange := [key for key, shape in seen.items() if len(shape) != 3 and is_camera(key)]:
            raise InputError(f"{self.folder / CONFIG}: {', '.join(strange)} has no equal here: use {OBS_STATE}")
        vectors = [key for key in (OBS_STATE, OBS_ENV_STATE) if key in seen]
        return {key: seen[key] for key in (*vectors, *filter(is_camera, seen))} | done

    def modes(self) -> dict[str, str]:
        """Return kind -> normalisation mode, of versions without processors."""
        if "normalization_mapping" in self.content:
            mapping = self["normalization_mapping"]
            return {kind: str(mapping.get(name, "IDENTITY")).lower() for kind, name in FEATURE_TYPES.items()}
        by_key = {**self["input_normalization_modes"], **self["output_normalization_modes"]}  # 2024
        modes = dict.fromkeys(FEATURE_TYPES, "identity")
        for kind in modes:
            found = {mode for key, mode in by_key.items() if kind_of(key) == kind}
            if len(found) > 1:
                raise InputError(f"{self.folder / CONFIG} normalises cameras in two ways, {by_key}: no equal here")
            modes[kind] = next(iter(found), "identity")
        return modes

    def describe(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return what `description.describe` would, but for the normalisation."""
        names = {theirs: ours for ours, theirs in SCHEDULERS.items()}
        if (scheduler := self["noise_scheduler_type"]) not in names:
            raise InputError(
                f"{self.folder / CONFIG}: noise_scheduler_type={scheduler} must be one of {', '.join(names)}"
            )
        cameras = {key: list(shape) for key, shape in shapes.items() if is_camera(key)}
        sizes = {key: shape[0] for key, shape in shapes.items() if not is_camera(key)}
        return {
            "features": {
                "action_dim": sizes[ACTION],
                "state_dim": sizes.get(OBS_STATE),
                "env_state_dim": sizes.get(OBS_ENV_STATE),
                "cameras": cameras,
            },
            "scheduler": {"class": names[scheduler], "config": {key: self[key] for key in SCHEDULER_KEYS}},
            "encoder": self.describe_encoder() if cameras else None,
            "unet": {key: self[key] for key in UNET_KEYS},
            "policy": {**{key: self[key] for key in POLICY_KEYS}, "n_action_steps": self.executed_steps()},
        }

    def executed_steps(self) -> int:
        """Return how many actions LeRobot really executes where it was asked for more than lie ahead."""
        asked, longest = self["n_action_steps"], self["horizon"] - self["n_obs_steps"] + 1
        if asked > longest >= 1:
            log.warning("warning: %s asks for n_action_steps=%s, of which %s exist", self.folder, asked, longest)
        return min(asked, longest)

    def describe_encoder(self) -> dict[str, Any]:
        """Return the arguments of `ImageEncoder`; a ratio crops what was resized, a shape what was recorded."""
        resize, ratio, crop = self["resize_shape"], self["crop_ratio"], self["crop_shape"]
        if resize is not None:
            crop = [int(side * ratio) for side in resize] if ratio < 1 else None
        return {
            "resnet": self["vision_backbone"],
            "norm": "group" if self["use_group_norm"] else "batch",
            "resize_shape": resize,
            "crop_shape": crop,
            "crop_is_random": self["crop_is_random"],
            "num_keypoints": self["spatial_softmax_num_keypoints"],
        }


def kind_of(key: str) -> str:
    """Return which normalisation rules `key`: "visual", "state", "env" or "action"."""
    return {OBS_STATE: "state", OBS_ENV_STATE: "env", ACTION: "action"}.get(key, "visual")
