"""Act for many episodes at once, each as if it were alone.

What a row gets depends on its observations and its moment only, bit by bit, whatever the other rows are. Two things
make it so: every call of the network has the same number of rows (kernels choose their order of summation by shape;
multiples of 16 treat all rows alike), and every row has its own noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from getiaction.policy.diffusion import DiffusionPolicy
from getiaction.random import Purpose, generator

ROWS = {"cpu": 16, "cuda": 64}  # more rows cost a CPU more time; on a GPU they are free up to here


class BatchedActor:
    """Turn observations of B episodes into B action chunks.

    Args:
        policy: its device is used as it is.
        seed: of the denoising noise, beside each row's moment.
        batch_size: rows of each call of the network, a multiple of 16; fewer are filled up, and the filling dropped.
        num_inference_steps: overrides the policy's own.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
    ) -> None:
        self.policy, self.seed, self.num_inference_steps = policy.eval(), seed, num_inference_steps
        self.device = policy.device
        self.batch_size = batch_size or ROWS.get(self.device.type, 16)
        if self.batch_size % 16:
            raise ValueError(f"batch_size={batch_size} must be a multiple of 16, or rows would not all be equal")

    def __call__(self, observations: Mapping[str, np.ndarray], moments: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Return action chunks (B, Ta, Da) in the dataset's units.

        Args:
            observations: `observation.*` (B, To, ...) in raw units, pictures uint8.
            moments: whole numbers that name each row's moment, (episode's seed, chunk): its noise comes from them.
        """
        chunks = [
            self._call({key: value[first:last] for key, value in observations.items()}, moments[first:last])
            for first, last in self._parts(len(moments))
        ]
        return np.concatenate(chunks)

    def _parts(self, count: int) -> list[tuple[int, int]]:
        return [(first, min(first + self.batch_size, count)) for first in range(0, count, self.batch_size)]

    def _call(self, observations: Mapping[str, np.ndarray], moments: Sequence[tuple[int, ...]]) -> np.ndarray:
        rows = len(moments)
        filled = [*range(rows), *[0] * (self.batch_size - rows)]
        generators = [generator(self.seed, Purpose.ROLLOUT, *moments[row]) for row in filled]
        shape = (self.policy.horizon, self.policy.features.action_dim)
        noise = torch.stack([torch.randn(shape, generator=draw) for draw in generators])  # (batch_size, T, Da)
        on_device: dict[str, Tensor] = {
            key: torch.from_numpy(np.ascontiguousarray(value[filled])).to(self.device)
            for key, value in observations.items()
        }
        chunk = self.policy.predict_action_chunk(
            on_device,
            noise=noise.to(self.device),
            generator=generators,
            num_inference_steps=self.num_inference_steps,
        )
        return chunk[:rows].float().cpu().numpy()  # the host waits for the device here
