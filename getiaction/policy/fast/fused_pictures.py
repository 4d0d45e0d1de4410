"""A torchvision ResNet that learns on a CUDA GPU: what lies between two convolutions as few kernels, channels last.

`fused_group_norm.py` and `fused_batch_norm.py` do norm, addition and ReLU. A block's result comes twice, for the
addition and, rounded as autocast would, for the next convolution, or so for two convolutions; the two gradients meet in
the kernel that takes them.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from getiaction.policy.fast import fused_batch_norm, fused_group_norm
from getiaction.policy.fast.fused_stem import convolve_first
from getiaction.policy.normalizer import Ranges


def takes(backbone: nn.Sequential, device: str) -> bool:
    """Tell whether `run` can do what a network does: a torchvision ResNet without its head.

    It has group norm; or batch norm that learns under autocast, without which cuDNN's kernels are as fast.
    """
    layers: list[Any] = list(backbone)
    if [type(layer) for layer in layers[2:4]] != [nn.ReLU, nn.MaxPool2d]:
        return False
    if any(type(stage) is not nn.Sequential for stage in layers[4:]):
        return False
    blocks = [block for stage in layers[4:] for block in stage]
    if any(type(block) not in (BasicBlock, Bottleneck) or type(block.relu) is not nn.ReLU for block in blocks):
        return False
    ways = [block.downsample for block in blocks if block.downsample is not None]
    if any(len(way) != 2 for way in ways):
        return False
    norms = [layers[1], *(norm for block in blocks for _, norm in pairs_of(block)), *(way[1] for way in ways)]
    if torch.is_autocast_enabled(device) and all(fused_batch_norm.takes(norm) for norm in norms):
        return True
    return all(type(norm) is nn.GroupNorm and norm.affine for norm in norms)


def run(backbone: nn.Sequential, pictures: Tensor, ranges: Ranges | None = None) -> Tensor:
    """Do what such a network does: (B, C, H, W) to (B, C', h, w).

    Args:
        pictures, ranges: as `convolve_first` takes them.
    """
    layers: list[Any] = list(backbone)
    convolution, norm, _, pooling, *stages = layers
    norms = fused_batch_norm if isinstance(norm, nn.BatchNorm2d) else fused_group_norm
    kept, seen = norms.normalise_and_pool(norm, pooling, convolve_first(convolution, pictures, ranges))
    for block, following in pairwise([*(block for stage in stages for block in stage), None]):
        only_convolved = following is not None and following.downsample is not None
        kept, seen = run_block(norms, block, kept, seen, narrow=only_convolved)
    return kept


def run_block(
    norms: ModuleType, block: BasicBlock | Bottleneck, kept: Tensor, seen: Tensor, *, narrow: bool
) -> tuple[Tensor, Tensor]:
    """Do what a residual block does.

    Args:
        norms: `fused_group_norm` or `fused_batch_norm`.
        kept: its input, (B, C, H, W), for the addition, or for the convolution before that.
        seen: the same for its first convolution.
        narrow: whether the next block has two convolutions for what comes out, and no addition of it.
    """
    way = cast(Any, block.downsample)
    residual = kept if way is None else norms.normalise(way[1], way[0](kept))
    *firsts, (last, last_norm) = pairs_of(block)
    for convolution, norm in firsts:
        seen = norms.normalise_between(norm, convolution(seen))
    return cast(tuple[Tensor, Tensor], norms.branch(last_norm, last(seen), residual, narrow=narrow))


def pairs_of(block: nn.Module) -> list[tuple[Any, Any]]:
    """Return a block's convolutions, each with its norm, in order."""
    names = [(f"conv{number}", f"bn{number}") for number in (1, 2, 3)]
    return [(getattr(block, one), getattr(block, other)) for one, other in names if hasattr(block, one)]
