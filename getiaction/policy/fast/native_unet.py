"""Denoise on the CPU by one call a step: the U-Net's list of operations, done by `native.c`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from getiaction.policy.fast.convolution import Conv1d, ConvTranspose1d
from getiaction.policy.fast.copies import Copies, OtherLayerError
from getiaction.policy.fast.native import COPY, NORM, PRODUCT, Library, Operation, describe
from getiaction.policy.fast.unrolled import Plan, Track, UnrolledUnet, exactly
from getiaction.policy.unet import ConditionalUnet1d

ROWS = 1024  # B T, up to which it is faster than PyTorch for every preset that was tried: benchmarks/NOTES.md


class NativeUnet(UnrolledUnet):
    """Do what `UnrolledUnet` does, with copies of all weights but those of norms, and biases.

    All is float32, but the copies are in the plan's type: bf16 where that is asked for, for who waits for memory.

    An operation belongs to the phase after the last one that made what it reads; those of one phase are shared by all
    threads, which wait for each other between phases only.
    """

    modulates_in = torch.float32  # whatever the plan's type

    def __init__(self, unet: ConditionalUnet1d, plan: Plan, copies: Copies, library: Library) -> None:
        self._library, self._operations = library, list[tuple[int, Operation]]()
        self._made = dict[int, int]()  # the phase in which memory was written to
        self._held: list[Tensor] = []  # that operations know by their place only
        super().__init__(unet, plan, copies)
        operations = [operation for _, operation in sorted(self._operations, key=lambda pair: pair[0])]
        self._table = (Operation * len(operations))(*operations)
        del self._operations, self._made

    def look(self, timesteps: Tensor, cond: Tensor) -> None:
        """Take in the steps to denoise at, (S,), new observations, (B, cond_dim) encoded, and what weights are now."""
        with torch.autocast("cpu", enabled=False):
            super().look(timesteps, cond.float())

    @torch.inference_mode()
    def __call__(self, noisy_actions: Tensor, number: int) -> Tensor:
        """Predict (B, T, Da) from (B, T, Da) at the denoising step `number`, counted from 0."""
        if not 0 <= number < self._plan.num_steps:
            raise IndexError(f"step {number} of {self._plan.num_steps}")
        self._input.inner.copy_(noisy_actions)
        self._library.run(self._table, number, self._plan.threads)
        return self._output.clone()

    def _add(self, kind: int, reads: Sequence[Tensor], out: Tensor, **more: float | None) -> None:
        """Add an operation on the first of what it reads, which gives each (B, T) of `out`.

        Raises:
            OtherLayerError: they are of other sizes, or types: nobody looks there.
        """
        if any(one.shape[:2] != out.shape[:2] or one.dtype != torch.float32 for one in (*reads, out)):
            raise OtherLayerError
        phase = 1 + max(self._made.get(memory(one), 0) for one in reads)
        self._made[memory(out)] = max(phase, self._made.get(memory(out), 0))
        self._held += [*reads, out]
        self._operations.append((phase, describe(kind, reads[0], out, phase=phase, **more)))

    def _place(self, numbers: Tensor) -> int:
        """Return where some weights lie, in order and in float32."""
        if numbers.dtype != torch.float32 or not numbers.is_contiguous():
            raise OtherLayerError
        self._held.append(numbers.detach())
        return numbers.data_ptr()

    def _convolve(self, layer: nn.Module, x: Track) -> Tensor:
        """Convolve into a new (B, T', C'): a window is k steps of x, one after the other in memory."""
        if type(layer) is not Conv1d or layer.groups > 1 or layer.dilation != (1,):
            raise OtherLayerError
        (size,), (stride,), padding = layer.kernel_size, layer.stride, int(layer.padding[0])
        if padding > self._margin:
            raise OtherLayerError
        windows = x.padded[:, self._margin - padding : x.padded.shape[1] - self._margin + padding]
        windows = windows.unfold(1, size, stride)  # (B, T', C, k)
        out = self._new(*windows.shape[:2], layer.out_channels)
        self._multiply_into(out, windows, layer.weight.permute(0, 2, 1), layer.bias)
        return out

    def _multiply_into(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, adds: bool = False
    ) -> None:
        """Multiply windows, (B, T, ...) each k C numbers in order, by the transpose of weight, (C', k, C)."""
        reads, panel = (x, out) if adds else (x,), self._library.panel
        if weight.dtype != torch.float32 or weight[0].numel() != x[0, 0].numel() or len(weight) != out.shape[2]:
            raise OtherLayerError
        whole, halves = len(weight) // panel * panel, self._plan.dtype == torch.bfloat16
        for first, last in ((0, whole), (whole, len(weight))):
            if first == last:
                continue
            some = weight.detach()[first:last]
            panels = some.unflatten(0, (-1, panel)) if first == 0 and whole else some[None]
            panels = panels.permute(0, 2, 3, 1)
            own = self._shared.find(weight.detach(), panels, self._plan.dtype, width=panel, in_pairs=halves)
            self._copies.append(own)
            lies = self._place(bias[first:last]) if bias is not None and not adds else None
            self._add(
                PRODUCT,
                reads,
                out[..., first:last],
                weight=own.copy.data_ptr(),
                bias=lies,
                width=weight[0].numel(),
                adds=adds,
                halves=halves,
            )

    def _normalise(
        self,
        norm: nn.Module,
        x: Tensor,
        *,
        film: Tensor | None = None,
        scales: bool = False,
        residual: Tensor | None = None,
    ) -> Track:
        """Normalise groups of (B, T, C), Mish, then FiLM or add what went around, into a new track."""
        norm, track = exactly(norm, nn.GroupNorm), self._track(x.shape[1], x.shape[2])
        if norm.num_channels != x.shape[2]:
            raise OtherLayerError
        more: dict[str, float | None] = {"groups": norm.num_groups, "eps": norm.eps}
        more |= {"weight": self._place(norm.weight), "bias": self._place(norm.bias)}
        reads = [x]
        if film is not None:  # (S, B, C' or 2C')
            parts = film.chunk(2, dim=2) if scales else (film,)
            more |= {"scale": parts[0].data_ptr() if scales else None, "shift": parts[-1].data_ptr()}
            more |= {"film_number": film.stride(0), "film_batch": film.stride(1)}
        elif residual is not None:
            if residual.shape != x.shape:
                raise OtherLayerError
            reads.append(residual)
            more |= {"residual": residual.data_ptr()}
            more |= {"residual_batch": residual.stride(0), "residual_step": residual.stride(1)}
        self._add(NORM, reads, track.inner, **more)
        return track

    def _double(self, layer: nn.Module, x: Track) -> Track:
        """Double the resolution: output 2t is w1 x(t) + w3 x(t - 1), output 2t + 1 is w2 x(t) + w0 x(t + 1)."""
        layer = exactly(layer, ConvTranspose1d)
        track, steps = self._track(2 * x.inner.shape[1], layer.out_channels), x.inner.shape[1]
        for outputs, taps in ((0, ((1, 0), (3, -1))), (1, ((2, 0), (0, 1)))):
            for tap, ahead in taps:
                first = self._margin + ahead
                weight = layer.weight[:, :, tap].t()[:, None]  # (C', 1, C)
                out, there = track.inner[:, outputs::2], x.padded[:, first : first + steps]
                self._multiply_into(out, there, weight, layer.bias, adds=ahead != 0)
        return track

    def _join(self, x: Track, skip: Track) -> Track:
        channels = x.inner.shape[2]
        both = self._track(x.inner.shape[1], channels + skip.inner.shape[2])
        self._add(COPY, [x.inner], both.inner[..., :channels])
        self._add(COPY, [skip.inner], both.inner[..., channels:])
        return both

    def _keep(self, x: Tensor) -> Track:
        track = self._track(*x.shape[1:])
        self._add(COPY, [x], track.inner)
        return track


def memory(x: Tensor) -> int:
    """Return where the memory begins that a tensor is a view of."""
    return x.untyped_storage().data_ptr()
