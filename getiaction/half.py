"""Tell where bf16 is faster than float32."""

from __future__ import annotations

import torch
from torch import Tensor

from getiaction.machine import read_cpu


def is_faster_in_bf16(device: str) -> bool:
    """Tell whether a device multiplies bf16 faster than float32, by its instructions.

    Having AVX-512's bf16 is not enough: an AMD EPYC gains from them, an Intel Xeon has half of float32's rate unless it
    has AMX, too (benchmarks/NOTES.md).
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        by_avx512 = torch.cpu._is_avx512_bf16_supported() and read_cpu("vendor_id") == "AuthenticAMD"
        return by_avx512 or torch.cpu._is_amx_tile_supported()
    return False


def acts_in_slow_bf16(x: Tensor) -> bool:
    """Tell whether who sees float32 x acts under autocast to bf16, on a CPU that is not known to be faster so."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    in_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return in_bf16 and not is_faster_in_bf16("cpu")
