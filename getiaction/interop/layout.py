"""Name the files of a policy folder, LeRobot's and ours."""

from __future__ import annotations

CONFIG, EXTRA, WEIGHTS = "config.json", "getiaction.json", "model.safetensors"
OURS = "getiaction_diffusion"
"""The policy type of what LeRobot has no equal for: LeRobot refuses it."""
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
PREPROCESSOR_STATE = f"{PREPROCESSOR}_step_3_normalizer_processor.safetensors"
POSTPROCESSOR_STATE = f"{POSTPROCESSOR}_step_0_unnormalizer_processor.safetensors"
FILES = (CONFIG, EXTRA, WEIGHTS, "train_config.json", f"{PREPROCESSOR}*.*", f"{POSTPROCESSOR}*.*")
"""Patterns of all that a policy folder can hold (LeRobot numbers its processors' steps); nothing else is ever sent."""
