"""Mirror demonstrations of a task that is its own mirror image: who saw one has seen two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from getiaction.keys import ACTION, ACTION_IS_PAD, is_camera

VECTOR, PICTURE = {"order", "scale", "offset"}, {"flip", "transpose", "source"}
SIDES = {"height": -3, "width": -2}  # dimensions of (..., H, W, C)


@dataclass(frozen=True)
class Mirror:
    """Say how each feature looks in the mirror.

    Args:
        features: key -> for a vector `order` (D,), `scale` and `offset`, each one number or D of them: number i becomes
            `value[order[i]] * scale[i] + offset[i]`. For a camera `flip`, some of "height" and "width", then
            `transpose`, rows for columns; `source` names the camera whose picture it is (a right one's is the left's).

    Raises:
        ValueError: an entry that means nothing, or a mirror whose image's image is not what it began with.
    """

    features: Mapping[str, Mapping[str, Any]]
    _ready: dict[tuple, tuple[Tensor, ...]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for key, entry in self.features.items():
            known = PICTURE if is_camera(key) else VECTOR
            if unknown := sorted(set(entry) - known):
                raise ValueError(f"features.{key} has {unknown}: use some of {sorted(known)}")
            if is_camera(key):
                if not isinstance(entry.get("flip", ()), list | tuple):
                    raise ValueError(f"features.{key}.flip={entry['flip']} must be a list of some of {sorted(SIDES)}")
                if wrong := sorted(set(entry.get("flip", ())) - set(SIDES)):
                    raise ValueError(f"features.{key}.flip={wrong} must be some of {sorted(SIDES)}")
                if self.source(self.source(key)) != key:
                    raise ValueError(f"features.{key}.source={self.source(key)} must have {key} as its own source")
                pixels = torch.arange(9.0).reshape(3, 3, 1)
                if not torch.equal(self.picture(key, self.picture(self.source(key), pixels)), pixels):
                    raise ValueError(f"features.{key}: mirrored twice, it must be what it was")
                continue
            for name in ("order", "scale", "offset"):
                if not are_numbers(entry.get(name, 0.0)):
                    raise ValueError(f"features.{key}.{name}={entry[name]} must be a number, or a list of numbers")
            order = entry.get("order")
            order = list(order) if isinstance(order, list | tuple) else []
            if sorted(order) != list(range(len(order))) or not order:
                raise ValueError(f"features.{key}.order={entry.get('order')} must name each place once, counted from 0")
            if any(np.size(entry.get(name, 0.0)) not in (1, len(order)) for name in ("scale", "offset")):
                raise ValueError(f"features.{key}: scale and offset must be one number each, or {len(order)}")
            probe = torch.arange(1.0, len(order) + 1, dtype=torch.float64)
            if not self.vector(key, self.vector(key, probe)).allclose(probe):
                raise ValueError(f"features.{key}: mirrored twice, it must be what it was")

    def source(self, camera: str) -> str:
        """Return the camera whose picture, mirrored, is this one's."""
        return self.features.get(camera, {}).get("source", camera)

    def vector(self, key: str, values: Tensor) -> Tensor:
        """Mirror vectors (..., D), in raw units."""
        place = (key, values.dtype, values.device)
        if place not in self._ready:  # brought to a device once: at each step the host would wait for it
            entry = self.features[key]
            order = torch.tensor(list(entry["order"]), device=values.device)
            scale, offset = (
                torch.as_tensor(entry.get(name, usual), dtype=values.dtype, device=values.device)
                for name, usual in (("scale", 1.0), ("offset", 0.0))
            )
            self._ready[place] = order, scale, offset
        order, scale, offset = self._ready[place]
        return values.index_select(-1, order) * scale + offset

    def picture(self, key: str, pixels: Tensor) -> Tensor:
        """Mirror pictures (..., H, W, C)."""
        entry = self.features[key]
        flipped = pixels.flip([SIDES[side] for side in entry.get("flip", ())])
        return flipped.transpose(-3, -2) if entry.get("transpose") else flipped

    def apply(self, batch: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
        """Mirror the `chosen` (B,) samples of a batch, whose pictures are (B, To, h, w, C)."""
        mirrored = {}
        for key, value in batch.items():
            if key == ACTION_IS_PAD:
                mirrored[key] = value
                continue
            image = self.picture(key, batch[self.source(key)]) if is_camera(key) else self.vector(key, value)
            mirrored[key] = torch.where(chosen.reshape(-1, *[1] * (value.ndim - 1)), image, value)
        return mirrored

    def missing(self, observations: Mapping[str, Any] | list[str]) -> list[str]:
        """Return the features of a policy that this says nothing of: its observations, and the action."""
        wanted = [*observations, ACTION]
        return [key for key in wanted if key not in self.features]


def are_numbers(value: Any) -> bool:
    """Tell whether something is a number, or a list of numbers."""
    return all(isinstance(part, int | float) for part in (value if isinstance(value, list | tuple) else [value]))
