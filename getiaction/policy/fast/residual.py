"""Read the structure of a torchvision ResNet without its head, for those that do what it does in other ways."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

type Block = BasicBlock | Bottleneck


def is_residual(backbone: nn.Sequential) -> bool:
    """Tell whether a network is one: convolution, norm, ReLU, max pooling, stages of residual blocks."""
    layers: list[Any] = list(backbone)
    if [type(layer) for layer in layers[2:4]] != [nn.ReLU, nn.MaxPool2d]:
        return False
    if any(type(stage) is not nn.Sequential for stage in layers[4:]):
        return False
    blocks = [block for stage in layers[4:] for block in stage]
    if any(type(block) not in (BasicBlock, Bottleneck) or type(block.relu) is not nn.ReLU for block in blocks):
        return False
    ways = [block.downsample for block in blocks if block.downsample is not None]
    return all(type(way) is nn.Sequential and len(way) == 2 for way in ways)


def blocks_of(backbone: nn.Sequential) -> list[Block]:
    """Return the blocks of all stages, in order."""
    stages: list[Any] = list(backbone)[4:]
    return [block for stage in stages for block in stage]


def pairs_of(block: Block) -> list[tuple[Any, Any]]:
    """Return a block's convolutions, each with its norm, in order; not those around it."""
    names = [(f"conv{number}", f"bn{number}") for number in (1, 2, 3)]
    return [(getattr(block, one), getattr(block, other)) for one, other in names if hasattr(block, one)]


def way_around(block: Block) -> tuple[Any, Any] | None:
    """Return the convolution around a block, with its norm, or None where its input is added as it is."""
    way: Any = block.downsample
    return None if way is None else (way[0], way[1])


def all_pairs_of(backbone: nn.Sequential) -> list[tuple[Any, Any]]:
    """Return all convolutions, each with its norm."""
    layers: list[Any] = list(backbone)
    blocks = blocks_of(backbone)
    ways = [way for block in blocks if (way := way_around(block)) is not None]
    return [(layers[0], layers[1]), *(pair for block in blocks for pair in pairs_of(block)), *ways]
