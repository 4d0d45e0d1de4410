"""The U-Net's layers on a CUDA GPU: convolutions as matrix products, and what lies between them as one kernel.

Where hundreds of channels meet a handful of places, cuDNN's convolutions along time take up to ten times as long as the
matrix product that they are, and copy from one memory order to another before and after; group norm, Mish and FiLM are
a dozen small kernels. Here a convolution copies its windows (one kernel) and multiplies; the rest is one kernel
forwards and one backwards. The maths is the same: products are rounded as PyTorch's settings say (TF32, autocast; those
of `few.py` by autocast only), sums are float32. Sequences keep the shape (B, C, T), but lie as (B, T, C).

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from getiaction.policy.fast import few
from getiaction.policy.fast.beside import are_leaves, beside, lay_as
from getiaction.policy.fast.casts import cast, multiplied_in
from getiaction.policy.fast.fused_kernels import (
    block_backward_kernel,
    block_kernel,
    fold_kernel,
    unfold_kernel,
    unfold_lines_kernel,
)
from getiaction.policy.fast.sums import add_rows

BLOCK = 1024  # numbers that a program copies
LINES = 2048  # the same where they lie side by side
LARGEST = 8192  # numbers of a group that a program holds: 16 or 32 for each thread
NUMBERS_A_WARP, NUMBERS_A_WARP_BACKWARDS = 512, 1024  # as measured: warps meet for each sum


def as_matrix(weight: Tensor) -> tuple[Tensor, bool]:
    """View weights (C', C, k) as (C', C k), or as (C', k C) where they lie so; and tell which.

    Windows in that order are copied, and added up, line by line instead of number by number.
    """
    last = weight.shape[2] > 1 and weight.stride(1) == 1 and weight.shape[1] > 1
    return (weight.transpose(1, 2) if last else weight).flatten(1), last


def as_weight(matrix: Tensor, weight: Tensor, *, last: bool) -> Tensor:
    """View what `as_matrix` made of a weight, or its gradient, as that again."""
    outer, inner, kernel = weight.shape
    return matrix.view(outer, kernel, inner).transpose(1, 2) if last else matrix.view(outer, inner, kernel)


def unfold(x: Tensor, kernel: int, stride: int, padding: int, dtype: torch.dtype, *, last: bool = False) -> Tensor:
    """Copy the windows of x (B, C, T), anyhow it lies, into (B T', C k), or with `last` (B T', k C)."""
    rows, channels, steps = x.shape
    out_steps = (steps + 2 * padding - kernel) // stride + 1
    if kernel == stride == 1 and padding == 0:
        return x.transpose(1, 2).reshape(rows * steps, channels).to(dtype)
    width = channels * kernel
    out = torch.empty((rows * out_steps, width), dtype=dtype, device=x.device)
    if last:
        block = min(BLOCK, triton.next_power_of_2(channels))
        held = max(LINES // block, 1)
        with torch.cuda.device_of(x):
            unfold_lines_kernel[triton.cdiv(len(out), held), kernel * triton.cdiv(channels, block)](
                x, out, len(out), steps, out_steps, channels, x.stride(0), x.stride(2), x.stride(1),
                KERNEL=kernel, STRIDE=stride, PADDING=padding, WINDOWS=held, BLOCK=block,
            )  # fmt: skip
        return out
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = rows * out_steps, triton.cdiv(width, block)
    with torch.cuda.device_of(x):
        unfold_kernel[grid](
            x, out, steps, out_steps, width, x.stride(0), x.stride(2), x.stride(1),
            KERNEL=kernel, STRIDE=stride, PADDING=padding, BLOCK=block,
        )  # fmt: skip
    return out


def fold(
    windows: Tensor,
    rows: int,
    steps: int,
    kernel: int,
    stride: int,
    padding: int,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    last: bool = False,
) -> Tensor:
    """Add up the windows of `unfold` where they came from, in (B, C, T); what that has as its gradient."""
    channels, window_steps = windows.shape[1] // kernel, len(windows) // rows
    if kernel == stride == 1 and padding == 0 and bias is None:
        return windows.view(rows, steps, channels).to(dtype).transpose(1, 2)
    out = torch.empty((rows, steps, channels), dtype=dtype, device=windows.device)
    block = min(BLOCK, triton.next_power_of_2(channels))
    held = max(BLOCK // block, 1) if last else 1
    with torch.cuda.device_of(windows):
        fold_kernel[triton.cdiv(rows * steps, held), triton.cdiv(channels, block)](
            windows, bias if bias is not None else windows, out, rows * steps, steps, window_steps, channels,
            KERNEL=kernel, STRIDE=stride, PADDING=padding, BIASED=bias is not None, LAST=last, PLACES=held, BLOCK=block,
        )  # fmt: skip
    return out.transpose(1, 2)


def multiply_into(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in a type, float32 without rounding sums to that of the factors first."""
    if a.dtype != torch.float32 and dtype == torch.float32 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


class _Convolution(torch.autograd.Function):
    """Convolve x (B, C, T) with weights (C', C, k) into (B, C', T')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        dtype, kernel = multiplied_in(x, weight), weight.shape[2]
        multiplied = cast(weight, dtype)
        matrix, ctx.last = as_matrix(multiplied)
        windows, matrix = unfold(x, kernel, stride, padding, dtype, last=ctx.last), matrix.t()
        product = windows @ matrix if bias is None else torch.addmm(cast(bias, dtype), windows, matrix)  # (B T', C')
        ctx.save_for_backward(windows, multiplied)
        ctx.types, ctx.window = (x.dtype, weight.dtype, None if bias is None else bias.dtype), (kernel, stride, padding)
        ctx.rows, ctx.steps = len(x), x.shape[2]
        ctx.leaves, ctx.strides = are_leaves(weight, bias), weight.stride()
        return product.view(len(x), -1, len(weight)).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (windows, weight), (kernel, stride, padding) = ctx.saved_tensors, ctx.window
        gradient = unfold(gradients[0], 1, 1, 0, weight.dtype)  # (B T', C')
        by_x = by_weight = by_bias = None
        with beside(ctx.leaves, gradient, windows) as narrow:
            if ctx.needs_input_grad[1]:
                found = multiply_into(gradient.t(), windows, weight.dtype if narrow else ctx.types[1])
                by_weight = lay_as(as_weight(found, weight, last=ctx.last), ctx.strides)
            if ctx.needs_input_grad[2]:
                [by_bias] = add_rows(gradient[None], ctx.types[2])
        if ctx.needs_input_grad[0]:
            spread = gradient @ as_matrix(weight)[0]
            by_x = fold(spread, ctx.rows, ctx.steps, kernel, stride, padding, dtype=ctx.types[0], last=ctx.last)
        return by_x, by_weight, by_bias, None, None


class _TransposedConvolution(torch.autograd.Function):
    """Convolve x (B, C, T), transposed, with weights (C, C', k) into (B, C', T')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
        dtype, kernel = multiplied_in(x, weight), weight.shape[2]
        multiplied, steps = cast(weight, dtype), (x.shape[2] - 1) * stride - 2 * padding + kernel
        matrix, ctx.last = as_matrix(multiplied)
        windows = unfold(x, 1, 1, 0, dtype) @ matrix  # (B T, C' k)
        ctx.save_for_backward(x, multiplied)
        ctx.types, ctx.window = (weight.dtype, bias.dtype), (kernel, stride, padding)
        ctx.leaves, ctx.strides = are_leaves(weight, bias), weight.stride()
        return fold(windows, len(x), steps, kernel, stride, padding, bias, dtype, last=ctx.last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (kernel, stride, padding) = ctx.saved_tensors, ctx.window
        gradient = unfold(gradients[0], kernel, stride, padding, weight.dtype, last=ctx.last)  # (B T, C' k)
        by_x = by_weight = by_bias = None
        with beside(ctx.leaves, gradient, x, gradients[0]) as narrow:
            if ctx.needs_input_grad[1]:
                dtype = weight.dtype if narrow else ctx.types[0]
                found = multiply_into(unfold(x, 1, 1, 0, weight.dtype).t(), gradient, dtype)
                by_weight = lay_as(as_weight(found, weight, last=ctx.last), ctx.strides)
            if ctx.needs_input_grad[2]:
                [by_bias] = add_rows(gradients[0].transpose(1, 2).flatten(0, 1)[None], ctx.types[1])
        if ctx.needs_input_grad[0]:
            by_x = (gradient @ as_matrix(weight)[0].t()).view(len(x), x.shape[2], -1).to(x.dtype).transpose(1, 2)
        return by_x, by_weight, by_bias, None, None


class _Block(torch.autograd.Function):
    """Add `start` (C,) to x (B, C, T), normalise groups, Mish, times `film`'s scales, plus its shifts, plus `residual`.

    The result is float32. `film` is (B, C) shifts, (B, 2C) scales and shifts, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        start: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        film: Tensor | None,
        residual: Tensor | None,
        groups: int,
        eps: float,
    ) -> Tensor:
        x = x.transpose(1, 2).contiguous()  # (B, T, C); nothing is copied if it lies so
        rows, steps, channels = x.shape
        film = film if film is None or film.stride(-1) == 1 else film.contiguous()
        scales, size = film is not None and film.shape[1] == 2 * channels, channels // groups
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        around = (0, 0, 0) if residual is None else (residual.stride(0), residual.stride(2), residual.stride(1))
        shift = x if film is None else film[:, -channels:]
        with torch.cuda.device_of(x):
            block_kernel[rows, groups](
                x, x if start is None else start, weight, bias, x if film is None else film, shift,
                x if residual is None else residual, out,
                steps, size, eps, 0 if film is None else film.stride(0), *around,
                STARTS=start is not None, SCALES=scales, SHIFTS=film is not None, ADDS=residual is not None,
                **tile(steps, size),
            )  # fmt: skip
        ctx.save_for_backward(x, start, weight, bias, film)
        ctx.groups, ctx.eps, ctx.residual = groups, eps, None if residual is None else residual.dtype
        ctx.leaves = are_leaves(start, weight, bias)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, start, weight, bias, film), gradient = ctx.saved_tensors, gradients[0]  # (B, T, C), ..., (B, C, T)
        rows, steps, channels = x.shape
        size = channels // ctx.groups
        by_x, by_film = torch.empty_like(x), None if film is None else torch.empty_like(film)
        by_affine = torch.empty((2 if start is None else 3, rows, channels), dtype=torch.float32, device=x.device)
        scales = film is not None and film.shape[1] == 2 * channels
        with torch.cuda.device_of(x):
            block_backward_kernel[rows, ctx.groups](
                x, x if start is None else start, weight, bias, x if film is None else film, gradient, by_x, by_affine,
                by_affine if by_film is None else by_film, by_affine if by_film is None else by_film[:, -channels:],
                steps, size, ctx.eps,
                0 if film is None else film.stride(0), 0 if by_film is None else by_film.stride(0),
                gradient.stride(0), gradient.stride(2), gradient.stride(1),
                STARTS=start is not None, SCALES=scales, SHIFTS=film is not None,
                **tile(steps, size, NUMBERS_A_WARP_BACKWARDS),
            )  # fmt: skip
        with beside(ctx.leaves, by_affine):
            by_weight, by_bias, *by_start = add_rows(by_affine, weight.dtype)
        by_residual = None if ctx.residual is None else gradient.to(ctx.residual)
        return by_x.transpose(1, 2), *(by_start or [None]), by_weight, by_bias, by_film, by_residual, None, None


class _Films(torch.autograd.Function):
    """Do what linear layers of one input do, (B, C) to (B, C1 + C2 + ...), as one product: weights, then biases."""

    @staticmethod
    def forward(ctx: Any, cond: Tensor, *numbers: Tensor) -> Tensor:
        weights, biases = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        dtype, sizes = multiplied_in(cond, weights[0]), [len(weight) for weight in weights]
        matrix = torch.empty((sum(sizes), cond.shape[1]), dtype=dtype, device=cond.device)
        summands = torch.empty(sum(sizes), dtype=dtype, device=cond.device)
        torch._foreach_copy_(matrix.split(sizes), weights)
        torch._foreach_copy_(summands.split(sizes), biases)
        seen = cond.to(dtype)
        ctx.save_for_backward(seen, matrix)
        ctx.types, ctx.sizes, ctx.leaves = (cond.dtype, weights[0].dtype), sizes, are_leaves(*numbers)
        ctx.strides = [weight.stride() for weight in weights]
        return torch.addmm(summands, seen, matrix.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (cond, matrix), (cond_dtype, dtype) = ctx.saved_tensors, ctx.types
        gradient = gradients[0].to(matrix.dtype)
        with beside(ctx.leaves, gradient, cond) as narrow:
            each = multiply_into(gradient.t(), cond, matrix.dtype if narrow else dtype).split(ctx.sizes)
            by_weights = [lay_as(one, strides) for one, strides in zip(each, ctx.strides, strict=True)]
            by_biases = add_rows(gradient[None], dtype)[0].split(ctx.sizes)
        by_cond = multiply_into(gradient, matrix, cond_dtype) if ctx.needs_input_grad[0] else None
        return by_cond, *by_weights, *by_biases


def tile(steps: int, size: int, numbers_a_warp: int = NUMBERS_A_WARP) -> dict[str, int]:
    """Return what a program holds of a group, and how many warps share the work."""
    held = {"STEPS": triton.next_power_of_2(steps), "CHANNELS": triton.next_power_of_2(size)}
    return {**held, "num_warps": max(1, min(16, held["STEPS"] * held["CHANNELS"] // numbers_a_warp))}


def takes(norm: nn.GroupNorm, steps: int) -> bool:
    """Tell whether `convolve_and_normalise` can do what a norm does, over so many steps."""
    if norm.weight is None or norm.bias is None:
        return False
    held = tile(steps, norm.num_channels // norm.num_groups)
    return held["STEPS"] * held["CHANNELS"] <= LARGEST


def convolve(layer: nn.Conv1d, x: Tensor) -> Tensor:
    """Do what a plain convolution does: (B, C, T) to (B, C', T')."""
    return _convolve(layer, x, layer.bias)


def _convolve(layer: nn.Conv1d, x: Tensor, bias: Tensor | None) -> Tensor:
    weight, stride, padding = layer.weight, layer.stride[0], int(layer.padding[0])
    steps = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    if not few.takes(len(x) * steps, weight, x, bias):
        return _Convolution.apply(x, weight, bias, stride, padding)
    dtype = multiplied_in(x, weight)
    matrix, last = as_matrix(cast(weight, dtype))
    windows = unfold(x, weight.shape[2], stride, padding, dtype, last=last)
    product = few.multiply(windows, matrix, None if bias is None else cast(bias, dtype))
    return product.view(len(x), steps, -1).transpose(1, 2)


def films(layers: Sequence[nn.Linear], cond: Tensor) -> tuple[Tensor, ...]:
    """Do what linear layers of one input do: (B, C) to (B, C'), each its own C'."""
    numbers = [layer.weight for layer in layers] + [layer.bias for layer in layers]
    return _Films.apply(cond, *numbers).split([layer.out_features for layer in layers], dim=1)


def convolve_transposed(layer: nn.ConvTranspose1d, x: Tensor) -> Tensor:
    """Do what a plain transposed convolution does: (B, C, T) to (B, C', T')."""
    weight, bias, stride, padding = layer.weight, layer.bias, layer.stride[0], int(layer.padding[0])
    return _TransposedConvolution.apply(x, weight, bias, stride, padding)


def convolve_and_normalise(
    layer: nn.Conv1d, norm: nn.GroupNorm, x: Tensor, film: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Convolve x (B, C, T), normalise, Mish, FiLM (B, C' or 2C'), add `residual` (B, C', T'): float32, (B, C', T')."""
    hidden = _convolve(layer, x, None)
    return _Block.apply(hidden, layer.bias, norm.weight, norm.bias, film, residual, norm.num_groups, norm.eps)
