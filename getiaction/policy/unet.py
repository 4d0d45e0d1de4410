"""Predict the noise in a sequence of actions: a 1-D U-Net over time, conditioned by FiLM.

Modules and parameter names are LeRobot's, so weights load both ways.
Source: Chi et al., arXiv:2303.04137; Janner et al., arXiv:2205.09991; FiLM: Perez et al., arXiv:1709.07871.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from getiaction.policy.fast.activation import Mish
from getiaction.policy.fast.convolution import Conv1d, ConvTranspose1d
from getiaction.policy.fast.kernels import block_kernels_for, film_kernels_for, native_block_for
from getiaction.policy.fast.watch import is_watched

NARROW, MANY = 256, 32  # channels, samples: where convolutions are faster with the channels last, benchmarks/NOTES.md
FINAL_GROUPS = 8  # of the last block's group norm, whatever `n_groups` says: so it is in the reference and in LeRobot


class SinusoidalEmbedding(nn.Module):
    """Embed denoising steps as sines and cosines (Vaswani et al., arXiv:1706.03762, section 3.5)."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map (B,) integers to (B, dim)."""
        angles = timesteps[:, None] * self.frequencies  # (B, dim / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ConvBlock(nn.Module):
    """Convolve along time, normalise, Mish: (B, C, T) -> (B, C', T)."""

    by_library = False  # see `convolution.use_library`
    by_native = False  # see `native_layers.use_native`

    def __init__(self, channels_in: int, channels_out: int, *, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Conv1d(channels_in, channels_out, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(n_groups, channels_out),
            Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T) to (B, C', T)."""
        fused = self.kernels(x)
        return self.block(x) if fused is None else fused.convolve_and_normalise(self.block[0], self.block[1], x)

    def kernels(self, x: Tensor) -> ModuleType | None:
        """Return what does what the layers do in one go, while they are as they were made, and nobody listens."""
        fused = block_kernels_for(self, x)
        if fused is None or type(self) is not ConvBlock:
            return None
        if [type(layer) for layer in self.block] != [Conv1d, nn.GroupNorm, Mish]:
            return None
        watched = is_watched(self, self.block, *self.block)
        return fused if fused.takes(self.block[1], x.shape[-1]) and not watched else None


class ResidualBlock(nn.Module):
    """Two convolutions around a FiLM layer, with a residual connection."""

    by_native = False  # see `native_layers.use_native`

    def __init__(
        self, channels_in: int, channels_out: int, *, cond_dim: int, kernel_size: int, n_groups: int, film_scale: bool
    ) -> None:
        super().__init__()
        self.film_scale, self.film_size = film_scale, channels_out * (2 if film_scale else 1)
        self.conv1 = ConvBlock(channels_in, channels_out, kernel_size=kernel_size, n_groups=n_groups)
        # LeRobot's Mish in here is the same for all blocks: the U-Net does it once
        self.cond_encoder = nn.Sequential(nn.Identity(), nn.Linear(cond_dim, self.film_size))
        self.conv2 = ConvBlock(channels_out, channels_out, kernel_size=kernel_size, n_groups=n_groups)
        same = channels_in == channels_out
        self.residual_conv = nn.Identity() if same else Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map x (B, C, T) and cond (B, cond_dim), which has been through Mish, to (B, C', T)."""
        return self.modulate(x, self.cond_encoder(cond))

    def modulate(self, x: Tensor, film: Tensor) -> Tensor:
        """Map x (B, C, T) and the values of the FiLM layer, (B, C') or with scales (B, 2C'), to (B, C', T)."""
        if (native := native_block_for(self, x, film)) is not None:
            return cast(Tensor, native.run_block(self, x, film))
        fits = film.shape == (len(x), self.film_size)  # what PyTorch broadcasts, or refuses, is left to it
        if fits and (fused := self.conv1.kernels(x)) is not None and self.conv2.kernels(x) is not None:
            first, second = self.conv1.block, self.conv2.block
            hidden = fused.convolve_and_normalise(first[0], first[1], x, film)
            return fused.convolve_and_normalise(second[0], second[1], hidden, residual=self.residual_conv(x))
        hidden = self.conv1(x)
        film = film[(..., *[None] * (hidden.ndim - 2))]  # (B, C' or 2C', 1)
        if self.film_scale:
            scale, bias = film.chunk(2, dim=1)
            hidden = scale * hidden + bias
        else:
            hidden = hidden + film
        return self.conv2(hidden) + self.residual_conv(x)


class ConditionalUnet1d(nn.Module):
    """Denoise action sequences, given the denoising step and an observation vector.

    Args:
        action_dim: Da.
        cond_dim: size of the observation vector.
        down_dims: channels of each level; time halves between levels, so T must divide by 2 ** (levels - 1).
        kernel_size: odd size of the convolutions along time.
        n_groups: groups of the group norms; must divide every entry of `down_dims` (the first must divide by 8, too).
        diffusion_step_embed_dim: size of the step embedding, even.
        use_film_scale_modulation: FiLM scales and shifts; otherwise it only shifts.
        gradient_checkpointing: recompute blocks in the backward pass, for less memory.
    """

    by_library = False  # see `convolution.use_library`
    by_native = False  # see `native_layers.use_native`

    def __init__(
        self,
        *,
        action_dim: int,
        cond_dim: int,
        down_dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 5,
        n_groups: int = 8,
        diffusion_step_embed_dim: int = 128,
        use_film_scale_modulation: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.action_dim, self.down_dims = action_dim, tuple(down_dims)
        self.kernel_size, self.n_groups = kernel_size, n_groups
        self.diffusion_step_embed_dim = embed = diffusion_step_embed_dim
        self.use_film_scale_modulation = use_film_scale_modulation
        self.gradient_checkpointing = gradient_checkpointing
        self.activation = Mish()
        self.diffusion_step_encoder = nn.Sequential(
            SinusoidalEmbedding(embed), nn.Linear(embed, embed * 4), Mish(), nn.Linear(embed * 4, embed)
        )

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            return ResidualBlock(
                channels_in,
                channels_out,
                cond_dim=embed + cond_dim,
                kernel_size=kernel_size,
                n_groups=n_groups,
                film_scale=use_film_scale_modulation,
            )

        dims, top = self.down_dims, self.down_dims[-1]
        widths = list(zip((action_dim, *dims[:-1]), dims, strict=True))
        self.down_modules = nn.ModuleList()
        for level, (narrow, wide) in enumerate(widths):
            halve = nn.Identity() if level == len(widths) - 1 else Conv1d(wide, wide, 3, stride=2, padding=1)
            self.down_modules.append(nn.ModuleList([block(narrow, wide), block(wide, wide), halve]))
        self.mid_modules = nn.ModuleList([block(top, top), block(top, top)])
        self.up_modules = nn.ModuleList()
        for narrow, wide in reversed(widths[1:]):
            double = ConvTranspose1d(narrow, narrow, 4, stride=2, padding=1)
            self.up_modules.append(nn.ModuleList([block(wide * 2, narrow), block(narrow, narrow), double]))
        self.final_conv = nn.Sequential(
            ConvBlock(dims[0], dims[0], kernel_size=kernel_size, n_groups=FINAL_GROUPS),
            Conv1d(dims[0], action_dim, 1),
        )

    @property
    def time_factor(self) -> int:
        """Return the number that T must be divisible by."""
        return 2 ** (len(self.down_dims) - 1)

    def forward(self, noisy_actions: Tensor, timesteps: Tensor, cond: Tensor) -> Tensor:
        """Predict the noise (or whatever the scheduler's `prediction_type` says).

        Args:
            noisy_actions: (B, T, Da).
            timesteps: (B,) integers.
            cond: (B, cond_dim), the encoded observations.

        Returns:
            (B, T, Da).
        """
        cond = torch.cat([self.diffusion_step_encoder(timesteps), cond], dim=-1)  # (B, embed + cond_dim)
        cond = self.activation(cond)
        if (fused := self._kernels(noisy_actions)) is not None:
            layers = [cast(nn.Linear, block.cond_encoder[1]) for block in self.blocks()]
            return self.denoise(noisy_actions, fused.films(layers, cond))

        def run(block: ResidualBlock, x: Tensor) -> Tensor:
            if self.gradient_checkpointing and self.training:
                return checkpoint(block, x, cond, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
            return block(x, cond)

        return self._pass(noisy_actions, run)

    def modulation(self, timesteps: Tensor, cond: Tensor) -> list[Tensor]:
        """Compute what every FiLM layer does at every denoising step, the observations' part of it only once.

        Args:
            timesteps: (S,) integers.
            cond: (B, cond_dim), the encoded observations.

        Returns:
            The values for each block, (S, B, C') or with scales (S, B, 2C').
        """
        step, seen = self.activation(self.diffusion_step_encoder(timesteps)), self.activation(cond)
        split, films = self.diffusion_step_embed_dim, []
        for block in self.blocks():
            layer = cast(nn.Linear, block.cond_encoder[1])
            by_step = functional.linear(step, layer.weight[:, :split])  # (S, 2C')
            by_row = functional.linear(seen, layer.weight[:, split:], layer.bias)  # (B, 2C')
            films.append(by_step[:, None] + by_row)
        return films

    def denoise(self, noisy_actions: Tensor, films: Sequence[Tensor]) -> Tensor:
        """Do what `forward` does, (B, T, Da) to (B, T, Da), with one step's values of `modulation`, (B, ...) each."""
        left = iter(films)
        return self._pass(noisy_actions, lambda block, x: block.modulate(x, next(left)))

    def blocks(self) -> list[ResidualBlock]:
        """Return the blocks in the order in which they are called."""
        down = [block for first, second, _ in levels(self.down_modules) for block in (first, second)]
        up = [block for first, second, _ in levels(self.up_modules) for block in (first, second)]
        return [*down, *cast(Iterable[ResidualBlock], self.mid_modules), *up]

    def _pass(self, noisy_actions: Tensor, run: Callable[[ResidualBlock, Tensor], Tensor]) -> Tensor:
        x = rearrange(noisy_actions, "b t d -> b d t")
        rows = self._is_faster_in_rows(noisy_actions)
        if rows:
            x = x[:, :, None]  # (B, Da, 1, T), channels last as it lies
        skips: list[Tensor] = []
        for first, second, halve in levels(self.down_modules):
            x = run(second, run(first, x))
            skips.append(x)
            x = halve(x)
        for middle in cast(Iterable[ResidualBlock], self.mid_modules):
            x = run(middle, x)
        for first, second, double in levels(self.up_modules):
            x = join(x, skips.pop())
            x = double(run(second, run(first, x)))
        x = self.final_conv(x)
        return rearrange(x[:, :, 0] if rows else x, "b d t -> b t d")

    def _kernels(self, x: Tensor) -> ModuleType | None:
        """Return what does all FiLM layers as one product where it may, and nobody listens to a block."""
        fused = film_kernels_for(self, x) if torch.is_grad_enabled() else None
        if fused is None or (self.gradient_checkpointing and self.training):
            return None
        blocks = self.blocks()
        layers = [block.cond_encoder for block in blocks]
        ours = all(type(block) is ResidualBlock for block in blocks)
        if not ours or any([type(one) for one in layer] != [nn.Identity, nn.Linear] for layer in layers):
            return None
        if any(layer[1].bias is None for layer in layers):
            return None
        own = (one for layer in layers for one in (layer, *layer))
        return None if is_watched(*blocks, *own) else fused

    def _is_faster_in_rows(self, x: Tensor) -> bool:
        """Tell whether channels last in memory are faster: in float32 on the CPU, for narrow networks and for those
        that learn by taps.
        """
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not plain or torch.compiler.is_compiling():
            return False
        narrow = max(self.down_dims) <= NARROW and len(x) >= MANY
        return narrow or (self.training and any(getattr(layer, "by_taps", False) for layer in self.modules()))


def join(x: Tensor, skip: Tensor) -> Tensor:
    """Join the channels of x (B, C, ...) and skip (B, C', ...) into (B, C + C', ...), lying as both do."""
    if x.ndim == 4 and x.stride(1) == skip.stride(1) == 1 and skip.stride(0) < skip.stride(3):  # (1, T, B, C)
        return torch.cat([x.permute(2, 3, 0, 1), skip.permute(2, 3, 0, 1)], dim=3).permute(2, 3, 0, 1)
    if x.stride(1) == skip.stride(1) == 1:
        return torch.cat([x.movedim(1, -1), skip.movedim(1, -1)], dim=-1).movedim(-1, 1)
    return torch.cat([x, skip], dim=1)


def levels(modules: nn.ModuleList) -> Iterable[tuple[ResidualBlock, ResidualBlock, nn.Module]]:
    """Return the levels of one side of the U-Net: two blocks and a change of time's resolution."""
    return cast(Iterable[tuple[ResidualBlock, ResidualBlock, nn.Module]], modules)
