"""Convolutions of few places on a CUDA GPU, as when a robot acts: products whose work is reading the weights.

One robot's chunk has 4 to 16 moments in each convolution of the U-Net and some hundred pixels in the ResNet's.
Libraries are made for more: in float32 cuBLAS reads the weights at a quarter of the memory's rate there, and cuDNN
takes 65 us for what can be read in 2. Here a weight is read once for every four rows; products and sums are float32,
whatever the settings for TF32 say.

Import it only where there is a CUDA GPU: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy.fast.casts import cast, multiplied_in
from getiaction.policy.fast.few_kernel import few_kernel, unfold_picture_kernel

MOST = 2**27  # multiplications, up to which this is faster
ROWS = 4  # of a program
MANY = 256  # programs: about two for each of Hopper's 132 multiprocessors
TALL = 1024  # rows, from which a library's product is faster
COPIED = 1024  # numbers of a program that copies
Pair = tuple[int, int]


def takes(rows: int, weight: Tensor, *inputs: Tensor | None) -> bool:
    """Tell whether a product of so many rows with a weight is for these kernels: few, and without gradients.

    Args:
        inputs: what else a gradient could be wanted of.
    """
    learns = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (weight, *inputs))
    return not learns and 0 < rows * weight.numel() <= MOST


def takes_picture(layer: nn.Conv2d, x: Tensor) -> bool:
    """Tell the same of a plain convolution of x (B, C, H, W)."""
    height, width = sides_of(x, *window_of(layer))
    return min(height, width) > 0 and takes(len(x) * height * width, layer.weight, x, layer.bias)


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows @ weight.T + bias, (M, N), in the weight's type.

    Args:
        rows: (M, K), of the weight's type.
        weight: (N, K), a row's numbers side by side.
        bias: (N,) or None.
    """
    count, width, columns = len(rows), rows.shape[1], len(weight)
    if count > TALL or weight.stride(1) != 1:
        return functional.linear(rows, weight, bias)
    out = torch.empty((count, columns), dtype=weight.dtype, device=rows.device)
    grid = plan(count, columns, width, weight.element_size())
    with torch.cuda.device_of(rows):
        few_kernel[triton.cdiv(count, ROWS), triton.cdiv(columns, grid["COLUMNS"])](
            rows.contiguous(), weight, weight if bias is None else bias, out, count, columns, width, weight.stride(0),
            BIASED=bias is not None, **grid,
        )  # fmt: skip
    return out


def plan(rows: int, columns: int, width: int, size: int) -> dict[str, int]:
    """Return what a program does of a product, as measured on an H200: benchmarks/NOTES.md.

    Args:
        size: bytes of a weight.
    """
    if rows > 16 and size == 4:
        if rows > 128:
            return {"COLUMNS": 8, "BLOCK": 128, "UNROLL": 1, "num_warps": 1}
        block = 128 if rows > 32 else 256
        return {"COLUMNS": 4, "BLOCK": block, "UNROLL": 2, "num_warps": block // 128}
    programs = triton.cdiv(rows, ROWS) * columns // 4
    if size < 4 or programs < MANY:
        return {"COLUMNS": 2, "BLOCK": 1024, "UNROLL": 2, "num_warps": 8 if size == 4 else 4}
    return {"COLUMNS": 4, "BLOCK": 512, "UNROLL": 2, "num_warps": 4}


def convolve_picture(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Do what a plain convolution does: (B, C, H, W) to (B, C', H', W'), whose channels lie last."""
    dtype, window = multiplied_in(x, layer.weight), window_of(layer)
    weight, bias = cast(layer.weight, dtype), None if layer.bias is None else cast(layer.bias, dtype)
    height, width = sides_of(x, *window)
    last = lies_last(weight)
    rows = (weight.permute(0, 2, 3, 1) if last else weight).flatten(1)  # as they lie: nothing is copied
    product = multiply(unfold_picture(x, *window, dtype, last=last), rows, bias)
    return product.view(len(x), height, width, -1).permute(0, 3, 1, 2)


def lies_last(weight: Tensor) -> bool:
    """Tell whether a weight's channels lie last in memory, and only they do."""
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def window_of(layer: nn.Conv2d) -> tuple[Pair, Pair, Pair]:
    """Return its kernel, stride and padding, of lines and columns."""
    (height, width), (down, along) = layer.kernel_size, layer.stride
    return (height, width), (down, along), (int(layer.padding[0]), int(layer.padding[1]))


def sides_of(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Return H' and W' of what a convolution makes of x (B, C, H, W)."""
    down, along = (
        (side + 2 * around - covered) // step + 1
        for side, covered, step, around in zip(x.shape[2:], kernel, stride, padding, strict=True)
    )
    return down, along


def unfold_picture(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dtype: torch.dtype, *, last: bool = False
) -> Tensor:
    """Copy the windows of x (B, C, H, W), anyhow it lies, into (B H' W', C h w), or with channels last (..., h w C)."""
    height, width = sides_of(x, kernel, stride, padding)
    if (*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(dtype)
    window = x.shape[1] * kernel[0] * kernel[1]
    out = torch.empty((len(x) * height * width, window), dtype=dtype, device=x.device)
    block = min(COPIED, triton.next_power_of_2(window))
    with torch.cuda.device_of(x):
        unfold_picture_kernel[len(out), triton.cdiv(window, block)](
            x, out, window, *x.shape[1:], height, width, *x.stride(),
            HEIGHT=kernel[0], WIDTH=kernel[1], STRIDE_Y=stride[0], STRIDE_X=stride[1],
            PADDING_Y=padding[0], PADDING_X=padding[1], LAST=last, BLOCK=block,
        )  # fmt: skip
    return out
