"""Results that go two ways on a GPU, channels last: for a kernel of ours that takes both gradients."""

from __future__ import annotations

import torch
from torch import Tensor

LAST = torch.channels_last


def twin(x: Tensor) -> Tensor:
    """Return the same numbers, in the same place, as another result for autograd: whose gradient comes on its own.

    Neither may be changed in place: autograd would not notice what that does to the other.
    """
    same = torch.empty(0, dtype=x.dtype, device=x.device)
    return same.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def lay(gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Return the gradients of a result that went one way or two, channels last, those that are there first."""
    there: list[Tensor | None] = [one.contiguous(memory_format=LAST) for one in gradients if one is not None]
    return [*there, None][:2]


def lies_last(x: Tensor) -> bool:
    """Tell whether the kernels take x (B, C, H, W)."""
    return x.is_contiguous(memory_format=LAST) and x.numel() > 0
