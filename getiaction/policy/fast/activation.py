"""Mish, x * tanh(softplus(x)) (Misra, arXiv:1908.08681), fast on the CPU.

On the CPU, PyTorch's own takes a fifth of a small U-Net's training step. With s = sigmoid(x) and r = 1 - s, the gate
tanh(softplus(x)) is s * (1 + r) / (1 + r * r): one transcendental function instead of three. The derivative,
gate + 4 * x * s * (r / (1 + r * r)) ** 2, comes along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ONE = torch.ones(())
SMALL = 6144  # numbers, below which one slow operation costs less than six fast ones


class Mish(nn.Module):
    """Do what `nn.Mish` does: to float32's last digits on the CPU, by PyTorch's own kernel elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (...) to (...)."""
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
            return functional.mish(x)  # a compiler fuses it itself, and its gradients of ours come out as 0
        if x.requires_grad and torch.is_grad_enabled():
            return _Mish.apply(x)
        return functional.mish(x) if x.numel() < SMALL else _mish(x.float())[0].to(x.dtype)


def mish_(x: Tensor) -> Tensor:
    """Do what `Mish` does without gradients, possibly in the place of x (...)."""
    small = x.numel() < SMALL or x.dtype != torch.float32
    return functional.mish(x, inplace=True) if small else _mish(x)[0]


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x32 = x.float()
        y, gate, sigmoid, rest, divisor = _mish(x32)
        slope = torch.addcmul(gate, rest.div_(divisor).square_(), sigmoid.mul_(x32), value=4)
        ctx.save_for_backward(x, slope.to(x.dtype))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: the same slope, from x
            gate = functional.softplus(x).tanh()
            slope = gate + x * (1 - gate * gate) * x.sigmoid()
        return gradients[0] * slope


def _mish(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return Mish, and what its derivative is made of: gate, s, r and 1 + r * r; all like x (...), float32."""
    sigmoid = torch.sigmoid(x)
    rest = 1 - sigmoid
    divisor = torch.addcmul(ONE, rest, rest)
    gate = torch.addcmul(sigmoid, sigmoid, rest).div_(divisor)
    return x * gate, gate, sigmoid, rest, divisor
