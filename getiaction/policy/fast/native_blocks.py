"""Learn on a CPU with a residual block of the U-Net as one call of C each way: `native_blocks.c`.

Two convolutions, two norms, FiLM and what is added are fifty of PyTorch's operations for some hundred thousand numbers,
and oneDNN's convolutions of so few channels take up to twice as long as the products that they are. Here a few samples
at a time go through the whole block while a cache holds them, and windows of a convolution, which are numbers in order
where channels lie last, are multiplied where they lie, without padding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy.fast.activation import Mish
from getiaction.policy.fast.convolution import Conv1d, is_plain
from getiaction.policy.fast.native import find_library
from getiaction.policy.fast.native_norms import (
    FLOATS,
    LAST,
    MISH,
    Between,
    at,
    expect_plain,
    halves,
    is_plain_norm,
    is_plain_tensor,
    once,
)
from getiaction.policy.fast.watch import is_watched

FLOAT = 4  # bytes
WIDEST, LARGEST = 256, 2**16  # channels, and channels times channels, up to which it was faster: benchmarks/NOTES.md


class Convolution(ctypes.Structure):
    """Say where a convolution's weights lie: `convolution` of `native_blocks.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("channels", "out_channels", "kernel")),
        *((name, ctypes.c_int64) for name in ("out_stride", "in_stride", "tap_stride")),
        *((name, ctypes.c_void_p) for name in ("panels", "turned", "by_weight")),
        *((name, ctypes.c_int64) for name in ("by_out_stride", "by_in_stride", "by_tap_stride")),
    )


class Block(ctypes.Structure):
    """Say what to do with which memory: `block` of `native_blocks.c`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "steps")),
        *((name, Convolution) for name in ("first", "second", "around")),
        ("norms", Between * 2),
        *((name, ctypes.c_void_p) for name in ("x", "gradient")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_step", "gradient_batch", "gradient_step")),
        *((name, ctypes.c_void_p * 2) for name in ("padded", "hidden", "by_hidden")),
        *((name, ctypes.c_void_p) for name in ("by_x", "by_bias", "scratch")),
    )


class Blocks:
    """Hold the compiled operations."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._run_block = functions.run_block
        self._run_block.argtypes, self._run_block.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), None
        self.panel_numbers, self.scratch_size = functions.panel_numbers, functions.block_scratch
        for one in (self.panel_numbers, self.scratch_size):
            one.argtypes, one.restype = (ctypes.c_int64, ctypes.c_int64), ctypes.c_int64
        functions.block_size.restype = ctypes.c_int64
        assert functions.block_size() == ctypes.sizeof(Block)

    def run(self, one: Block, *, is_backwards: bool, threads: int) -> None:
        """Do a block forwards or backwards."""
        self._run_block(ctypes.addressof(one), is_backwards, threads)


class Sizes(NamedTuple):
    """Hold B, T, C, C', the taps of both convolutions, and the groups of both norms."""

    batch: int
    steps: int
    wide: int
    high: int
    kernel: int
    groups: int

    @property
    def long(self) -> int:
        """Return T with what is padded."""
        return self.steps + self.kernel - 1

    def kept(self) -> tuple[int, ...]:
        """Return how many numbers are kept for the way back: padded inputs, what comes of them, and moments."""
        out, moments = self.batch * self.steps * self.high, self.batch * self.groups * 2
        return self.batch * self.long * self.wide, self.batch * self.long * self.high, out, out, moments, moments

    def panels(self, *, turned: bool) -> list[tuple[int, int]]:
        """Return the columns and rows of the weights of both convolutions, and of the residual one."""
        if turned:
            return [(self.wide, self.kernel * self.high), (self.high, self.kernel * self.high), (self.wide, self.high)]
        return [(self.high, self.kernel * self.wide), (self.high, self.kernel * self.high), (self.high, self.wide)]


class _Block(torch.autograd.Function):
    """Do what a residual block does to x (B, C, 1, T): (B, C', 1, T).

    Its weights are those of two convolutions, each followed by its bias and its norm's two, and those of the residual
    convolution, or None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, film: Tensor, how: tuple[int, float, float], *weights: Tensor | None) -> Tensor:
        x, film = in_rows(x), film if film.stride(-1) == 1 else film.contiguous()
        one, sizes = describe(x, film, how, weights)
        kept, places = carve(*sizes.kept())
        place(one, sizes, places)
        out = torch.empty((sizes.batch, sizes.high, 1, sizes.steps), memory_format=LAST, **FLOATS)
        one.norms[1].out = out.data_ptr()
        run(one, sizes, "panels", is_backwards=False)
        ctx.save_for_backward(x, film, kept, *weights)
        ctx.how = how
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, film, kept, *weights = saved = ctx.saved_tensors
        expect_plain(gradients[0], *saved)
        gradient = in_rows(gradients[0])
        x, film = in_rows(x), film if film.stride(-1) == 1 else film.contiguous()  # hooks may have saved them otherwise
        one, sizes = describe(x, film, ctx.how, weights)
        place(one, sizes, addresses(kept, sizes.kept()))
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = torch.empty((sizes.batch, sizes.wide, 1, sizes.steps), memory_format=LAST, **FLOATS)
        by_film, by_affine = torch.empty_like(film), torch.empty(2, 3, sizes.high, **FLOATS)
        by_bias = torch.empty(sizes.high, **FLOATS)
        by_weights = [None if weight is None else torch.empty_like(weight) for weight in weights[::4]]
        for layer, by_weight in zip((one.first, one.second, one.around), by_weights, strict=True):
            if by_weight is not None:
                layer.by_weight = by_weight.data_ptr()
                layer.by_out_stride, layer.by_in_stride, layer.by_tap_stride = by_weight.stride()
        one.by_x, one.by_bias = at(by_x), by_bias.data_ptr()
        first, second = one.norms
        came = gradient.data_ptr(), gradient.stride(0), gradient.stride(3)
        one.gradient, one.gradient_batch, one.gradient_step = came
        second.gradient, second.gradient_batch, second.gradient_place = came
        room, places = carve(*(sizes.batch * sizes.long * sizes.high,) * 2, *(sizes.batch * 3 * sizes.high,) * 2)
        for number, norm in enumerate(one.norms):
            one.by_hidden[number], norm.samples = places[number], places[2 + number]
            norm.by_affine = by_affine[number].data_ptr()
            norm.by_x = places[number] + FLOAT * (sizes.kernel // 2) * sizes.high
            norm.by_x_batch, norm.by_x_place = sizes.long * sizes.high, sizes.high
        first.by_scale, first.by_shift, first.by_film_batch = halves(by_film, sizes.high)
        first.gradient_batch, first.gradient_place = sizes.steps * sizes.high, sizes.high
        run(one, sizes, "turned", is_backwards=True)
        del room
        by_first, by_second, by_around = by_weights
        (start, weight, bias), (start2, weight2, bias2) = (numbers.unbind() for numbers in by_affine.unbind())
        by_around_bias = None if by_around is None else by_bias
        affine = by_first, start, weight, bias, by_second, start2, weight2, bias2
        return by_x, by_film, None, *affine, by_around, by_around_bias


def describe(
    x: Tensor, film: Tensor, how: tuple[int, float, float], weights: Sequence[Tensor | None]
) -> tuple[Block, Sizes]:
    """Say where a block's inputs and weights lie, and how large everything is."""
    groups, *epsilons = how
    first, second, around = cast(Tensor, weights[0]), cast(Tensor, weights[4]), weights[8]
    sizes = Sizes(len(x), x.shape[3], first.shape[1], first.shape[0], first.shape[2], groups)
    one = Block(batch=sizes.batch, steps=sizes.steps)
    one.x, one.x_batch, one.x_step = x.data_ptr(), x.stride(0), x.stride(3)
    for layer, weight in zip((one.first, one.second, one.around), (first, second, around), strict=True):
        if weight is not None:
            layer.weight = weight.data_ptr()
            layer.out_channels, layer.channels, layer.kernel = weight.shape
            layer.out_stride, layer.in_stride, layer.tap_stride = weight.stride()
    one.around.bias = at(weights[9])
    for norm, eps, (start, weight, bias) in zip(one.norms, epsilons, (weights[1:4], weights[5:8]), strict=True):
        norm.activation, norm.groups, norm.eps = MISH, groups, eps
        norm.batch, norm.places, norm.channels = sizes.batch, sizes.steps, sizes.high
        norm.start, norm.weight, norm.bias = at(start), at(weight), at(bias)
        norm.x_batch, norm.x_place = sizes.steps * sizes.high, sizes.high
        norm.out_batch, norm.out_place = norm.x_batch, norm.x_place
    first_norm, last_norm = one.norms
    first_norm.scale, first_norm.shift, first_norm.film_batch = halves(film, sizes.high)
    first_norm.out_batch = sizes.long * sizes.high
    if around is None:
        last_norm.added, last_norm.added_batch, last_norm.added_place = one.x, one.x_batch, one.x_step
    else:
        last_norm.added_batch, last_norm.added_place = last_norm.x_batch, last_norm.x_place
    return one, sizes


def place(one: Block, sizes: Sizes, places: Sequence[int]) -> None:
    """Say where lies what is kept for the way back."""
    for number, norm in enumerate(one.norms):
        one.padded[number], one.hidden[number], norm.moments = places[number::2]
        norm.x = one.hidden[number]
    one.norms[0].out = one.padded[1] + FLOAT * (sizes.kernel // 2) * sizes.high


def run(one: Block, sizes: Sizes, name: str, *, is_backwards: bool) -> None:
    """Do a block forwards or backwards, with room for its weights in panels, and for its threads."""
    blocks, threads = found(), torch.get_num_threads()
    numbers = [blocks.panel_numbers(*shape) for shape in sizes.panels(turned=is_backwards)]
    room, (*panels, scratch) = carve(*numbers, threads * blocks.scratch_size(sizes.steps, sizes.high))
    for layer, panel in zip((one.first, one.second, one.around), panels, strict=True):
        setattr(layer, name, panel)
    one.scratch = scratch
    blocks.run(one, is_backwards=is_backwards, threads=threads)
    del room


def carve(*sizes: int) -> tuple[Tensor, list[int]]:
    """Return memory for so many numbers each, and where each lies."""
    memory = torch.empty(sum(sizes), **FLOATS)
    return memory, addresses(memory, sizes)


def addresses(memory: Tensor, sizes: Sequence[int]) -> list[int]:
    """Return where each part lies."""
    start = memory.data_ptr()
    return [start + FLOAT * before for before in accumulate(sizes[:-1], initial=0)]


def in_rows(x: Tensor) -> Tensor:
    """Return x (B, C, 1, T) with its channels in order."""
    return x if x.stride(1) == 1 and 0 not in x.stride() else x.contiguous(memory_format=LAST)


def takes(block: Any, x: Tensor, film: Tensor) -> bool:
    """Tell whether a block can be done here, and is faster so: as `ResidualBlock` makes it, and nobody listens."""
    from getiaction.policy.unet import ConvBlock, ResidualBlock

    around = block.residual_conv
    if [type(one) for one in (block, block.conv1, block.conv2)] != [ResidualBlock, ConvBlock, ConvBlock]:
        return False
    pairs = block.conv1.block, block.conv2.block
    if any([type(layer) for layer in pair] != [Conv1d, nn.GroupNorm, Mish] for pair in pairs):
        return False
    (first, norm, _), (second, norm2, _) = pairs
    high, wide, kernel = first.weight.shape
    if high > WIDEST or wide * high > LARGEST or kernel % 2 == 0 or norm.num_groups != norm2.num_groups:
        return False
    if x.shape[1:3] != (wide, 1) or film.shape != (len(x), high * (1 + block.film_scale)) or not is_plain_tensor(film):
        return False
    if not is_same(first, (high, wide, kernel)) or not is_same(second, (high, high, kernel)):
        return False
    if not all(norm.num_channels == high and is_plain_norm(norm) for norm in (norm, norm2)):
        return False
    is_added = type(around) is nn.Identity and wide == high
    if not is_added and not (type(around) is Conv1d and is_same(around, (high, wide, 1))):
        return False
    return not is_watched(block, block.conv1, block.conv2, *pairs, *pairs[0], *pairs[1], around)


def is_same(layer: Conv1d, shape: tuple[int, int, int]) -> bool:
    """Tell whether a convolution of this shape, (C', C, k), leaves as many moments as it saw, and has a bias."""
    if layer.stride != (1,) or layer.padding != (shape[2] // 2,) or not is_plain(layer) or layer.weight.shape != shape:
        return False
    bias = layer.bias
    return is_plain_tensor(layer.weight) and bias is not None and is_plain_tensor(bias) and bias.is_contiguous()


def run_block(block: Any, x: Tensor, film: Tensor) -> Tensor:
    """Do what `ResidualBlock.modulate` does to x (B, C, 1, T): (B, C', 1, T)."""
    (first, norm, _), (second, norm2, _), around = block.conv1.block, block.conv2.block, block.residual_conv
    way = (None, None) if isinstance(around, nn.Identity) else (around.weight, around.bias)
    numbers = first.weight, first.bias, norm.weight, norm.bias, second.weight, second.bias, norm2.weight, norm2.bias
    return cast(Tensor, _Block.apply(x, film, (norm.num_groups, norm.eps, norm2.eps), *numbers, *way))


def found() -> Blocks:
    """Return the compiled operations, which are there."""
    blocks = find_blocks()
    assert blocks is not None
    return blocks


@cache
def find_blocks() -> Blocks | None:
    """Return the compiled operations, or None where they cannot be had."""
    return None if (library := find_library()) is None else Blocks(library.functions)


def compare() -> None:
    """Compare blocks with and without a residual convolution, and their gradients, with PyTorch's in float64.

    Raises:
        ArithmeticError: they are not the same to rounding.
    """
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw, device="cpu", dtype=torch.float32) * scale).requires_grad_()

    for wide, high, steps, values in (40, 56, 4, 112), (56, 56, 7, 56):
        x, film = drawn(3, 1, steps, wide).movedim(3, 1), drawn(3, values)
        numbers = [drawn(high, wide, 5, scale=0.1), *(drawn(high) for _ in range(3))]
        numbers += [drawn(high, high, 5, scale=0.1), *(drawn(high) for _ in range(3))]
        way = [] if wide == high else [drawn(high, wide, 1, scale=0.1), drawn(high)]
        given = [x, film, *numbers, *way]
        exact = [one.double() for one in given]
        ours = _Block.apply(x, film, (8, 1e-5, 1e-5), *numbers, *(way or (None, None)))
        theirs = plainly(*exact)
        found = torch.autograd.grad(ours, given, ours.detach())
        wanted = torch.autograd.grad(theirs, exact, theirs.detach())
        for one, other in zip((ours, *found), (theirs, *wanted), strict=True):
            if not float((one - other).detach().norm()) < 1e-4 * float(other.detach().norm()):
                raise ArithmeticError("blocks compute something else")


def plainly(x: Tensor, film: Tensor, *weights: Tensor) -> Tensor:
    """Do what a block does to x (B, C, 1, T) by PyTorch's operations, with norms of 8 groups."""
    (first, *numbers), (second, *numbers2), way = weights[:4], weights[4:8], weights[8:]
    seen, edge = x[:, :, 0], first.shape[2] // 2
    hidden = functional.group_norm(functional.conv1d(seen, first, numbers[0], padding=edge), 8, numbers[1], numbers[2])
    *scale, shift = film[:, :, None].split(len(first), dim=1)
    hidden = functional.mish(hidden) * (scale[0] if scale else 1) + shift
    hidden = functional.conv1d(hidden, second, numbers2[0], padding=edge)
    hidden = functional.mish(functional.group_norm(hidden, 8, numbers2[1], numbers2[2]))
    return (hidden + (functional.conv1d(seen, way[0], way[1]) if way else seen))[:, :, None]
