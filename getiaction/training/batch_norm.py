"""Normalise by the batch of all processes: torch's own has the host wait in every layer, and does not know CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Normalise by mean and variance over the processes, which all have batches of the same size."""

    def forward(self, pictures: Tensor) -> Tensor:
        """Normalise (B, C, H, W); in evaluation, by the running statistics."""
        if not self.training:
            return super().forward(pictures)
        processes = torch.distributed.get_world_size()
        values, over = pictures.float(), (0, 2, 3)
        mean = all_reduce(values.mean(over)) / processes  # (C,), differentiable
        centred = values - mean[:, None, None]
        variance = all_reduce(centred.square().mean(over)) / processes
        count = processes * values.numel() / values.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)  # type: ignore[union-attr, arg-type]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(pictures.dtype)


def synchronise_batch_norm(module: nn.Module) -> None:
    """Let all batch norms below `module` look at all processes; names and parameters stay."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                other = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
                other.load_state_dict(child.state_dict())
                parent.add_module(name, other)
