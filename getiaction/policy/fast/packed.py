"""Encode pictures on the CPU with weights that are packed once: a torchvision ResNet for who acts.

PyTorch gives oneDNN a convolution's weights as they lie, and oneDNN packs them anew at each call. For the one or two
small pictures that a robot sees, that takes as long as the convolution. Here they are packed once; batch norm, whose
statistics stand still by then, is part of them; and addition and ReLU are part of the convolution before.

The operations are those that PyTorch's own compiler calls for networks which do not change. They are not promised to
anybody, so a network's first result is compared with what its layers say.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from getiaction.errors import first_line
from getiaction.policy.fast.convolution import Conv2d, is_plain
from getiaction.policy.fast.copies import Stamp
from getiaction.policy.fast.residual import all_pairs_of, blocks_of, is_residual, pairs_of, way_around
from getiaction.policy.fast.watch import Held, Listeners

log = logging.getLogger(__name__)
SHAPES = 2  # of pictures, for which packed weights of a network are kept: those used last
CLOSE = 1e-3  # of the largest number, how far the first result may be from that of the layers


class Convolution:
    """Do what a convolution and its norm do, for pictures of one size.

    Args:
        layer, norm: the two; their weights may change, but must stay where they are.
    """

    def __init__(self, layer: nn.Conv2d, norm: nn.Module) -> None:
        self._layer, self._norm = layer, norm
        self._folds = isinstance(norm, nn.BatchNorm2d)
        self._window = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups
        self._packed: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor, *, rectify: bool = False, residual: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W'), add `residual` to it, and then take ReLU of it if told to."""
        convolve, sizes = torch.ops.mkldnn._convolution_pointwise, (*self._packed_for(x), *self._window)
        after = "relu" if rectify and self._folds else "none"
        if self._folds and residual is not None:
            return convolve(x, residual, *sizes, "add", None, after, [], None)
        hidden = convolve(x, *sizes, after, [], "")
        if self._folds:
            return hidden
        hidden = self._norm(hidden)
        if residual is not None:
            hidden = hidden.add_(residual)
        return hidden.relu_() if rectify else hidden

    def reads(self) -> list[Tensor]:
        """Return what is packed, and becomes part of it."""
        if not isinstance(norm := self._norm, nn.BatchNorm2d):
            return [self._layer.weight]
        read = self._layer.weight, self._layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var
        return [one for one in read if one is not None]

    def unpack(self) -> None:
        """Pack the weights again before the next use."""
        self._packed = None

    def _packed_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        packed = self._packed
        if packed is None:
            weight, bias = self._layer.weight.detach(), self._layer.bias
            if isinstance(norm := self._norm, nn.BatchNorm2d):
                mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
                weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, norm.weight, norm.bias)
            last = weight.detach().contiguous(memory_format=torch.channels_last)
            packed = torch.ops.mkldnn._reorder_convolution_weight(last, *self._window, x.shape), bias
            self._packed = packed
        return packed


class PackedResnet:
    """Do what a torchvision ResNet does, for pictures of one size.

    Args:
        backbone: its weights may change where they lie between two `look`s. It is not held.
    """

    def __init__(self, backbone: nn.Sequential) -> None:
        layers: list[Any] = list(backbone)
        self._pooling = layers[3]
        self._every = {layer: Convolution(layer, norm) for layer, norm in all_pairs_of(backbone)}
        self._stamp = Stamp(one for convolution in self._every.values() for one in convolution.reads())
        self._first = self._every[layers[0]]
        self._blocks = [
            ([self._every[layer] for layer, _ in pairs_of(block)], self._every[way[0]] if way else None)
            for block in blocks_of(backbone)
            for way in [way_around(block)]
        ]

    def look(self) -> None:
        """Take in what changed about the weights."""
        if self._stamp.renew():
            for convolution in self._every.values():
                convolution.unpack()

    def __call__(self, pictures: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', h, w)."""
        x = self._first(pictures.contiguous(memory_format=torch.channels_last), rectify=True)
        x = self._pooling(x)
        for (*firsts, last), way in self._blocks:
            hidden, residual = x, x if way is None else way(x)
            for convolution in firsts:
                hidden = convolution(hidden, rectify=True)
            x = last(hidden, rectify=True, residual=residual)
        return x


class Packed:
    """Hold what was packed of a network as long as its weights lie where they do: for the last few shapes."""

    def __init__(self, backbone: nn.Sequential) -> None:
        self.held, self.lock = Held(backbone), threading.Lock()
        self._listeners = Listeners(backbone)
        self._moving = [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
        self._of: OrderedDict[torch.Size, PackedResnet | None] = OrderedDict()  # None: it is not what its layers are

    def find(self, backbone: nn.Sequential, pictures: Tensor) -> PackedResnet | None:
        """Return what does the same as a network, with the weights it has now; None: its layers are to be called."""
        if self._listeners.there() or any(norm.training for norm in self._moving):
            return None
        shape = pictures.shape
        if shape not in self._of:
            self._of[shape] = tried(backbone, pictures)
            if len(self._of) > SHAPES:
                self._of.popitem(last=False)
        self._of.move_to_end(shape)
        if (packed := self._of[shape]) is not None:
            packed.look()
        return packed


KEPT: WeakKeyDictionary[nn.Sequential, Packed] = WeakKeyDictionary()
LOCK = threading.Lock()


def packed_for(backbone: nn.Sequential, pictures: Tensor) -> PackedResnet | None:
    """Return what does the same as a ResNet that sees pictures (B, C, H, W), in float32 on the CPU, without gradients.

    It is made anew only if it must. None where its layers are to be called.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if pictures.device.type != "cpu" or pictures.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled or not len(pictures):
        return None
    with LOCK:
        kept = KEPT.get(backbone)
        if kept is None or not kept.held.unchanged():
            KEPT[backbone] = kept = Packed(backbone)
    with kept.lock:
        return kept.find(backbone, pictures)


def tried(backbone: nn.Sequential, pictures: Tensor) -> PackedResnet | None:
    """Pack a network's weights, and compare what comes of such pictures, drawn, with what its layers make of them."""
    if not is_residual(backbone) or not all(takes(layer, norm) for layer, norm in all_pairs_of(backbone)):
        return None
    drawn = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0), dtype=pictures.dtype)
    try:
        packed = PackedResnet(backbone)
        packed.look()
        found, wanted = packed(drawn), backbone(drawn)
        if torch.allclose(found, wanted, rtol=0.0, atol=CLOSE * float(wanted.abs().max())):
            return packed
        raise ArithmeticError("it computes something else")
    except (RuntimeError, TypeError, AttributeError, ArithmeticError) as error:  # another PyTorch, another oneDNN
        reason = first_line(error)
        log.warning("pictures are encoded by PyTorch's slower layers: oneDNN's packed weights fail here: %s", reason)
        return None


def takes(layer: nn.Module, norm: nn.Module) -> bool:
    """Tell whether `Convolution` can do what a layer and its norm do."""
    if not isinstance(layer, nn.Conv2d) or type(layer) not in (Conv2d, nn.Conv2d) or not is_plain(layer):
        return False
    if layer.weight.dtype != torch.float32:
        return False
    if type(norm) is nn.BatchNorm2d:
        return norm.running_mean is not None  # else it is the batch's own
    return type(norm) is nn.GroupNorm
