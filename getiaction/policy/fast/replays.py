"""Keep the CUDA graphs of a module's calls, and tell which one a call replays."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from getiaction.policy.fast.replay import LOCK, Replay
from getiaction.policy.fast.watch import Held, Listeners

log = logging.getLogger(__name__)
KEPT = 4  # graphs of a policy, the ones used last; each holds the memory of its call
PATIENCE = 4 * KEPT  # how many may have been given up before other calls are no longer tried


class Replays:
    """Keep the graphs of one module's calls: one for each kind of call, the last few of them.

    A copy of the module, or a pickled one, has none.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Replay] = OrderedDict()
        self._held: Held | None = None
        self._listeners: Listeners | None = None
        self._done: torch.cuda.Event | None = None
        self._given_up = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def __call__(
        self, module: nn.Module, kind: Hashable, make: Callable[[], Callable[..., Tensor]], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """Call a function that reads `module`, or replay it.

        Args:
            kind: what decides, beside the inputs' shapes and types, which kernels the function launches.
            make: makes the function, as `Replay` takes it.
        """
        key = (kind, rounding(), tuple((one.shape, one.dtype, one.device) for one in inputs))
        with LOCK:  # a graph's inputs and results lie in one place
            if self._held is None or self._listeners is None or not self._held.unchanged():
                self._kept.clear()
                self._held, self._listeners, self._given_up = Held(module), Listeners(module), 0
            if self._listeners.there() or (key not in self._kept and self._given_up >= PATIENCE):
                return make()(*inputs)
            here = torch.cuda.current_stream(inputs[0].device)
            if self._done is not None:
                here.wait_event(self._done)  # another stream may have been here
            if key not in self._kept:
                self._kept[key] = Replay(make(), inputs[0].device, is_pure=True)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
                self._given_up += 1
                if self._given_up == PATIENCE:
                    log.warning("warning: so many kinds of calls take turns that new ones become no CUDA graphs")
            result = self._kept[key](*inputs)
            self._done = here.record_event()
        return result


def can_replay(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Tell whether a call of a module, without gradients, can be a graph: in inference, with all inputs on one GPU."""
    if module.training or torch.compiler.is_compiling() or any(one.device.type != "cuda" for one in inputs):
        return False
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def rounding() -> tuple[Any, ...]:
    """Return what else decides which kernels run, and on what tensors: precision, and how cuDNN chooses."""
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    tf32 = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    return cast, *tf32, *cudnn, torch.is_inference_mode_enabled()
