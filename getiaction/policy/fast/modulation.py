"""What FiLM's layers do at every denoising step, for one set of observations after the other: one product for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy.fast.copies import OtherLayerError, Stamp
from getiaction.policy.unet import ConditionalUnet1d


class Modulation:
    """Do what `ConditionalUnet1d.modulation` does, with copies of the layers' weights.

    The part of the denoising steps is computed again only if the weights changed, or the steps.

    Args:
        unet: its step encoder and its activation are called.
        layers: of FiLM, one for each block.
        dtype: what products are computed in.

    Raises:
        OtherLayerError: the layers are not those that `ConditionalUnet1d` makes, or their weights lie apart.
    """

    def __init__(self, unet: ConditionalUnet1d, layers: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        kinds = {(layer.in_features, layer.weight.dtype) for layer in layers}
        own = all(list(layer._parameters) == ["weight", "bias"] and layer.bias is not None for layer in layers)
        if len(kinds) > 1 or not own:
            raise OtherLayerError
        self._step_encoder, self._activation = unet.diffusion_step_encoder, unet.activation
        self._layers, self._split = layers, unet.diffusion_step_embed_dim
        self.sizes = [layer.out_features for layer in layers]
        total, seen = sum(self.sizes), layers[0].in_features - self._split
        self._weight = layers[0].weight.new_empty(total, seen, dtype=dtype)
        self._bias = layers[0].bias.new_empty(total, dtype=dtype)
        self._by_step, self._timesteps = torch.empty(0), torch.empty(0)
        self._stamp = Stamp(
            one for layer in (*layers, self._step_encoder) for one in (*layer.parameters(), *layer.buffers())
        )

    @torch.inference_mode()
    def __call__(self, timesteps: Tensor, cond: Tensor, out: Tensor) -> None:
        """Write what all layers make, (S, B, sum of C'), at the steps, (S,), of encoded observations, (B, cond_dim)."""
        if self._stamp.changed() or not torch.equal(timesteps, self._timesteps):
            self._take_in(timesteps)
            self._stamp.keep()
        by_row = functional.linear(self._activation(cond), self._weight, self._bias)  # (B, sum of C')
        if by_row.dtype == self._by_step.dtype == out.dtype:
            torch.add(self._by_step[:, None], by_row, out=out)
        else:
            out.copy_(self._by_step[:, None] + by_row)

    def _take_in(self, timesteps: Tensor) -> None:
        self._timesteps = torch.empty(0)  # until all is there
        step, split = self._activation(self._step_encoder(timesteps)), self._split
        by_step = [functional.linear(step, layer.weight[:, :split]) for layer in self._layers]
        self._by_step = torch.cat(by_step, dim=1)  # (S, sum of C')
        self._weight.copy_(torch.cat([layer.weight[:, split:] for layer in self._layers]))
        self._bias.copy_(torch.cat([layer.bias for layer in self._layers]))
        self._timesteps = timesteps.clone()
