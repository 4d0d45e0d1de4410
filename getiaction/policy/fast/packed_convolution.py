"""A convolution and its norm for who acts: with weights that are packed once, for pictures of one shape.

Where few places are seen, `native_few.c` reads each weight for up to sixty of them. Convolutions of 3x3 taps are tiles
of `native_winograd.c` where there are enough of them, which share their errors as it says; group norm and what follows
it is `native_norms.c`. The rest is done by oneDNN and PyTorch, and so is all of it without a C compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from getiaction.policy.fast import native_layers, native_norms, native_winograd
from getiaction.policy.fast.native_few import FewPlaces, sides_of, windows_of
from getiaction.policy.fast.native_norms import LAST, PLAIN, RELU, How, in_rows, is_plain_norm, is_plain_tensor

PLACES = {1: 512, 3: 144}  # that come out, by the windows' side, up to which it is faster to read each weight once
BESIDE_TILES = 64  # the same, where there may be tiles
FEWEST = 16  # tiles, from which they are faster than oneDNN, once the weights are laid
Weights = WeakValueDictionary[tuple[object, ...], Any]
"""Weights as they are read, by their layer and what reads them: shared by all shapes, and gone with the last."""


class PackedConvolution:
    """Do what a convolution and its norm do, for pictures of one shape, with the weights that they have now.

    Args:
        weights: of all convolutions of the network, as they are now; what is missing comes to them.
        dtype: that weights are kept in where few places are seen.
    """

    def __init__(self, layer: nn.Conv2d, norm: nn.Module, weights: Weights, dtype: torch.dtype) -> None:
        self._layer, self._norm, self._weights, self._dtype = layer, norm, weights, dtype
        self._folds = isinstance(norm, nn.BatchNorm2d)
        self._convolve: Callable[..., Tensor] | None = None
        self._adds = self._normalises = False

    def __call__(self, x: Tensor, *, rectify: bool = False, residual: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W'), add `residual` to it, and then take ReLU of it if told to."""
        convolve = self._convolve or self._make(x)
        if self._adds and residual is not None:
            hidden, residual = convolve(x, residual), None
        else:
            hidden = convolve(x)
        if self._normalises and (residual is None or residual.shape == hidden.shape):
            return normalise(cast(nn.GroupNorm, self._norm), hidden, residual, RELU if rectify else PLAIN)
        hidden = hidden if self._folds else self._norm(hidden)
        hidden = hidden if residual is None else hidden.add_(residual)
        return hidden.relu_() if rectify else hidden  # oneDNN's makes 0 of what is no number

    def _make(self, x: Tensor) -> Callable[..., Tensor]:
        weight, bias = self._layer.weight.detach(), self._layer.bias
        bias = None if bias is None else bias.detach().contiguous()
        if isinstance(norm := self._norm, nn.BatchNorm2d):
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            folded, own = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, norm.weight, norm.bias)
            weight, bias = folded.detach(), own.detach()
        has_c = native_layers.works() and self._fits(x, weight, bias)
        self._normalises = has_c and isinstance(norm, nn.GroupNorm) and self._normalises_by_c(norm, x)
        has_tiles = has_c and self._takes_tiles(x, weight, bias)
        if has_c and self._sees_few(x, has_tiles):
            convolve = self._few(weight, bias)
        elif has_tiles:
            convolve = self._tiles(x, weight, bias)
        else:
            convolve, self._adds = self._pack(x, weight, bias), self._folds
        self._convolve = convolve
        return convolve

    def _fits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Tell whether all is as the layer says: C does not look, PyTorch says what does not fit."""
        if weight.shape[1:] != (x.shape[1], *self._layer.kernel_size) or min(sides_of(x, *windows_of(self._layer))) < 1:
            return False
        if bias is not None and (bias.shape != weight.shape[:1] or not is_plain_tensor(bias)):
            return False
        return is_plain_tensor(x) and is_plain_tensor(weight) and x.is_contiguous(memory_format=LAST)

    def _normalises_by_c(self, norm: nn.GroupNorm, x: Tensor) -> bool:
        channels, groups = len(self._layer.weight), norm.num_groups
        if not is_plain_norm(norm) or norm.weight.shape != (channels,) or channels % groups:
            return False
        return (
            norm.num_channels == channels
            and len(x) * channels // groups * math.prod(sides_of(x, *windows_of(self._layer))) > 1
        )

    def _sees_few(self, x: Tensor, has_tiles: bool) -> bool:
        windows = windows_of(self._layer)
        if any(pair[0] != pair[1] for pair in windows):
            return False
        most = BESIDE_TILES if has_tiles else PLACES.get(self._layer.kernel_size[0], 0)
        return len(x) * math.prod(sides_of(x, *windows)) <= most

    def _takes_tiles(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        windows = self._layer.stride, self._layer.padding
        return windows == ((1, 1), (1, 1)) and native_winograd.takes(x, weight, bias, 1, 1, fewest=FEWEST)

    def _few(self, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
        return self._once((self._dtype,), lambda: FewPlaces(self._layer, weight, bias, self._dtype))

    def _tiles(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
        convolver = native_winograd.find_winograd()
        assert convolver is not None
        tile = native_winograd.tile_of(x)
        panels = self._once((tile,), lambda: convolver.lay(tile, weight))
        return partial(convolver.convolve, weight=self._layer.weight.detach(), bias=bias, panels=panels)

    def _once[Made](self, how: tuple[object, ...], make: Callable[[], Made]) -> Made:
        key = self._layer, *how
        made: Made | None = self._weights.get(key)
        if made is None:
            self._weights[key] = made = make()
        return made

    def _pack(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
        window = list(self._layer.padding), list(self._layer.stride), list(self._layer.dilation), self._layer.groups
        last = weight.contiguous(memory_format=LAST)
        packed = torch.ops.mkldnn._reorder_convolution_weight(last, *window, x.shape)

        def convolve(x: Tensor, residual: Tensor | None = None) -> Tensor:
            run = torch.ops.mkldnn._convolution_pointwise
            if residual is None:
                return run(x, packed, bias, *window, "none", [], "")
            return run(x, residual, packed, bias, *window, "add", None, None, [], None)

        return convolve


def normalise(norm: nn.GroupNorm, x: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    """Do what group norm does to x (B, C, H, W), add `residual`, and go on with the activation."""
    how = How(activation, norm.num_groups, norm.eps)
    residual = None if residual is None else in_rows(residual)
    return native_norms.found().forwards(how, in_rows(x), None, norm.weight, norm.bias, None, residual)[0]
