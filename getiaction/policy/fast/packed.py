"""Encode pictures on the CPU with weights that are packed once: a torchvision ResNet for who acts.

PyTorch gives oneDNN a convolution's weights as they lie, and oneDNN packs them anew at each call. For the one or two
small pictures that a robot sees, that takes as long as the convolution. Here they are packed once; batch norm, whose
statistics stand still by then, is part of them, and so is the addition at a block's end.

The operations are those that PyTorch's own compiler calls for networks which do not change. They are not promised to
anybody, so each process compares them with PyTorch's layers first.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from getiaction.errors import first_line
from getiaction.half import acts_in_slow_bf16
from getiaction.policy.fast.convolution import Conv2d, is_plain
from getiaction.policy.fast.copies import OtherLayerError, Stamp
from getiaction.policy.fast.native_norms import FLOATS
from getiaction.policy.fast.packed_convolution import PackedConvolution, Weights
from getiaction.policy.fast.residual import all_pairs_of, blocks_of, is_residual, pairs_of, way_around
from getiaction.policy.fast.watch import Held, Listeners, is_transformed

log = logging.getLogger(__name__)
type Plan = tuple[torch.Size, torch.dtype]  # of pictures, (B, C, H, W), and what weights are kept in
PLANS = 3  # for which packed weights of a network are kept: those used last
CLOSE = 1e-4  # how far what is packed may be from the layers


class PackedResnet:
    """Do what a torchvision ResNet does, for pictures of one shape, with the weights that it has now.

    Args:
        weights: as its convolutions read them: see `PackedConvolution`.
        dtype: what weights are rounded to where few places are seen.
    """

    def __init__(self, backbone: nn.Sequential, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
        layers: list[Any] = list(backbone)
        every = {layer: PackedConvolution(layer, norm, weights, dtype) for layer, norm in all_pairs_of(backbone)}
        self._first, self._pooling = every[layers[0]], layers[3]
        self._blocks = [
            ([every[layer] for layer, _ in pairs_of(block)], every[way[0]] if way else None)
            for block in blocks_of(backbone)
            for way in [way_around(block)]
        ]

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
    """Hold what was packed of a network as long as its weights lie where they do.

    Raises:
        OtherLayerError: it has other layers than torchvision's ResNets, or weights of another type.
    """

    def __init__(self, backbone: nn.Sequential) -> None:
        self.held, self._listeners = Held(backbone), Listeners(backbone)
        if not is_residual(backbone) or not all(takes(layer, norm) for layer, norm in all_pairs_of(backbone)):
            raise OtherLayerError
        self._pairs = all_pairs_of(backbone)
        read = read_by(self._pairs)
        if any(one.dtype != torch.float32 for one in read):  # which PyTorch refuses
            raise OtherLayerError
        self._stamp, self._settings = Stamp(read), settings_of(self._pairs)
        self._of: OrderedDict[Plan, PackedResnet | None] = OrderedDict()  # None: oneDNN refused
        self._weights = Weights()

    def find(self, backbone: nn.Sequential, plan: Plan) -> PackedResnet | None:
        """Return what does the same as a network with the weights it has now; None: its layers are to be called."""
        if self._listeners.there() or self.held.is_patched():
            return None
        if any(norm.training for _, norm in self._pairs if isinstance(norm, nn.BatchNorm2d)):
            return None
        if self._stamp.changed() or self._settings != settings_of(self._pairs):
            self._of.clear()  # who uses one meanwhile goes on with what that was made of
            self._weights = Weights()
            self._stamp.keep()
            self._settings = settings_of(self._pairs)
        if plan not in self._of:
            self._of[plan] = PackedResnet(backbone, self._weights, plan[1])
            if len(self._of) > PLANS:
                self._of.popitem(last=False)
        self._of.move_to_end(plan)
        return self._of[plan]

    def give_up(self, plan: Plan) -> None:
        """Leave pictures of a shape to the layers, for as long as the weights are these."""
        self._of[plan] = None


KEPT: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()
LOCK = threading.Lock()


def encode(backbone: nn.Module, pictures: Tensor) -> Tensor:
    """Call a backbone with pictures (B, C, H, W), or do what a ResNet does by packed weights: where that is faster.

    It is on the CPU, in float32, and without gradients. Under autocast to bf16, if the CPU is slower in it, nothing but
    weights that few places see is rounded. Weights are packed again when they changed (see `Stamp`).
    """
    if not is_transformed() and acts_in_slow_bf16(pictures):
        with torch.autocast("cpu", enabled=False):
            features = encode_packed(backbone, pictures, torch.bfloat16)
    else:
        features = encode_packed(backbone, pictures, torch.float32)
    return cast(Tensor, backbone(pictures)) if features is None else features


def encode_packed(backbone: nn.Module, pictures: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Do that by weights of a type, or return None where the layers are to be called."""
    if (packed := packed_for(backbone, pictures, dtype)) is not None:
        try:
            return packed(pictures)
        except RuntimeError as error:  # oneDNN cannot do this shape, or there is no memory for it
            log.debug("pictures of %s are left to the layers: %s", tuple(pictures.shape), first_line(error))
            if (kept := KEPT.get(backbone)) is not None:
                kept.give_up((pictures.shape, dtype))
    return None


def packed_for(backbone: nn.Module, pictures: Tensor, dtype: torch.dtype = torch.float32) -> PackedResnet | None:
    """Return what does the same as a ResNet that sees such pictures, or None where its layers are to be called."""
    if pictures.device.type != "cpu":
        KEPT.pop(backbone, None)  # what was made before it moved
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_transformed():
        return None
    if type(backbone) is not nn.Sequential or type(pictures) is not Tensor or pictures.dtype != torch.float32:
        return None
    if pictures.ndim != 4 or not len(pictures) or not torch.backends.mkldnn.enabled or not works():
        return None
    with LOCK:
        kept = KEPT.get(backbone)
        if kept is None or not kept.held.unchanged():
            try:
                KEPT[backbone] = kept = Packed(backbone)
            except OtherLayerError:
                return None
        return kept.find(backbone, (pictures.shape, dtype))


def takes(layer: nn.Module, norm: nn.Module) -> bool:
    """Tell whether `PackedConvolution` can do what a layer and its norm do."""
    if not isinstance(layer, nn.Conv2d) or type(layer) not in (Conv2d, nn.Conv2d) or not is_plain(layer):
        return False
    if list(layer._parameters) != ["weight", "bias"] or layer.weight.dtype != torch.float32:  # pruned ones have others
        return False
    if type(norm) is nn.BatchNorm2d:
        return norm.running_mean is not None  # else it is the batch's own
    return type(norm) is nn.GroupNorm


def read_by(pairs: list[tuple[Any, Any]]) -> list[Tensor]:
    """Return all that is packed, or becomes part of it."""
    read = [weight for layer, _ in pairs for weight in (layer.weight, layer.bias)]
    norms = [norm for _, norm in pairs if isinstance(norm, nn.BatchNorm2d)]
    read += [one for norm in norms for one in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    return [one for one in read if one is not None]


def settings_of(pairs: list[tuple[Any, Any]]) -> list[object]:
    """Return what else decides what is computed."""
    return [
        (layer.kernel_size, layer.stride, layer.padding, layer.dilation, norm.eps, getattr(norm, "num_groups", None))
        for layer, norm in pairs
    ]


@cache
def works() -> bool:
    """Compare packed weights with PyTorch's layers: once in each process."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.no_grad():
            for norm in (nn.BatchNorm2d, lambda channels: nn.GroupNorm(2, channels)):
                compare(norm)
    except (RuntimeError, TypeError, AttributeError, ArithmeticError) as error:  # another PyTorch, another oneDNN
        log.warning(
            "pictures are encoded by PyTorch's slower layers: packed weights cannot be used: %s", first_line(error)
        )
        return False
    return True


def compare(norm: Any) -> None:
    """Compare a small network with such norms.

    Raises:
        ArithmeticError: it is not the same to rounding.
    """
    with torch.device("meta"):  # which draws no weights
        way = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), norm(32))
        blocks = nn.Sequential(BasicBlock(16, 16, norm_layer=norm), BasicBlock(16, 32, 2, way, norm_layer=norm))
        first = nn.Conv2d(3, 16, 7, 2, 3, bias=False), norm(16)
        network = nn.Sequential(*first, nn.ReLU(), nn.MaxPool2d(3, 2, 1), blocks).float().eval().to_empty(device="cpu")
    for weight in network.state_dict().values():
        wave = torch.arange(weight.numel(), **FLOATS).sin().view(weight.shape)
        weight.copy_(0.1 * wave if weight.ndim > 1 else 1 + 0.3 * wave)
    for shape in ((2, 3, 21, 18), (3, 3, 33, 30)):  # small tiles and large ones
        pictures = torch.arange(math.prod(shape), **FLOATS).sin().view(shape)
        wanted, found = network(pictures), PackedResnet(network, Weights())(pictures)
        if not torch.allclose(found, wanted, rtol=CLOSE, atol=CLOSE):
            raise ArithmeticError("they compute something else")
