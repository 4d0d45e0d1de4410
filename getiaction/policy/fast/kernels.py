"""Find the kernels for GPUs, where they run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from getiaction.errors import first_line
from getiaction.policy.fast.watch import is_watched

log = logging.getLogger(__name__)
TAKEN = (torch.float32, torch.bfloat16, torch.float16)
TRIALS = ((24, torch.float32, True, 1e-3), (3, torch.float32, False, 1e-3), (20, torch.bfloat16, False, 5e-2))
"""What is compared at the first use: a picture's side, its type, whether something is added, how close it must be."""
_FOUND: dict[Callable[[], ModuleType], ModuleType | None] = {}


def kernels_for(layer: nn.Module, x: Tensor) -> ModuleType | None:
    """Return `fused.py` for a layer that sees x (B, C, T), or None where its kernels do not run."""
    if x.device.type != "cuda" or x.ndim != 3 or not len(x) or torch.compiler.is_compiling() or layer.by_library:
        return None
    return find_kernels() if x.dtype in TAKEN else None


def block_kernels_for(layer: nn.Module, x: Tensor) -> ModuleType | None:
    """Return what convolves and normalises x (B, C, ...): `fused.py` on a GPU, `native_layers.py` on a CPU."""
    if x.device.type != "cpu":
        return kernels_for(layer, x)
    if not layer.by_native or not layer.training or x.ndim != 4:
        return None
    return find_native(x)


def film_kernels_for(unet: nn.Module, x: Tensor) -> ModuleType | None:
    """Return what does all FiLM layers of a U-Net as one product: `fused.py` on a GPU, `native_layers.py` on a CPU."""
    if x.device.type != "cpu":
        return kernels_for(unet, x)
    return find_native(x) if unet.by_native and unet.training else None


def native_block_for(block: nn.Module, x: Tensor, film: Tensor) -> ModuleType | None:
    """Return `native_blocks.py` for a U-Net's residual block that learns on a CPU and sees x (B, C, 1, T), or None."""
    if x.device.type != "cpu" or not block.by_native or not block.training or x.ndim != 4:
        return None
    if (native := find_native(x)) is None:
        return None
    blocks: ModuleType = native.native_blocks
    return blocks if blocks.takes(block, x, film) else None


def native_convolution_for(layer: nn.Conv2d, x: Tensor) -> ModuleType | None:
    """Return `native_pictures.py` for a plain convolution that learns on a CPU and sees x (B, C, h, w), or None."""
    if x.device.type != "cpu" or not layer.by_native or not layer.training or x.ndim != 4:
        return None
    if "weight" not in layer._parameters:  # it is computed each time that somebody looks at it
        return None
    if torch.compiler.is_compiling() or (native := find_native(x)) is None:
        return None
    pictures: ModuleType = native.native_pictures
    return pictures if pictures.takes(layer, x) else None


def has_tiles_for(layer: nn.Conv2d, x: Tensor) -> bool:
    """Tell whether a convolution that learns on a CPU does so by Winograd's tiles: `native_winograd.py`."""
    if (pictures := native_convolution_for(layer, x)) is None:
        return False
    return bool(pictures.has_tiles(layer, x))


def find_native(x: Tensor) -> ModuleType | None:
    """Return `native_layers.py` where x may be taken: float32 on a CPU, with gradients, and there is a C compiler."""
    from getiaction.policy.fast import native_layers, native_norms

    return native_layers if native_norms.learns(x) and native_layers.works() else None


def picture_kernels_for(backbone: nn.Sequential, x: Tensor) -> ModuleType | None:
    """Return `fused_pictures.py` for a ResNet that sees x (B, C, H, W), or None where PyTorch's layers are called.

    Args:
        x: normalised, or uint8.
    """
    if x.device.type == "cpu":
        return native_pictures_for(backbone, x)
    if x.device.type != "cuda" or not len(x) or torch.compiler.is_compiling():
        return None
    if x.dtype not in (*TAKEN, torch.uint8):
        return None
    if getattr(backbone, "by_library", False) or is_watched(*backbone.modules()):
        return None
    has_batch_norm = any(isinstance(layer, nn.BatchNorm2d) for layer in backbone.modules())
    if has_batch_norm and not (backbone.training and torch.is_autocast_enabled(x.device.type)):
        return None
    weight = next(backbone.parameters())
    lie_last = any(one.is_contiguous(memory_format=torch.channels_last) for one in (weight, x))
    first: Any = backbone[0]
    is_ours = hasattr(first, "by_taps")  # a `Conv2d` of `convolution.py`, which looks at them, too
    if not lie_last and not (is_ours and few_kernels_for(first, x) is not None):
        return None  # nor will what the convolutions make lie so
    kernels = find_picture_kernels()
    if kernels is None or not kernels.takes(backbone, x.device.type):
        return None
    return kernels if not has_batch_norm or _find(_try_batch_norm) is not None else None


def native_pictures_for(backbone: nn.Sequential, x: Tensor) -> ModuleType | None:
    """Return `native_layers.py` for a ResNet that learns on a CPU, or None."""
    if not getattr(backbone[0], "by_native", False) or not backbone.training or is_watched(*backbone.modules()):
        return None
    native = find_native(x)
    return native if native is not None and native.takes_pictures(backbone) else None


def few_kernels_for(layer: nn.Conv2d, x: Tensor) -> ModuleType | None:
    """Return `few.py` for a layer that sees x (B, C, H, W), few places and without gradients; or None."""
    if x.device.type != "cuda" or x.ndim != 4 or not len(x) or torch.compiler.is_compiling() or x.dtype not in TAKEN:
        return None
    if getattr(layer, "by_library", False) or (fused := find_kernels()) is None:
        return None
    few: ModuleType = fused.few
    return few if few.takes_picture(layer, x) else None


def find_kernels() -> ModuleType | None:
    """Import the kernels for sequences and try one; return None where there is no Triton, or it cannot compile.

    It needs GPUs of compute capability 7.0, a C compiler, Python's headers, and a folder to write to.
    """
    return _find(_try_sequences)


def find_picture_kernels() -> ModuleType | None:
    """Import the kernels for pictures and compare them with PyTorch's; return None where they cannot be used."""
    return _find(_try_pictures) if find_kernels() is not None else None


def find_crop() -> Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor] | None:
    """Import what crops pictures on a GPU; None where Triton's kernels do not run."""
    if find_kernels() is None:
        return None
    from getiaction.policy.fast.fused_crop import crop

    return crop


def find_products() -> ModuleType | None:
    """Import what convolves pictures first by products of its own, and compare it with PyTorch's; or None.

    It needs compute capability 8.0: before, Triton multiplies without tensor cores.
    """
    if find_kernels() is None:
        return None
    numbers = range(torch.cuda.device_count())
    if any(torch.cuda.get_device_capability(number) < (8, 0) for number in numbers):
        return None
    return _find(_try_products)


def _find(try_out: Callable[[], ModuleType]) -> ModuleType | None:
    if try_out not in _FOUND:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # somebody's own graph, in which nothing can be tried
        _FOUND[try_out] = _try(try_out)
    return _FOUND[try_out]


def _try(try_out: Callable[[], ModuleType]) -> ModuleType | None:
    if not torch.cuda.is_available():
        return None
    if any(torch.cuda.get_device_capability(number) < (7, 0) for number in range(torch.cuda.device_count())):
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            return try_out()
    except (TimeoutError, torch.OutOfMemoryError):  # says nothing about the kernels
        raise
    except Exception as error:  # whatever a compiler says
        reason = first_line(error)
        log.warning("warning: Triton's kernels are not used, PyTorch's slower ones are, on this GPU: %s", reason)
        return None


def _try_sequences() -> ModuleType:
    from getiaction.policy.fast import fused

    fused.unfold(torch.zeros(1, 1, 2, device="cuda"), kernel=3, stride=1, padding=1, dtype=torch.float32)
    return fused


def _try_pictures() -> ModuleType:
    from getiaction.policy.fast import fused_pictures

    compare(fused_pictures.fused_group_norm, nn.GroupNorm(2, 32, device="cuda"))
    return fused_pictures


def _try_batch_norm() -> ModuleType:
    from getiaction.policy.fast import fused_batch_norm

    compare(fused_batch_norm, nn.BatchNorm2d(32, device="cuda"))
    return fused_batch_norm


def _try_products() -> ModuleType:
    from getiaction.policy.fast import fused_stem

    compare_products(fused_stem, torch.device("cuda"), torch.bfloat16)
    return fused_stem


def compare_products(stem: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Compare products of a first convolution, and the gradient of its weights, with PyTorch's.

    Raises:
        ArithmeticError: they are not the same to rounding.
    """
    recorded = torch.arange(3 * 9 * 11, device=device).remainder(251).to(torch.uint8).view(1, 3, 9, 11)
    weight = torch.arange(64 * 3 * 7 * 7, device=device).float().view(64, 3, 7, 7).sin()
    folded, turned = stem.fold_pictures(recorded, 7, 3, dtype), stem.fold_weights(weight, dtype)
    found = stem.convolve(folded, turned)
    exact = functional.conv2d(recorded.float() / 255, weight, stride=2, padding=3)
    came = exact.cos().to(dtype).contiguous(memory_format=torch.channels_last)
    ours = stem.weight_gradient(came, folded, turned)
    theirs = conv2d_weight(folded.float(), list(turned.shape), came.float())
    for one, other in ((found, exact), (ours, theirs)):
        if not float((one.float() - other).norm()) < 2e-2 * float(other.norm()):
            raise ArithmeticError("they compute something else for a first convolution")


def compare(kernels: Any, norm: nn.GroupNorm | nn.BatchNorm2d) -> None:
    """Compare what lies between two convolutions, and its gradients, with PyTorch's.

    Raises:
        ArithmeticError: they are not the same to rounding (TF32 does not matter here).
    """
    reference, pooling, device = copy.deepcopy(norm), nn.MaxPool2d(3, 2, 1), norm.weight.device
    for side, dtype, adds, close in TRIALS:
        wave = torch.arange(2 * 32 * side * side, device=device).float().view(2, 32, side, side).sin()
        x = wave.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        theirs = reference(x.float())
        trials = {
            "one after the other": (kernels.normalise(norm, x, rectify=True), theirs.relu()),
        }
        if isinstance(norm, nn.GroupNorm):  # batch norm's numbers are rounded first, so that others are the largest
            trials["pooled"] = (sum(kernels.normalise_and_pool(norm, pooling, x)), 2 * pooling(theirs.relu()))
        if adds:
            both = kernels.branch(norm, x, 2 * x)
            trials["added"] = (both[0] + both[1], 2 * (theirs + 2 * x.float()).relu())
        for name, (one, other) in trials.items():
            weights = wave[:, :, : one.shape[2], : one.shape[3]]
            found = _with_gradients(one, weights, [x, norm.weight, norm.bias])
            wanted = _with_gradients(other, weights, [x, reference.weight, reference.bias])
            pairs = zip(found, wanted, strict=True)
            if not all(torch.allclose(ours.float(), exact.float(), rtol=close, atol=close) for ours, exact in pairs):
                raise ArithmeticError(f"they compute something else for {side}x{side} places, {name}, in {dtype}")


def _with_gradients(result: Tensor, weights: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return a result, and the gradients of its weighted sum."""
    return result, *torch.autograd.grad((result.float() * weights).sum(), inputs, retain_graph=True)
