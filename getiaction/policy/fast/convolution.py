"""Convolutions that do what PyTorch's do, and learn faster on the CPU.

Deep in a network hundreds of channels meet a handful of places: 2x2 pixels, 4 points in time. There oneDNN's gradient
of the weights takes up to ten times as long as the one matrix product that it is, which is what bf16 takes instead. In
float32 all three passes are products, one for each tap of the kernel, where `use_taps` asks for it. How much faster
this is, and where: benchmarks/NOTES.md.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from getiaction.policy.fast.beside import are_leaves, beside, lay_as
from getiaction.policy.fast.casts import cast, multiplied_in
from getiaction.policy.fast.kernels import few_kernels_for, has_tiles_for, kernels_for, native_convolution_for
from getiaction.policy.fast.taps import Pair, convolve_by_taps

# Samples times places, for each channel, up to which the product is faster, as measured: benchmarks/NOTES.md.
FEW = {torch.bfloat16: 3.0}
# Where a product for each tap is faster, as measured: from how many input channels on, up to how many places.
WIDE, MOMENTS, PIXELS = 256, 8, 16
PIXELS_BESIDE_TILES = 9  # where `native_winograd.py` has what is larger


class Conv1d(nn.Conv1d):
    """Do what `nn.Conv1d` does, also for (B, C, 1, T), whose channels may lie last in memory."""

    by_taps = False  # see `use_taps`
    by_library = False  # see `use_library`
    by_native = False  # see `native_layers.use_native`

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T) to (B, C', T'), or (B, C, 1, T) to (B, C', 1, T')."""
        if (fused := kernels_for(self, x)) is not None and is_plain(self):
            return fused.convolve(self, x)
        if self.by_taps and is_faster_by_taps(self, x, MOMENTS):
            picture = x if x.ndim == 4 else x[:, :, None]
            found = convolve_by_taps(picture, *self.as_in_2d())
            if x.ndim == 4 and self.by_native:
                return found
            return found.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else found[:, :, 0].contiguous()
        if pays(self, x):
            return convolve(self, x)
        if x.ndim == 4:
            return functional.conv2d(channels_last(x), *self.as_in_2d())
        if self.by_taps:  # its weights lie so that PyTorch would go through rows
            return functional.conv1d(x, self.weight.contiguous(), self.bias, self.stride, self.padding)
        return super().forward(x)

    def as_in_2d(self) -> tuple[Tensor, Tensor | None, Pair, Pair]:
        """Return weights, bias, stride and padding of the same convolution of (B, C, 1, T)."""
        return self.weight[:, :, None], self.bias, (1, self.stride[0]), (0, int(self.padding[0]))


class Conv2d(nn.Conv2d):
    """Do what `nn.Conv2d` does."""

    by_taps = False  # see `use_taps`
    by_library = False  # see `use_library`
    by_native = False  # see `native_layers.use_native`

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        if (few := few_kernels_for(self, x)) is not None:
            return few.convolve_picture(self, x)
        if is_picture_faster_by_taps(self, x):
            sizes = (self.stride[0], self.stride[1]), (int(self.padding[0]), int(self.padding[1]))
            return convolve_by_taps(x, self.weight, self.bias, *sizes).contiguous(memory_format=torch.channels_last)
        if learns_under_autocast(self, x):
            padding = int(self.padding[0]), int(self.padding[1])
            return _CastConvolution.apply(x, self.weight, self.bias, self.stride, padding)
        if (native := native_convolution_for(self, x)) is not None and is_plain(self):
            return native.convolve(self, x)
        return convolve(self, x) if pays(self, x) else super().forward(x)


class ConvTranspose1d(nn.ConvTranspose1d):
    """Do what `nn.ConvTranspose1d` does, also for (B, C, 1, T), whose channels may lie last in memory."""

    by_library = False  # see `use_library`

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map (B, C, T) to (B, C', T'), or (B, C, 1, T) to (B, C', 1, T')."""
        fused = kernels_for(self, x) if is_plain(self) and self.bias is not None else None
        if fused is not None and output_size is None and self.output_padding == (0,):
            return fused.convolve_transposed(self, x)
        if x.ndim == 3:
            return super().forward(x, output_size)
        stride, padding = (1, self.stride[0]), (0, int(self.padding[0]))
        return functional.conv_transpose2d(channels_last(x), self.weight[:, :, None], self.bias, stride, padding)


def channels_last(x: Tensor) -> Tensor:
    """Return x (B, C, h, w) as the library wants it, where its channels lie last, but samples not first."""
    return x.contiguous(memory_format=torch.channels_last) if x.stride(1) == 1 else x


def replace_convolutions(module: nn.Module) -> None:
    """Replace every plain `nn.Conv2d` below `module` by ours, with the same weights; grouped and dilated ones stay."""
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and is_plain(child):
            size = (child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding)
            ours = Conv2d(*size, bias=child.bias is not None, device="meta")  # type: ignore[arg-type]
            ours.weight, ours.bias = child.weight, child.bias
            setattr(module, name, ours)
        else:
            replace_convolutions(child)


def use_taps(module: nn.Module) -> None:
    """Let the wide convolutions below `module` learn by taps where they see few places, in float32 on a CPU.

    Whether they will or not, the channels of their weights come to lie last in memory.
    """
    for layer in module.modules():
        if isinstance(layer, Conv1d | Conv2d) and layer.in_channels >= WIDE and is_plain(layer):
            layer.by_taps = True
            flat = layer.weight.data if isinstance(layer, Conv2d) else layer.weight.data[:, :, None]
            laid = flat.contiguous(memory_format=torch.channels_last)
            layer.weight.data = laid if isinstance(layer, Conv2d) else laid[:, :, 0]


def lay_channels_last(module: nn.Module) -> None:
    """Let the channels of all weights below `module` that are convolved along time come to lie last in memory.

    So that `fused.py` copies whole lines: see `fused.as_matrix`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) and min(layer.weight.shape[1:]) > 1:
            layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)


def use_library(module: nn.Module) -> None:
    """Let the layers below `module` use PyTorch's own kernels on a GPU, too, instead of those in `fused.py`."""
    for layer in module.modules():
        layer.by_library = True  # type: ignore[assignment]  # others do not look at it


def is_faster_by_taps(layer: Conv1d | Conv2d, x: Tensor, most: int) -> bool:
    """Tell whether this is where a product for each tap is faster: with up to `most` places to make."""
    if not layer.training or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or layer.weight.dtype != torch.float32:
        return False
    return x.ndim in (4, layer.weight.ndim) and count_places(layer, x) <= most


def is_picture_faster_by_taps(layer: Conv2d, x: Tensor) -> bool:
    """Tell whether this is where products for taps are faster: not where tiles are, for the larger of such pictures."""
    if not layer.by_taps or not is_faster_by_taps(layer, x, PIXELS):
        return False
    return count_places(layer, x) <= PIXELS_BESIDE_TILES or not has_tiles_for(layer, x)


def learns_under_autocast(layer: Conv2d, x: Tensor) -> bool:
    """Tell whether weights that were cast ahead can be used (see `casts.cast_ahead`): on a GPU, with gradients."""
    if x.device.type != "cuda" or not torch.is_autocast_enabled("cuda") or layer.by_library or not is_plain(layer):
        return False
    return x.ndim == 4 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def count_places(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> int:
    """Return how many places come out for each sample, near enough where there is no padding."""
    places, strides = 1, layer.stride if len(layer.stride) == x.ndim - 2 else (1, *layer.stride)
    for side, stride in zip(x.shape[2:], strides, strict=True):
        places *= -(-side // stride)
    return places


def is_plain(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d) -> bool:
    """Tell whether a convolution has neither groups nor gaps, and pads with zeros."""
    options = (layer.groups, layer.padding_mode, set(layer.dilation), isinstance(layer.padding, str))
    return options == (1, "zeros", {1}, False)


def pays(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> bool:
    """Tell whether the gradient of the weights is faster as a product: in bf16 on a CPU, with few places to look at."""
    learns = layer.training and layer.weight.requires_grad and torch.is_grad_enabled()
    if not learns or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype not in FEW or x.ndim != layer.weight.ndim or not is_plain(layer):
        return False
    return len(x) * count_places(layer, x) <= FEW[dtype] * layer.in_channels


def convolve(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Do what `layer` does to x (B, C, ...), under autocast in its type."""
    weight, bias = layer.weight, layer.bias
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    padding = tuple(int(side) for side in layer.padding)
    return _Convolution.apply(x, weight, bias, tuple(layer.stride), padding)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        ones, zeros = [1] * len(stride), [0] * len(stride)
        return torch.convolution(x, weight, bias, stride, padding, ones, False, zeros, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        ones, zeros = [1] * len(ctx.stride), [0] * len(ctx.stride)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        by_x = by_weight = by_bias = None
        if needs_x:  # asked for the bias, too, oneDNN would make the weights' as well
            shape = (ctx.stride, ctx.padding, ones, False, zeros, 1, [True, False, False])
            by_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, *shape)[0]
        if needs_weight:
            by_weight = weight_gradient(x, gradient, weight.shape[2:], ctx.stride, ctx.padding)
        if needs_bias:
            by_bias = gradient.sum(dim=[0, *range(2, gradient.ndim)])
        return by_x, by_weight, by_bias, None, None


class _CastConvolution(torch.autograd.Function):
    """Do what autocast makes of a convolution of x (B, C, H, W), with weights that may have been cast before."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        dtype = multiplied_in(x, weight)
        multiplied, summand = cast(weight, dtype), None if bias is None else cast(bias, dtype)
        last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()  # 1x1 are both
        narrow = x.to(dtype, memory_format=torch.channels_last if last else torch.preserve_format)
        ctx.save_for_backward(narrow, multiplied)
        ctx.types = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.leaves, ctx.strides = are_leaves(weight, bias), weight.stride()
        ctx.bias, ctx.window = None if bias is None else list(bias.shape), (stride, padding)
        return torch.convolution(narrow, multiplied, summand, stride, padding, (1, 1), False, (0, 0), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (needs_x, *others) = ctx.saved_tensors, ctx.needs_input_grad[:3]
        sizes = ctx.bias, *ctx.window, (1, 1), False, (0, 0), 1
        by_x: Tensor | None = None
        with beside(ctx.leaves, gradients[0], x) as narrow:
            found = torch.ops.aten.convolution_backward(gradients[0], x, weight, *sizes, (False, *others))
            by_weight, by_bias = (
                one if one is None or narrow else one.to(dtype)
                for one, dtype in zip(found[1:], ctx.types[1:], strict=True)
            )
            by_weight = None if by_weight is None else lay_as(by_weight, ctx.strides)
        if needs_x:
            by_x = torch.ops.aten.convolution_backward(gradients[0], x, weight, *sizes, (True, False, False))[0]
            by_x = by_x.to(ctx.types[0])
        return by_x, by_weight, by_bias, None, None


def weight_gradient(
    x: Tensor, gradient: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Return the gradient of a convolution's weights, (C', C, k) or (C', C, k, k), the latter with channels last.

    Args:
        x: what was convolved, (B, C, T) or (B, C, H, W).
        gradient: of what came out, (B, C', T') or (B, C', H', W').
    """
    if len(kernel) == 1:
        windows = functional.pad(x, 2 * padding).unfold(2, kernel[0], stride[0])
        rows = rearrange(windows, "b c t k -> (b t) (c k)")
        found = rearrange(gradient, "b c t -> c (b t)") @ rows
        return found.view(-1, x.shape[1], *kernel)
    tall, wide = padding
    padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, wide, wide, tall, tall))
    windows = padded.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    rows = rearrange(windows, "b h w c i j -> (b h w) (i j c)")
    found = rearrange(gradient, "b c h w -> c (b h w)") @ rows
    return found.view(-1, *kernel, x.shape[1]).permute(0, 3, 1, 2)
