"""Denoise on the CPU with as few operations as can be: the U-Net as a flat list of them.

Who acts asks for one row, or a few. A layer then takes microseconds, and what costs is all that lies around it:
modules, tensors that come and go, copies from one memory order to another. Here the same sums are a list of PyTorch
calls on tensors that were made beforehand. Time comes before channels in memory, (B, T, C), so that a convolution is
one copy, of its windows, and one matrix product that takes the weights as they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from getiaction.policy.fast.activation import mish_
from getiaction.policy.fast.convolution import Conv1d, ConvTranspose1d
from getiaction.policy.fast.copies import Copies, Copy, OtherLayerError, Stamp, read_faster_in_columns
from getiaction.policy.fast.modulation import Modulation
from getiaction.policy.unet import ConditionalUnet1d, ConvBlock, ResidualBlock, levels

LARGE = 2**16  # weights that are worth a second thread
FEW = 32  # rows of a product that the library does in one thread


def exactly[Layer: nn.Module](layer: nn.Module, kind: type[Layer]) -> Layer:
    """Return a layer, which must be of this kind and no other, and whose weights must lie in order.

    Raises:
        OtherLayerError: it is not.
    """
    if type(layer) is not kind or not all(weight.is_contiguous() for weight in layer.parameters(recurse=False)):
        raise OtherLayerError
    return cast(Layer, layer)


@dataclass(frozen=True)
class Plan:
    """Say what a U-Net is unrolled for: B, T, S denoising steps, the type that products are computed in, threads."""

    batch_size: int
    horizon: int
    num_steps: int
    dtype: torch.dtype
    threads: int


def multiplied_in(unet: nn.Module) -> torch.dtype:
    """Return the type that products are computed in: autocast's, else that of the weights."""
    own = next(unet.parameters()).dtype
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") and own == torch.float32 else own


@dataclass
class Position:
    """Say at which denoising step it is."""

    step: int = 0


@dataclass(frozen=True)
class Track:
    """Hold a sequence, (B, T, C), between margins of zeros, for the convolutions that look past its ends."""

    padded: Tensor  # (B, margin + T + margin, C)
    margin: int

    @property
    def inner(self) -> Tensor:
        """Return the sequence, (B, T, C)."""
        return self.padded[:, self.margin : self.padded.shape[1] - self.margin]


class UnrolledUnet:
    """Do what `ConditionalUnet1d.denoise` does, for one batch of observations after the other.

    Args:
        unet: its weights are used where they lie, or copied from there, and may change there between two `look`s.
    """

    modulates_in: torch.dtype | None = None  # None: the plan's type

    def __init__(self, unet: ConditionalUnet1d, plan: Plan, copies: Copies) -> None:
        self._plan, self._like, self._at = plan, next(unet.parameters()), Position()
        self._shared, self._copies = copies, list[Copy]()  # of weights; those that are used here
        self._calls: list[Callable[[], object]] = []
        blocks = [exactly(block, ResidualBlock) for block in unet.blocks()]
        layers = [exactly(block.cond_encoder[1], nn.Linear) for block in blocks]
        dtype = self.modulates_in or plan.dtype
        modulation = copies.once(("modulation", dtype), lambda: Modulation(unet, layers, dtype))
        self._modulation, self._values = modulation, self._new(plan.num_steps, plan.batch_size, sum(modulation.sizes))
        self._films = iter(self._values.split(modulation.sizes, dim=2))  # (S, B, C' or 2C') for each block
        self._margin = max(unet.kernel_size // 2, 1)
        self._input = x = self._track(plan.horizon, unet.action_dim)
        skips = []
        for first, second, halve in levels(unet.down_modules):
            x = self._block(second, self._block(first, x))
            skips.append(x)
            if not isinstance(halve, nn.Identity):
                x = self._keep(self._convolve(halve, x))
        for middle in unet.mid_modules:
            x = self._block(middle, x)
        for first, second, double in levels(unet.up_modules):
            x = self._block(second, self._block(first, self._join(x, skips.pop())))
            x = self._double(double, x)
        convolution, norm, _ = exactly(unet.final_conv[0], ConvBlock).block
        self._output = self._convolve(unet.final_conv[1], self._normalise(norm, self._convolve(convolution, x)))
        self._stamp = Stamp(copy.weight for copy in self._copies)
        del self._films

    @torch.inference_mode()
    def look(self, timesteps: Tensor, cond: Tensor) -> None:
        """Take in the steps to denoise at, (S,), new observations, (B, cond_dim) encoded, and what weights are now."""
        self._modulation(timesteps, cond, self._values)
        if self._stamp.changed():
            for copy in self._copies:
                copy.refresh()
            self._stamp.keep()

    @torch.inference_mode()
    def __call__(self, noisy_actions: Tensor, number: int) -> Tensor:
        """Predict (B, T, Da) from (B, T, Da) at the denoising step `number`, counted from 0."""
        self._at.step = number
        with torch.autocast("cpu", enabled=False):
            self._input.inner.copy_(noisy_actions)
            for call in self._calls:
                call()
            return self._output.clone()

    def _block(self, block: nn.Module, x: Track) -> Track:
        block = exactly(block, ResidualBlock)
        convolution, norm, _ = block.conv1.block
        hidden = self._convolve(convolution, x)  # (B, T, C')
        film = next(self._films)
        if film.shape[2] != hidden.shape[2] * (2 if block.film_scale else 1):
            raise OtherLayerError
        track = self._normalise(norm, hidden, film=film, scales=block.film_scale)
        convolution, norm, _ = block.conv2.block
        around = block.residual_conv
        residual = x.inner if isinstance(around, nn.Identity) else self._convolve(around, x)
        return self._normalise(norm, self._convolve(convolution, track), residual=residual)

    def _convolve(self, layer: nn.Module, x: Track) -> Tensor:
        """Convolve into a new (B, T', C'): copy the windows, multiply."""
        if type(layer) is not Conv1d:
            raise OtherLayerError
        size, ends = layer.kernel_size[0], self._margin - int(layer.padding[0])
        windows = x.padded[:, ends : x.padded.shape[1] - ends].unfold(1, size, layer.stride[0])  # (B, T', C, k)
        weight = layer.weight  # (C', C, k)
        if not weight.is_contiguous():  # the channels lie last: see `use_taps`
            windows, weight = windows.transpose(2, 3), weight.transpose(1, 2)
        if not weight.is_contiguous():
            raise OtherLayerError
        rows = self._new(*windows.shape, dtype=self._plan.dtype)
        self._calls.append(partial(rows.copy_, windows))
        return self._multiply(rows.flatten(2), weight.flatten(1), layer.bias)

    def _multiply(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply (B, T, K) by the transpose of (C, K) into a new (B, T, C)."""
        (channels, size), rows, threads = weight.shape, rows.flatten(0, 1), self._plan.threads  # rows: (B T, K)
        weight, bias = weight.detach(), bias.detach() if bias is not None else None
        copies = weight.dtype != self._plan.dtype
        product = self._new(len(rows), channels)
        split = threads > 1 and channels % threads == 0 and channels * size > LARGE and len(rows) <= FEW
        if copies:
            weight = self._copy_of(weight, weight)
        if split:  # the library leaves few rows to one thread: a part of C for each
            columns = weight.unflatten(0, (threads, -1)).transpose(1, 2)  # (parts, K, C / parts)
            if not copies and read_faster_in_columns():
                columns = self._copy_of(weight, columns)
            out = self._new(threads, len(rows), channels // threads, dtype=self._plan.dtype)
            self._calls.append(partial(torch.bmm, rows.expand(threads, *rows.shape), columns, out=out))
            joined, out = product.unflatten(1, (threads, -1)), out.transpose(0, 1)  # (B T, parts, C / parts) both
            bias = bias.view(threads, -1) if bias is not None else None
        elif bias is not None and not copies:
            self._calls.append(partial(torch.addmm, bias, rows, weight.t(), out=product))
            return product.unflatten(0, (self._plan.batch_size, -1))
        else:
            joined, out = product, self._new(*product.shape, dtype=self._plan.dtype)
            self._calls.append(partial(torch.mm, rows, weight.t(), out=out))
        self._calls.append(
            partial(torch.add, out, bias, out=joined) if bias is not None else partial(joined.copy_, out)
        )
        return product.unflatten(0, (self._plan.batch_size, -1))

    def _copy_of(self, weight: Tensor, source: Tensor) -> Tensor:
        self._copies.append(self._shared.find(weight, source, self._plan.dtype))
        return self._copies[-1].copy

    def _normalise(
        self,
        norm: nn.Module,
        x: Tensor,
        *,
        film: Tensor | None = None,
        scales: bool = False,
        residual: Tensor | None = None,
    ) -> Track:
        """Normalise groups of (B, T, C), Mish, then FiLM or add what went around, into a new track."""
        norm, track = exactly(norm, nn.GroupNorm), self._track(x.shape[1], x.shape[2])
        sizes = (x.shape[0], x.shape[2], x.shape[1])  # B, C, T
        pictures, out, at = as_picture(x), as_picture(track.inner), self._at  # not self, whom its calls would hold
        affine = norm.weight.detach(), norm.bias.detach()
        groups = partial(torch.native_group_norm, pictures, *affine, *sizes, norm.num_groups, norm.eps)
        if film is not None:
            values = film[..., None, None]  # (S, B, C' or 2C', 1, 1)
            if scales:
                scale, bias = (part.unbind(0) for part in values.chunk(2, dim=2))
                self._calls.append(lambda: torch.addcmul(bias[at.step], mish_(groups()[0]), scale[at.step], out=out))
            else:
                bias = values.unbind(0)
                self._calls.append(lambda: torch.add(mish_(groups()[0]), bias[at.step], out=out))
        elif residual is not None:
            around = as_picture(residual)
            self._calls.append(lambda: torch.add(mish_(groups()[0]), around, out=out))
        else:
            self._calls.append(lambda: out.copy_(mish_(groups()[0])))
        return track

    def _double(self, layer: nn.Module, x: Track) -> Track:
        """Double the resolution: output 2t is w1 x(t) + w3 x(t - 1), output 2t + 1 is w2 x(t) + w0 x(t + 1)."""
        layer = exactly(layer, ConvTranspose1d)
        weight = layer.weight.flatten(1).t()  # (C' 4, C)
        products = self._multiply(self._copy(x.inner, self._plan.dtype), weight, None).unflatten(
            2, (-1, 4)
        )  # (B, T, C', 4)
        track = self._track(2 * x.inner.shape[1], products.shape[2])
        even, odd = track.inner[:, 0::2], track.inner[:, 1::2]
        w0, w1, w2, w3 = products.unbind(3)
        bias = cast(Tensor, layer.bias).detach()
        self._calls += [
            partial(torch.add, w1, bias, out=even),
            partial(torch.add, w2, bias, out=odd),
            partial(even[:, 1:].add_, w3[:, :-1]),
            partial(odd[:, :-1].add_, w0[:, 1:]),
        ]
        return track

    def _join(self, x: Track, skip: Track) -> Track:
        channels = x.inner.shape[2]
        both = self._track(x.inner.shape[1], channels + skip.inner.shape[2])
        self._calls.append(partial(both.inner[..., :channels].copy_, x.inner))
        self._calls.append(partial(both.inner[..., channels:].copy_, skip.inner))
        return both

    def _keep(self, x: Tensor) -> Track:
        track = self._track(*x.shape[1:])
        self._calls.append(partial(track.inner.copy_, x))
        return track

    def _copy(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        copy = self._new(*x.shape, dtype=dtype)
        self._calls.append(partial(copy.copy_, x))
        return copy

    def _track(self, steps: int, channels: int) -> Track:
        return Track(self._like.new_zeros(self._plan.batch_size, steps + 2 * self._margin, channels), self._margin)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._like.new_empty(shape, dtype=dtype)


def as_picture(x: Tensor) -> Tensor:
    """View (B, T, C) as a picture in channels-last order, (B, C, 1, T): group norm then takes it as it lies."""
    return x.transpose(1, 2)[:, :, None]
