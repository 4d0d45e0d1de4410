"""Choose the precision of products by what a device can do."""

from __future__ import annotations

import contextlib
import logging

import torch

from getiaction.half import is_faster_in_bf16

log = logging.getLogger(__name__)
CHOICES = ("no", "bf16", "fp16", "auto")


def choose_precision(wanted: str, device: str) -> str:
    """Return Accelerate's name of the precision; where the device lacks it, say so and use full precision."""
    if wanted == "auto":
        if is_faster_in_bf16(device):
            return "bf16"
        if device == "cuda":
            return "fp16"
        log.info(
            "mixed precision: auto on %s falls back to full precision, as this one does not multiply bf16 faster; "
            "mixed_precision=bf16 asks for it all the same",
            device,
        )
        return "no"
    if wanted == "bf16" and device == "cuda" and not is_faster_in_bf16(device):
        log.info("mixed precision: this GPU has no bf16, fp16 is used")
        return "fp16"
    if wanted == "fp16" and device == "cpu":
        log.info("mixed precision: fp16 on cpu falls back to full precision: bf16 works there")
        return "no"
    return wanted


def allow_tf32(allowed: bool) -> None:
    """Let float32 products and convolutions on NVIDIA GPUs round to TF32, or keep them from it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def rounding(precision: str, device: str) -> dict[str, str | bool]:
    """Return what products are rounded to, where that is not float32: part of an evaluation's identity."""
    reduced: dict[str, str | bool] = {} if precision == "no" else {"mixed_precision": precision}
    if device == "cuda" and torch.backends.cudnn.allow_tf32:
        reduced["tf32"] = True
    return reduced


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return what lets a policy act in a precision of `choose_precision`."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
