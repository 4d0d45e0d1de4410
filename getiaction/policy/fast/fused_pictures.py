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

from getiaction.policy.fast import fused_batch_norm, fused_group_norm
from getiaction.policy.fast.fused_stem import convolve_first
from getiaction.policy.fast.residual import Block, all_pairs_of, blocks_of, is_residual, pairs_of, way_around
from getiaction.policy.normalizer import Ranges


def takes(backbone: nn.Sequential, device: str) -> bool:
    """Tell whether `run` can do what a network does: a torchvision ResNet without its head.

    It has group norm; or batch norm that learns under autocast, without which cuDNN's kernels are as fast.
    """
    if not is_residual(backbone):
        return False
    norms = [norm for _, norm in all_pairs_of(backbone)]
    if torch.is_autocast_enabled(device) and all(fused_batch_norm.takes(norm) for norm in norms):
        return True
    return all(type(norm) is nn.GroupNorm and norm.affine for norm in norms)


def run(backbone: nn.Sequential, pictures: Tensor, ranges: Ranges | None = None) -> Tensor:
    """Do what such a network does: (B, C, H, W) to (B, C', h, w).

    Args:
        pictures, ranges: as `convolve_first` takes them.
    """
    layers: list[Any] = list(backbone)
    convolution, norm, _, pooling = layers[:4]
    norms = fused_batch_norm if isinstance(norm, nn.BatchNorm2d) else fused_group_norm
    kept, seen = norms.normalise_and_pool(norm, pooling, convolve_first(convolution, pictures, ranges))
    for block, following in pairwise([*blocks_of(backbone), None]):
        only_convolved = following is not None and following.downsample is not None
        kept, seen = run_block(norms, block, kept, seen, narrow=only_convolved)
    return kept


def run_block(norms: ModuleType, block: Block, kept: Tensor, seen: Tensor, *, narrow: bool) -> tuple[Tensor, Tensor]:
    """Do what a residual block does.

    Args:
        norms: `fused_group_norm` or `fused_batch_norm`.
        kept: its input, (B, C, H, W), for the addition, or for the convolution before that.
        seen: the same for its first convolution.
        narrow: whether the next block has two convolutions for what comes out, and no addition of it.
    """
    way = way_around(block)
    residual = kept if way is None else norms.normalise(way[1], way[0](kept))
    *firsts, (last, last_norm) = pairs_of(block)
    for convolution, norm in firsts:
        seen = norms.normalise_between(norm, convolution(seen))
    return cast(tuple[Tensor, Tensor], norms.branch(last_norm, last(seen), residual, narrow=narrow))
