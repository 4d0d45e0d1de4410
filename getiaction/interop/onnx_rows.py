"""Write a U-Net as ONNX Runtime runs it fastest: convolutions as matrix products, Mish without softplus.

ONNX Runtime convolves a few points in time as weights times windows, (C', k C) @ (k C, T), and reads the weights at
half of the memory's rate. The product the other way round, windows times weights, it does with weights that it has laid
out beforehand, as fast as the memory gives them: benchmarks/NOTES.md.
"""

from __future__ import annotations

import copy

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy.fast.activation import Mish
from getiaction.policy.fast.convolution import is_plain


class Conv1dInRows(nn.Module):
    """Do what a `nn.Conv1d` without groups or gaps does, as one product."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Conv1d) -> None:
        super().__init__()
        self.size, self.stride, self.padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        self.register_buffer("weight", rearrange(layer.weight.detach(), "d c k -> (k c) d").contiguous())
        self.register_buffer("bias", bias_of(layer))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T) to (B, C', T')."""
        return (self.windows(x) @ self.weight + self.bias).transpose(1, 2)

    def windows(self, x: Tensor) -> Tensor:
        """Return what the kernel sees at each place, (B, T', k C), of (B, C, T)."""
        rows = x.transpose(1, 2)  # (B, T, C): what is copied from now on lies together
        if self.size == 1 and self.stride == 1 and not self.padding:
            return rows
        padded = functional.pad(rows, (0, 0, self.padding, self.padding))
        firsts = torch.arange(0, padded.shape[1] - self.size + 1, self.stride)  # (T',)
        places = firsts[:, None] + torch.arange(self.size)  # (T', k)
        return rearrange(padded.index_select(1, places.flatten()), "b (t k) c -> b t (k c)", k=self.size)


class DoublingInRows(nn.Module):
    """Do what a `nn.ConvTranspose1d` of kernel 4, stride 2 and padding 1 does, as one product.

    Output 2t is w1 x(t) + w3 x(t - 1), output 2t + 1 is w2 x(t) + w0 x(t + 1).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.ConvTranspose1d) -> None:
        super().__init__()
        self.register_buffer("weight", rearrange(layer.weight.detach(), "c d k -> c (k d)").contiguous())
        self.register_buffer("bias", bias_of(layer))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T) to (B, C', 2 T)."""
        w0, w1, w2, w3 = (x.transpose(1, 2) @ self.weight).chunk(4, dim=2)  # (B, T, C') each
        even = w1 + functional.pad(w3[:, :-1], (0, 0, 1, 0))
        odd = w2 + functional.pad(w0[:, 1:], (0, 0, 0, 1))
        both = torch.stack([even, odd], dim=2) + self.bias  # (B, T, 2, C')
        return rearrange(both, "b t two d -> b d (t two)")


class MishOfSigmoid(nn.Module):
    """Do what Mish does without softplus, which ONNX Runtime computes one number at a time.

    The gate tanh(softplus(x)) is n / (2 - n) with n = s (2 - s), s = sigmoid(x).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (...) to (...)."""
        s = x.sigmoid()
        n = s * (2 - s)
        return x * n / (2 - n)


def bias_of(layer: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
    """Return a layer's bias, (C',); 0 if it has none."""
    return torch.zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()


def doubles(layer: nn.ConvTranspose1d) -> bool:
    """Tell whether a transposed convolution is the one that doubles time in the U-Net."""
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding)
    return sizes == ((4,), (2,), (1,), (0,)) and is_plain(layer)


def replacement(layer: nn.Module) -> nn.Module | None:
    """Return what does the same faster in ONNX Runtime; None for a layer that stays."""
    if isinstance(layer, nn.Conv1d):
        return Conv1dInRows(layer) if is_plain(layer) else None
    if isinstance(layer, nn.ConvTranspose1d):
        return DoublingInRows(layer) if doubles(layer) else None
    return MishOfSigmoid() if isinstance(layer, Mish) else None


def in_rows[Network: nn.Module](network: Network) -> Network:
    """Return a copy of a network to export; the weights in it are copies, and learn nothing."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if (other := replacement(child)) is not None:
                setattr(parent, name, other)
    return network
