"""The layers of networks that learn on a CPU in float32, with what lies between convolutions by `native_norms`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy.fast import native_blocks, native_pictures
from getiaction.policy.fast.convolution import (
    MOMENTS,
    Conv1d,
    Conv2d,
    channels_last,
    is_faster_by_taps,
    is_picture_faster_by_taps,
)
from getiaction.policy.fast.native_norms import (
    FLOATS,
    MISH,
    PLAIN,
    RELU,
    find_norms,
    is_plain_norm,
    normalise_batch,
    normalise_groups,
)
from getiaction.policy.fast.residual import all_pairs_of, blocks_of, is_residual, pairs_of, way_around
from getiaction.policy.fast.taps import convolve_by_taps

log = logging.getLogger(__name__)
MANY = 2**20  # numbers of a map of pictures, below which a call of Python's costs more than it saves


def use_native(module: nn.Module) -> bool:
    """Let what lies between convolutions below `module` learn by C, in float32 on a CPU; tell whether it can."""
    if not works():
        return False
    for layer in module.modules():
        if hasattr(layer, "by_native"):
            layer.by_native = True  # type: ignore[assignment]
    return True


# --- the U-Net --------------------------------------------------------------------------------------------------------


def films(layers: Sequence[nn.Linear], cond: Tensor) -> tuple[Tensor, ...]:
    """Do what linear layers of one input do, as one product: (B, C) to (B, C'), each its own C'."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return functional.linear(cond, weight, bias).split([layer.out_features for layer in layers], dim=1)


def takes(norm: nn.GroupNorm, _: int) -> bool:
    """Tell whether a norm can be done here."""
    return is_plain_norm(norm)


def convolve_and_normalise(
    layer: Conv1d, norm: nn.GroupNorm, x: Tensor, film: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Convolve x (B, C, 1, T), normalise, Mish, FiLM (B, C' or 2C'), add `residual` (B, C', 1, T'): (B, C', 1, T')."""
    if layer.by_taps and is_faster_by_taps(layer, x, MOMENTS):
        weight, start, *window = layer.as_in_2d()
        hidden = convolve_by_taps(x, weight, None, *window)
    else:
        hidden, start = layer(x), None
    if hidden.shape[1] != norm.num_channels or (residual is not None and residual.shape != hidden.shape):
        return plainly(norm, MISH, x=hidden, start=start, film=film, added=residual)  # which says what does not fit
    return normalise_groups(norm, hidden, start, film, residual, activation=MISH)


# --- the ResNet -------------------------------------------------------------------------------------------------------


def takes_pictures(backbone: nn.Sequential) -> bool:
    """Tell whether `run` can do what a network does: a torchvision ResNet without its head, which learns."""
    return is_residual(backbone) and all(takes_norm(norm) for _, norm in all_pairs_of(backbone))


def takes_norm(norm: nn.Module) -> bool:
    """Tell whether a norm of pictures can be done here."""
    if type(norm) is nn.BatchNorm2d:
        counts = norm.running_mean is None or norm.momentum is not None
        return norm.training and counts and is_plain_norm(norm)
    return type(norm) is nn.GroupNorm and is_plain_norm(norm)


def run(backbone: nn.Sequential, pictures: Tensor, ranges: None = None) -> Tensor:
    """Do what such a network does: (B, C, H, W), normalised before, to (B, C', h, w)."""
    layers: list[Any] = list(backbone)
    x = layers[3](normalise(layers[1], convolve(layers[0], pictures), RELU))
    for block in blocks_of(backbone):
        way = way_around(block)
        residual = x if way is None else normalise(way[1], convolve(way[0], x), PLAIN)
        *firsts, (last, last_norm) = pairs_of(block)
        for convolution, norm in firsts:
            x = normalise(norm, convolve(convolution, x), RELU)
        x = normalise(last_norm, convolve(last, x), RELU, residual)
    return channels_last(x)


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Do what a convolution does to x (B, C, H, W): its channels come to lie last, samples and places in any order."""
    if isinstance(layer, Conv2d) and is_picture_faster_by_taps(layer, x):
        sizes = (layer.stride[0], layer.stride[1]), (int(layer.padding[0]), int(layer.padding[1]))
        return convolve_by_taps(x, layer.weight, layer.bias, *sizes)
    return cast(Tensor, layer(channels_last(x)))


def normalise(norm: nn.Module, x: Tensor, activation: int, added: Tensor | None = None) -> Tensor:
    """Do what a norm does to x (B, C, H, W), add `added`, rectify."""
    if x.numel() < MANY:
        hidden = norm(channels_last(x))
        hidden = hidden if added is None else hidden.add_(added)
        return functional.relu(hidden, inplace=True) if activation == RELU else hidden
    if isinstance(norm, nn.GroupNorm):
        return normalise_groups(norm, x, added=added, activation=activation)
    assert isinstance(norm, nn.BatchNorm2d)
    return normalise_batch(norm, x, added, activation=activation)


# --- the trial --------------------------------------------------------------------------------------------------------


@cache
def works() -> bool:
    """Tell whether there are compiled operations, and they compute what PyTorch's do."""
    if find_norms() is None or native_blocks.find_blocks() is None or native_pictures.find_pictures() is None:
        return False
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        try:
            compare()
            native_blocks.compare()
            native_pictures.compare()
        except ArithmeticError as error:
            log.warning(
                "native_norms.c cannot be used (%s): training, and acting from pictures, take longer on this CPU", error
            )
            return False
    return True


def compare() -> None:
    """Compare each way from convolution to convolution, and its gradients, with PyTorch's in float64.

    Raises:
        ArithmeticError: they are not the same to rounding.
    """
    draw, batch, channels = torch.Generator().manual_seed(0), 3, 40
    shapes = {"x": (batch, channels, 1, 19), "start": (channels,), "film": (batch, 2 * channels)}
    shapes["added"] = shapes["x"]
    drawn = {name: torch.randn(shape, generator=draw, **FLOATS).requires_grad_() for name, shape in shapes.items()}
    norms = nn.GroupNorm(4, channels, **FLOATS), nn.BatchNorm2d(channels, **FLOATS)
    for norm, activation, names in (
        (norms[0], MISH, ("x", "start", "film")),
        (norms[0], MISH, ("x", "added")),
        *((norm, RELU, ("x", "added")) for norm in norms),
        *((norm, RELU, ("x",)) for norm in norms),
        *((norm, PLAIN, ("x",)) for norm in norms),
    ):
        given, exact = {name: drawn[name] for name in names}, {name: drawn[name].double() for name in names}
        precise = copy.deepcopy(norm).double()
        if isinstance(norm, nn.GroupNorm):
            ours = normalise_groups(norm, activation=activation, **given)
        else:
            ours = normalise_batch(norm, activation=activation, **given)
        theirs = plainly(precise, activation, **exact)
        found = torch.autograd.grad(ours, [*given.values(), norm.weight, norm.bias], ours.detach())
        wanted = torch.autograd.grad(theirs, [*exact.values(), precise.weight, precise.bias], theirs.detach())
        for one, other in zip((ours, *found, *norm.buffers()), (theirs, *wanted, *precise.buffers()), strict=True):
            if not torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-4):
                raise ArithmeticError("it computes something else")


def plainly(
    norm: nn.Module,
    activation: int,
    *,
    x: Tensor,
    start: Tensor | None = None,
    film: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """Do what comes between convolutions by PyTorch's operations, to x (B, C, h, w)."""
    hidden = norm(x if start is None else x + start[:, None, None])
    if activation == MISH:
        hidden = functional.mish(hidden)
        if film is not None:
            *scale, shift = film[..., None, None].split(hidden.shape[1], dim=1)
            hidden = scale[0] * hidden + shift if scale else hidden + shift
    hidden = hidden if added is None else hidden + added
    return functional.relu(hidden) if activation == RELU else hidden
