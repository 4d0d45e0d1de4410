"""Adam's steps by our kernel are PyTorch's to rounding; without a GPU, Triton's interpreter runs it.

tests/policy/fast/test_fused.py starts the process in which the interpreter does.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import os
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreting import hurry
from torch import nn

from getiaction.policy.fast.beside import beside
from getiaction.policy.fast.casts import keep_shadows, shadows_of
from getiaction.policy.fast.convolution import Conv1d, Conv2d
from getiaction.training import adam
from getiaction.training import stepper as stepping
from getiaction.training.ema import Ema
from getiaction.training.stepper import update_many_at_once

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
if INTERPRETED:
    hurry()
CHOICES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"betas": (0.95, 0.999), "eps": 1e-6}),
]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (ON_GPU or INTERPRETED):
        pytest.skip("tests/policy/fast/test_fused.py runs this file in Triton's interpreter")
    found = importlib.import_module("getiaction.training.adam_kernel")
    monkeypatch.setattr(adam, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(stepping, "find_kernel", lambda: found)
    return found


@pytest.fixture
def alone(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep PyTorch's fused kernels from taking a step."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("PyTorch's kernel")

    for name in ("_fused_adam_", "_fused_adamw_"):
        monkeypatch.setattr(torch, name, refuse)


def make_weights() -> list[nn.Parameter]:
    """Return weights of more than one block, of sizes that four does and does not divide, more than a launch takes."""
    torch.manual_seed(0)
    picture = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    few = [torch.randn(3) for _ in range(adam.COUNT)]
    return [
        nn.Parameter(one.to(DEVICE))
        for one in (torch.randn(5000), picture, torch.randn(7), torch.randn(4, 2).t(), *few)
    ]


def step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], number: int) -> None:
    torch.manual_seed(number)
    for weight in weights[:-1]:  # the last has no gradient
        weight.grad = torch.empty_like(weight).normal_()
    optimizer.step()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("kind", "options"), CHOICES)
def test_steps_are_those_of_pytorch(
    alone: None, kind: type[torch.optim.Optimizer], options: dict[str, Any], on_device: bool
) -> None:
    weights = make_weights(), make_weights()
    ours, theirs = kind(weights[0], lr=1e-2, fused=True, **options), kind(weights[1], lr=1e-2, **options)
    update_many_at_once(ours)
    for number in range(4):
        step(ours, weights[0], number)
        step(theirs, weights[1], number)
        rate = 1e-2 / (number + 2)
        theirs.param_groups[0]["lr"] = rate
        ours.param_groups[0]["lr"] = torch.tensor(rate, device=DEVICE) if on_device else rate  # as a graph reads it
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    found, wanted = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert found.keys() == wanted.keys() == {*range(len(weights[0]) - 1)}
    for number, entry in found.items():
        assert entry.keys() == wanted[number].keys()
        for name, value in entry.items():
            assert torch.allclose(value.cpu(), wanted[number][name].cpu(), rtol=1e-5, atol=1e-7), name
    assert ours.param_groups[0]["params"] == weights[0]


def test_steps_average_the_weights_that_they_have(alone: None) -> None:
    """As if the average was taken after each step: the same to rounding, those without a gradient included."""
    modules = [nn.Module(), nn.Module()]
    for module in modules:
        module.weights = nn.ParameterList(make_weights())
    averages, optimizers = [Ema(module) for module in modules], []
    for module, ema in zip(modules, averages, strict=True):
        optimizers.append(torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True))
        update_many_at_once(optimizers[-1], ema.follow(module, torch.device(DEVICE)) if ema is averages[0] else None)
    for number in range(5):
        for module, ema, optimizer in zip(modules, averages, optimizers, strict=True):
            weights = list(module.parameters())
            ema.prepare(number)
            step(optimizer, weights, number)
            with torch.no_grad():
                weights[-1].add_(1.0)  # somebody else's change
            ema.update(module, number)
        assert averages[0]._followed is not None
        assert len(averages[0]._followed.done) == len(weights) - 1
        pairs = zip(*(ema.average.parameters() for ema in averages), strict=True)
        assert all(torch.allclose(*pair, rtol=1e-6, atol=1e-7) for pair in pairs)
        if number == 2:  # somebody moves an average
            moved = next(averages[0].average.parameters())
            moved.data = moved.data.clone()
        assert (number < 2) == torch.equal(*(next(one.parameters()) for one in (averages[0].average, modules[0])))


def loss_of(weights: list[nn.Parameter], number: int) -> torch.Tensor:
    """Return what gives weights the gradients that `step` gives them."""
    torch.manual_seed(number)
    chosen = [torch.empty_like(weight).normal_() for weight in weights[:-1]]
    return torch.stack([(one * weight).sum() for one, weight in zip(chosen, weights, strict=False)]).sum()


def test_weights_updated_ahead_of_a_step_are_updated_once(alone: None) -> None:
    """Bit for bit as in the step, with their averages."""
    modules = [nn.Module(), nn.Module()]
    for module in modules:
        module.weights = nn.ParameterList(make_weights() + make_weights())
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True) for module in modules]
    averages = [Ema(module) for module in modules]
    follow = [ema.follow(module, torch.device(DEVICE)) for ema, module in zip(averages, modules, strict=True)]
    steppers = [update_many_at_once(*both) for both in zip(optimizers, follow, strict=True)]
    for number in range(2):
        for module, ema, optimizer, stepper in zip(modules, averages, optimizers, steppers, strict=True):
            weights = list(module.parameters())
            before = [weight.detach().clone() for weight in weights]
            ema.prepare(number)
            assert stepper is not None
            loss = loss_of(weights, number)
            with stepper.ahead(loss) if optimizer is optimizers[0] else contextlib.nullcontext():
                loss.backward()
            ahead = sum(not torch.equal(*pair) for pair in zip(before, weights, strict=True))
            assert (0 < ahead < len(weights)) is (optimizer is optimizers[0])
            optimizer.step()
            optimizer.zero_grad()
            ema.update(module, number)
        pairs = zip(*(ema.average.parameters() for ema in averages), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        assert all(torch.equal(*pair) for pair in zip(*(module.parameters() for module in modules), strict=True))
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert {float(entry["step"]) for entry in states[0].values()} == {2.0}
    assert all(torch.equal(states[0][key]["exp_avg"], states[1][key]["exp_avg"]) for key in states[1])


class Halved(torch.autograd.Function):
    """Add up weights times something, rounding the gradient as autocast's products are."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(chosen)
        return (weight * chosen).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [chosen] = ctx.saved_tensors
        with beside(True, chosen) as narrow:
            found = (gradients[0] * chosen).bfloat16()
        return found if narrow else found.float(), None


@pytest.mark.parametrize("late", [False, True])
def test_gradients_in_two_bytes_are_those_in_four(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Bit for bit, ahead of the step, in it, and where PyTorch takes it."""
    made, types = [], []
    for narrow in (True, False):
        weights = make_weights() + make_weights()
        optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
        stepper = update_many_at_once(optimizer, narrow=narrow)
        assert stepper is not None
        if late:  # none is taken ahead
            monkeypatch.setattr(stepping, "AHEAD", None)
        for number in range(3):
            torch.manual_seed(number)
            chosen = [torch.empty_like(weight).normal_() for weight in weights[:-1]]
            loss = torch.stack([Halved.apply(*pair) for pair in zip(weights, chosen, strict=False)]).sum()
            with stepper.ahead(loss):
                loss.backward()
            types.append({weight.grad.dtype for weight in weights[:-1]})
            if number == 2 and late:
                optimizer.step(lambda: torch.zeros(()))
            else:
                optimizer.step()
            optimizer.zero_grad()
        made.append([*weights, *(state["exp_avg_sq"] for state in optimizer.state.values())])
    assert types == [{torch.bfloat16}] * 3 + [{torch.float32}] * 3
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))


@pytest.mark.parametrize("listens", ["step", "gradient", "accumulated", "anomaly", "twice", "nobody"])
def test_nobody_is_ahead_of_who_listens(alone: None, listens: str) -> None:
    """He may change the gradients, or read them; nor is anybody whose gradients autograd adds up."""
    weights = make_weights() + make_weights()
    optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
    stepper = update_many_at_once(optimizer)
    assert stepper is not None
    before = [weight.detach().clone() for weight in weights]
    handles: dict[str, Any] = {
        "step": lambda: optimizer.register_step_pre_hook(lambda *_: None),
        "gradient": lambda: weights[0].register_hook(lambda *_: None),
        "accumulated": lambda: weights[0].register_post_accumulate_grad_hook(lambda *_: None),
    }
    loss = loss_of(weights, 0)
    loss = loss + weights[3].sum() if listens == "twice" else loss
    heard = handles[listens]() if listens in handles else None
    with torch.autograd.set_detect_anomaly(listens == "anomaly"), stepper.ahead(loss):
        loss.backward()
    assert all(torch.equal(*pair) for pair in zip(before, weights, strict=True)) is (listens != "nobody")
    del heard


def test_a_backward_pass_that_breaks_off_leaves_the_next_step_whole(alone: None) -> None:
    weights = make_weights() + make_weights()
    optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
    stepper = update_many_at_once(optimizer)
    assert stepper is not None
    loss = loss_of(weights, 0)

    def break_off() -> None:
        with stepper.ahead(loss):
            loss.backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    before = [weight.detach().clone() for weight in weights]
    step(optimizer, weights, 1)
    assert not any(torch.equal(*pair) for pair in zip(before[:-1], weights[:-1], strict=True))


class Refused(torch.autograd.Function):
    """Do in a backward pass what may not be captured."""

    @staticmethod
    def forward(_: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_breaks_off_leaves_the_step_to_be_taken(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was captured has run: neither what was updated ahead, nor the gradients that were waiting."""
    groups = [make_weights() + make_weights() for _ in range(2)]
    optimizers = [torch.optim.AdamW(weights, lr=1e-2, fused=True) for weights in groups]
    stepper, _ = [update_many_at_once(optimizer) for optimizer in optimizers]
    assert stepper is not None
    for weights, optimizer in zip(groups, optimizers, strict=True):
        step(optimizer, weights, 0)
        optimizer.zero_grad()
    refused = Refused.apply(groups[0][0]).sum()  # what is computed first is differentiated last
    loss, kept = refused + loss_of(groups[0], 1), copy.deepcopy(optimizers[0].state_dict())
    before = [weight.detach().clone() for weight in groups[0]]
    monkeypatch.setattr("getiaction.training.stepper.come_from_one_place", lambda _: True)

    def capture() -> None:
        with stepper.ahead(loss):
            loss.backward()

    def refuse(*_: Any) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "_foreach_add_", refuse)
        with pytest.raises(RuntimeError, match="not permitted"):
            capture()
    assert not all(torch.equal(*pair) for pair in zip(before, groups[0], strict=True))
    with torch.no_grad():
        for weight, value in zip(groups[0], before, strict=True):
            weight.copy_(value)
    optimizers[0].load_state_dict(kept)
    for weights, optimizer in zip(groups, optimizers, strict=True):
        step(optimizer, weights, 1)
    assert all(torch.equal(*pair) for pair in zip(*groups, strict=True))
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {2.0}


def test_weights_that_do_not_learn_are_left_alone(alone: None) -> None:
    weights = make_weights() + make_weights()
    weights[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(weights[:-1], lr=1e-2, fused=True)
    stepper = update_many_at_once(optimizer)
    optimizer.add_param_group({"params": weights[-1:]})
    assert stepper is not None
    before = [weight.detach().clone() for weight in weights]
    loss = loss_of([*weights, weights[0]], 0)
    with stepper.ahead(loss):
        loss.backward()
    optimizer.step()
    assert torch.equal(before[0], weights[0])
    assert not any(torch.equal(*pair) for pair in zip(before[1:], weights[1:], strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_a_closure_that_comes_too_late_is_refused(alone: None) -> None:
    weights = make_weights() + make_weights()
    optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
    stepper = update_many_at_once(optimizer)
    assert stepper is not None
    with stepper.ahead(loss := loss_of(weights, 0)):
        loss.backward()
    with pytest.raises(RuntimeError, match="comes too late"):
        optimizer.step(lambda: torch.zeros(()))


def test_an_optimiser_that_is_let_go_is_gone(alone: None) -> None:
    """Without the garbage collector: its moments are as large as all weights twice over."""
    weights = make_weights()
    optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
    update_many_at_once(optimizer)
    step(optimizer, weights, 0)
    moment = weakref.ref(optimizer.state[weights[0]]["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert moment() is None
    finally:
        gc.enable()
    assert not any(weight._post_accumulate_grad_hooks for weight in weights)


def test_steps_write_weights_in_another_type_as_well(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Conv1d(3, 5, 3), nn.GroupNorm(1, 5), Conv2d(3, 4, 3)).to(DEVICE)
    module[2].to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    shadows = keep_shadows(module, torch.bfloat16)
    assert shadows_of(module) is shadows
    assert len(shadows.of) == 4
    update_many_at_once(optimizer, None, shadows)
    shadows.bring_up_to_date()

    def are_the_weights() -> bool:
        apart = 0.0 if ON_GPU else 2**-7  # the interpreter does not round
        pairs = [(shadow.float(), weight.detach().bfloat16().float()) for weight, shadow in shadows.of.items()]
        return all(torch.allclose(*pair, rtol=apart, atol=0.0) for pair in pairs)

    assert are_the_weights()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before = {weight: shadow._version for weight, shadow in shadows.of.items()}
    optimizer.step()
    changed = [weight is module[0].weight for weight, shadow in shadows.of.items() if shadow._version != before[weight]]
    assert changed == [True]  # a backward pass through one must notice its change, through the others nothing
    copy = torch._foreach_copy_
    for number in range(3):
        monkeypatch.setattr(torch, "_foreach_copy_", None)
        for weight in module.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert are_the_weights()
        shadows.bring_up_to_date()  # nothing to copy
        monkeypatch.setattr(torch, "_foreach_copy_", copy)
        if number == 0:
            module.load_state_dict({key: value * 2 for key, value in module.state_dict().items()})
        elif number == 1:
            module[0].weight.data = module[0].weight.data + 1
        else:
            continue
        assert not are_the_weights()
        shadows.bring_up_to_date()
        assert are_the_weights()


def test_averages_that_lie_otherwise_are_left_to_pytorch(kernel: ModuleType) -> None:
    module = nn.Linear(3, 4).to(DEVICE)
    ema = Ema(module)
    ema.average.weight.data = ema.average.weight.data.t().contiguous().t()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    update_many_at_once(optimizer, followed := ema.follow(module, torch.device(DEVICE)))
    for number in range(4):
        ema.prepare(number)
        for weight in module.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert followed.done == {module.bias}
        before = ema.average.weight.detach().clone()
        ema.update(module, number)
        wanted = torch.lerp(before, module.weight.detach(), 1 - ema.decay(number))
        assert torch.allclose(ema.average.weight, wanted)
    optimizer.step(lambda: torch.zeros(()))  # PyTorch's
    assert not followed.done


def test_a_step_that_nobody_prepared_is_seen_in_the_average(kernel: ModuleType) -> None:
    module = nn.Linear(3, 4).to(DEVICE)
    ema = Ema(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    update_many_at_once(optimizer, ema.follow(module, torch.device(DEVICE)))
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(average.isnan().all() for average in ema.average.parameters())


def test_the_first_steps_keep_their_digits(alone: None) -> None:
    """With beta2=0.999 the first step divides by 1 - 0.999, of which float32 would leave four digits."""
    weight = nn.Parameter(torch.zeros(4, device=DEVICE))
    optimizer = torch.optim.Adam([weight], lr=1.0, fused=True, eps=0.0)
    update_many_at_once(optimizer)
    weight.grad = torch.tensor([1.0, -2.0, 3.0, 1e-3], device=DEVICE)
    optimizer.step()
    assert torch.allclose(weight.cpu(), -torch.tensor([1.0, -1.0, 1.0, 1.0]), rtol=1e-6)


def test_a_run_goes_on_from_what_was_saved(alone: None) -> None:
    whole, half = make_weights(), make_weights()
    one, other = (torch.optim.AdamW(weights, lr=1e-2, fused=True) for weights in (whole, half))
    update_many_at_once(one)
    update_many_at_once(other)
    for number in range(4):
        step(one, whole, number)
    for number in range(2):
        step(other, half, number)
    resumed = torch.optim.AdamW(half, lr=1e-2, fused=True)
    update_many_at_once(resumed)
    resumed.load_state_dict(other.state_dict())
    for number in range(2, 4):
        step(resumed, half, number)
    assert all(torch.equal(*pair) for pair in zip(whole, half, strict=True))


class Other(torch.optim.AdamW):
    """Somebody's own optimiser."""


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"maximize": True},
        {"fused": False},
        {"betas": (0.0, 0.99)},
        {"kind": Other},
        {"closure": lambda: torch.zeros(())},
    ],
)
def test_steps_that_are_left_to_pytorch(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(stepping.Stepper, "_launch", None)
    rest = {"kind": torch.optim.AdamW, "closure": None, "fused": True, **options}
    kind, closure = rest.pop("kind"), rest.pop("closure")
    weight = nn.Parameter(torch.ones(4, 4, device=DEVICE))
    optimizer = kind([weight], **rest)
    update_many_at_once(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step(closure)
    assert float(weight.detach().mean()) != 1


def test_a_gradient_scaler_is_left_to_pytorch(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping.Stepper, "_launch", None)
    weight = nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = torch.optim.AdamW([weight], fused=True)
    update_many_at_once(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.grad_scale = torch.full((), 2.0, device=DEVICE)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros((), device=DEVICE)  # type: ignore[attr-defined]
    optimizer.step()
    assert float(weight.detach().mean()) != 1


def test_weights_that_are_left_to_pytorch(kernel: ModuleType) -> None:
    weight, half = nn.Parameter(torch.ones(4, 4, device=DEVICE)), nn.Parameter(torch.ones(4, device=DEVICE).bfloat16())
    half.grad, weight.grad = torch.ones_like(half), torch.ones_like(weight)
    assert adam.kernel_takes(weight, {})
    assert not adam.kernel_takes(half, {})
    moments = {"exp_avg": torch.ones(4, 4, device=DEVICE).t()}
    assert not adam.kernel_takes(weight, moments)  # which lie otherwise
    weight.grad = torch.ones(4, 4, device=DEVICE).t()
    assert not adam.kernel_takes(weight, {})
    column = nn.Parameter(torch.ones(3, 1, device=DEVICE))
    column.grad = torch.ones(1, 3, device=DEVICE).t()
    assert adam.kernel_takes(column, {})  # a side of length 1 lies anyhow


def test_a_step_that_breaks_off_loses_no_weights(alone: None) -> None:
    weights = make_weights()
    optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
    update_many_at_once(optimizer)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(optimizer, weights, 0)
    handle.remove()
    step(optimizer, weights, 1)
    assert optimizer.param_groups[0]["params"] == weights
    assert float(optimizer.state[weights[0]]["step"]) == 2


def test_a_backward_pass_through_changed_weights_is_noticed(alone: None) -> None:
    weight = nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = torch.optim.AdamW([weight], fused=True)
    update_many_at_once(optimizer)
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(INTERPRETED, reason="there is nothing to compile")
@pytest.mark.parametrize("aligned", [True, False])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(aligned: bool) -> None:
    pytest.importorskip("triton", reason="PyTorch's builds without CUDA have no Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = importlib.import_module("getiaction.training.adam_kernel").adam_kernel
    tuples = ("weights", "gradients", "means", "squares", "averages", "steps")
    constants = {"ALIGNED": aligned, "DECOUPLED": True, "FOLLOWS": True, "CASTS": True, "COUNT": 3, "BLOCK": 1024}
    types: dict[str, Any] = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(tuples, ("*fp32",) * 3)
    types |= {
        "shadows": ("*bf16",) * 3,
        "ends": "*i32",
        "sizes": "*i32",
        "lr": "*fp32",
        "share": "*fp32",
    } | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    attributes = {(i, j): [["tt.divisibility", 16]] for i in range(6) for j in range(3)}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    found = compile(source, target=GPUTarget("cuda", 90, 32)).asm
    assert ("ld.global.v4" in found["ptx"]) is aligned  # four numbers at once
