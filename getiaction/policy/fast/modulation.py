"""What FiLM's layers do at every denoising step, for one set of observations after the other: one product for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy.fast.copies import Stamp
from getiaction.policy.unet import ConditionalUnet1d


class Modulation:
    """Do what `ConditionalUnet1d.modulation` does, with copies of the layers' weights.

    The part of the denoising steps is computed again only if the weights changed, or the steps.

    Args:
        unet: its step encoder and its activation are called.
        layers: of FiLM, one for each block.
        num_steps, batch_size: S and B.
        dtype: what products are computed in.

    Raises:
        RuntimeError: a weight's numbers do not lie at equal distances.
    """

    def __init__(
        self, unet: ConditionalUnet1d, layers: Sequence[nn.Linear], num_steps: int, batch_size: int, dtype: torch.dtype
    ) -> None:
        self._step_encoder, self._activation = unet.diffusion_step_encoder, unet.activation
        self._layers, self._split = layers, unet.diffusion_step_embed_dim
        sizes, weight = [layer.out_features for layer in layers], layers[0].weight
        seen = layers[0].in_features - self._split
        self._weight = weight.new_empty(sum(sizes), seen, dtype=dtype)
        self._bias = weight.new_empty(sum(sizes), dtype=dtype)
        self._by_step, self._timesteps = torch.empty(0), torch.empty(0)
        read = [one for layer in (*layers, self._step_encoder) for one in (*layer.parameters(), *layer.buffers())]
        self._stamp = Stamp(read)
        self._values = weight.new_empty(num_steps, batch_size, sum(sizes))
        self.films = self._values.split(sizes, dim=2)
        """The values for each block, (S, B, C' or with scales 2C')."""

    @torch.inference_mode()
    def look(self, timesteps: Tensor, cond: Tensor) -> None:
        """Compute what they do at the steps, (S,), given the encoded observations, (B, cond_dim)."""
        if self._stamp.renew() or not torch.equal(timesteps, self._timesteps):
            self._take_in(timesteps)
        by_row = functional.linear(self._activation(cond), self._weight, self._bias)  # (B, sum of C')
        self._values.copy_(self._by_step[:, None] + by_row)

    def _take_in(self, timesteps: Tensor) -> None:
        step, split = self._activation(self._step_encoder(timesteps)), self._split
        by_step = [functional.linear(step, layer.weight[:, :split]) for layer in self._layers]
        self._by_step, self._timesteps = torch.cat(by_step, dim=1), timesteps.clone()
        self._weight.copy_(torch.cat([layer.weight[:, split:] for layer in self._layers]))
        self._bias.copy_(torch.cat([layer.bias for layer in self._layers]))
