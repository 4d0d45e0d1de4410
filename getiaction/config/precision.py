"""Choose the precision of products by what a device can do."""

from __future__ import annotations

import contextlib
import logging

import torch

log = logging.getLogger(__name__)
CHOICES = ("no", "bf16", "fp16", "auto")


def choose_precision(wanted: str, device: str) -> str:
    """Return Accelerate's name of the precision; where the device lacks it, say so and use full precision."""
    if wanted == "auto":
        if multiplies_bf16(device):
            return "bf16"
        if device == "cuda":
            return "fp16"
        log.info(
            "mixed precision: auto on %s falls back to full precision, as it does not multiply bf16 itself; "
            "mixed_precision=bf16 asks for it all the same",
            device,
        )
        return "no"
    if wanted == "bf16" and device == "cuda" and not multiplies_bf16(device):
        log.info("mixed precision: this GPU has no bf16, fp16 is used")
        return "fp16"
    if wanted == "fp16" and device == "cpu":
        log.info("mixed precision: fp16 on cpu falls back to full precision: bf16 works there")
        return "no"
    return wanted


def multiplies_bf16(device: str) -> bool:
    """Tell whether a device has instructions for bf16 products; without them bf16 is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return what lets a policy act in a precision of `choose_precision`."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
