"""Tell weights from others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a checksum of weights, by name and content."""
    digest = xxhash.xxh3_64()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
