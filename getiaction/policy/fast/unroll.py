"""Keep unrolled networks: made once, used as long as the weights lie where they do."""

from __future__ import annotations

import threading
from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from getiaction.half import is_faster_in_bf16
from getiaction.policy.fast.copies import Copies, OtherLayerError
from getiaction.policy.fast.native import find_library
from getiaction.policy.fast.native_unet import ROWS, NativeUnet
from getiaction.policy.fast.unrolled import Plan, UnrolledUnet, multiplied_in
from getiaction.policy.fast.watch import Held, is_transformed
from getiaction.policy.unet import ConditionalUnet1d

PLANS = 4  # kept of a U-Net, the ones used last
ROWS_OF_BF16 = 64  # B T, up to which reading weights takes longer than multiplying them, for CPUs that have bf16


class Kept(threading.local):
    """Keep what was made for each U-Net, for each thread its own: they are written to at work."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[nn.Module, Unrolled] = WeakKeyDictionary()


class Unrolled:
    """Hold what was made for a U-Net as long as its weights lie where they do: for the last few plans."""

    def __init__(self, unet: ConditionalUnet1d) -> None:
        self.held, self.copies = Held(unet), Copies()
        self.plans: OrderedDict[Plan, UnrolledUnet] = OrderedDict()

    def find(self, unet: ConditionalUnet1d, plan: Plan) -> UnrolledUnet:
        """Return the one of a plan, or make it.

        Raises:
            OtherLayerError: the network cannot be unrolled.
        """
        if plan not in self.plans:
            library = find_library() if is_for_native(unet, plan) else None
            if library is not None:
                self.plans[plan] = NativeUnet(unet, plan, self.copies, library)
            else:
                self.plans[plan] = UnrolledUnet(unet, plan, self.copies)
            if len(self.plans) > PLANS:
                self.plans.popitem(last=False)
        self.plans.move_to_end(plan)
        return self.plans[plan]


KEPT = Kept()


def is_for_native(unet: ConditionalUnet1d, plan: Plan) -> bool:
    """Tell whether C is faster for these rows than PyTorch, whose bf16 products need a CPU that has them."""
    if next(unet.parameters()).dtype != torch.float32 or plan.dtype not in (torch.float32, torch.bfloat16):
        return False
    most = ROWS_OF_BF16 if plan.dtype == torch.bfloat16 and is_faster_in_bf16("cpu") else ROWS
    return plan.batch_size * plan.horizon <= most


def unroll(unet: nn.Module, timesteps: Tensor, cond: Tensor, horizon: int) -> UnrolledUnet | None:
    """Return what denoises T = `horizon` actions at the steps `timesteps`, (S,), given `cond`, (B, cond_dim).

    It is made anew only if it must. It is a `NativeUnet` where there is a C compiler, for a limited number of rows; it
    multiplies by copies of the weights in another order, under autocast in bf16. So does an `UnrolledUnet` on some
    CPUs, by copies of the large ones, and by bf16 copies under autocast. They are made again when a weight changed (see
    `Stamp`). None if this is no inference on the CPU, or the network has other layers than `ConditionalUnet1d` makes
    (parametrised ones, say). Hooks of its modules are not called.
    """
    if cond.device.type != "cpu":
        KEPT.of.pop(unet, None)  # what was made before it moved
        return None
    if torch.is_grad_enabled() or is_transformed() or type(unet) is not ConditionalUnet1d:
        return None
    plan = Plan(len(cond), horizon, len(timesteps), multiplied_in(unet), torch.get_num_threads())
    kept = KEPT.of.get(unet)
    if kept is None or not kept.held.unchanged():
        KEPT.of[unet] = kept = Unrolled(unet)
    if kept.held.is_patched():
        return None
    try:
        unrolled = kept.find(unet, plan)
    except OtherLayerError:
        return None
    unrolled.look(timesteps, cond)
    return unrolled
