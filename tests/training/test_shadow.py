"""Take a step on CUDA without a GPU: PyTorch's fake tensors say where they lie and hold no numbers.

Whoever computes with tensors of two devices, or brings a number to the host, is told so. What is left out is what needs
a driver: the backward pass, pinned memory, kernels; and small tensors that are made on the way to the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from getiaction.training.ema import Ema
from getiaction.training.loop import Trainer

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a real GPU tells itself, and does not work any more after this"
)


class RealOnCpu(TorchDispatchMode):
    """Let fake tensors stand for CUDA only; what concerns the CPU alone is done for real, copies to it are refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if brings_to_host(func, args, named):
            raise RuntimeError("the host waits for a copy")
        for one in tree_leaves((args, named)):
            if isinstance(one, FakeTensor) or (isinstance(one, torch.device) and one.type == "cuda"):
                return func(*args, **named)
        with unset_fake_temporarily():
            return func(*args, **named)


def brings_to_host(func: Any, args: Any, named: Any) -> bool:
    """Tell whether an operation copies from CUDA to the CPU."""
    if func is torch.ops.aten._to_copy.default:
        return args[0].is_cuda and getattr(named.get("device"), "type", "cuda") == "cpu"
    return func is torch.ops.aten.copy_.default and args[1].is_cuda and not args[0].is_cuda


def on_cuda(tensor: Tensor) -> Tensor:
    """Return what says that it is `tensor`, on a GPU."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CUDA)


def move(module: nn.Module) -> None:
    """Let a module's tensors lie on a GPU that is not there; `Module.to` wants a real one."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    moved = on_cuda(tensor)
                    own[name] = nn.Parameter(moved, tensor.requires_grad) if own is part._parameters else moved


@pytest.fixture
def trainer(tiny: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """Return a trainer of pictures whose policy, average and data lie on CUDA."""
    more = ("training.max_grad_norm=1.0", "training.gradient_accumulation_steps=2", "training.noise_draws=2")
    trainer = tiny.trainer(tmp_path, *helpers.WITH_PICTURES, *more)
    policy, gatherer = trainer.policy, trainer.batches.gatherer
    assert trainer.ema is not None

    def fill(_: Accelerator, loss: Tensor) -> None:
        assert loss.device == CUDA
        for weight in policy.parameters():
            weight.grad = torch.empty_like(weight)

    with FakeTensorMode(allow_non_fake_inputs=True), RealOnCpu():
        move(policy)
        move(trainer.ema.average)
        trainer.optimizer.param_groups[0]["params"] = list(policy.parameters())
        gatherer.device, gatherer.on_device = CUDA, True
        gatherer.vectors = {key: on_cuda(values) for key, values in gatherer.vectors.items()}
        gatherer.frames_on_device = {
            key: torch.empty(frames.shape, dtype=torch.uint8, device=CUDA) for key, frames in gatherer.frames.items()
        }
        gatherer.frames = {}
        monkeypatch.setattr(Accelerator, "device", property(lambda _: CUDA))
        monkeypatch.setattr(Accelerator, "backward", fill)
        monkeypatch.setattr(Tensor, "pin_memory", lambda own: own)
        yield trainer


def test_a_step_mixes_no_devices_and_waits_for_nothing(trainer: Trainer):
    for step in range(2):
        trainer._optimise(trainer.batches.step(step))
    assert [loss.device for loss in trainer.unread] == [CUDA, CUDA]
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert moments
    assert {value.device for value in moments} == {CUDA}
    assert {weight.device for weight in trainer.best.parameters()} == {CUDA}


def test_a_chunk_mixes_no_devices_and_waits_for_nothing(trainer: Trainer):
    policy = trainer.best.eval()
    shapes = {key: policy.features.shapes[key] for key in policy.features.observation_keys}
    seen = {key: torch.empty(1, policy.n_obs_steps, *shape, device=CUDA) for key, shape in shapes.items()}
    noise = torch.empty(1, policy.horizon, policy.features.action_dim, device=CUDA)
    assert policy.predict_action_chunk(seen, noise=noise).device == CUDA


@pytest.mark.parametrize(
    "wait",
    [
        lambda weight: weight.sum().item(),
        lambda weight: weight.sum().cpu(),
        lambda weight: weight.to("cpu"),
        lambda weight: torch.empty(weight.shape).copy_(weight),
    ],
)
def test_who_waits_for_a_number_is_told(wait: Any, trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ema, "update", lambda own, module, step: wait(next(module.parameters()).detach()))
    with pytest.raises((DataDependentOutputException, RuntimeError), match=r"_local_scalar_dense|the host waits"):
        trainer._optimise(trainer.batches.step(0))


def test_who_mixes_devices_is_told(trainer: Trainer):
    trainer.policy.noising.signal = torch.ones(50)
    with pytest.raises(RuntimeError, match="devices"):
        trainer._optimise(trainer.batches.step(0))
