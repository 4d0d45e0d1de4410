"""The unrolled U-Net: the same as the plain one, whatever its shape, and always with the weights as they are now."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import getiaction.policy.fast.unrolled as unrolled_module
from getiaction.policy import ConditionalUnet1d
from getiaction.policy.fast.convolution import Conv1d
from getiaction.policy.fast.unroll import KEPT, PLANS, unroll
from getiaction.policy.fast.unrolled import UnrolledUnet

TIMESTEPS = torch.tensor([90, 10, 0])
SHAPES: dict[str, dict[str, Any]] = {
    "three levels": {"down_dims": (16, 32, 64)},
    "two levels, few groups, small kernel": {"down_dims": (16, 32), "kernel_size": 3, "n_groups": 4},
    "one level, shift only": {"down_dims": (16,), "use_film_scale_modulation": False},
    "kernel of one": {"down_dims": (16, 32), "kernel_size": 1},
    "wide enough for two threads": {"down_dims": (64, 256)},
}


def make(dtype: torch.dtype = torch.float64, **shape: Any) -> ConditionalUnet1d:
    """Return a U-Net in which every weight and bias matters."""
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=3, cond_dim=5, **shape).to(dtype)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.normal_(std=0.2)
    return unet


def denoise(unet: ConditionalUnet1d, actions: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the unrolled and the plain network predict at each of TIMESTEPS: (S, B, T, Da) both."""
    with torch.no_grad():
        unrolled = unroll(unet, TIMESTEPS, cond, actions.shape[1])
        fast = torch.stack([unrolled(actions, number) for number in range(len(TIMESTEPS))])
        return fast, torch.stack([unet(actions, timestep.expand(len(actions)), cond) for timestep in TIMESTEPS])


@pytest.fixture(autouse=True)
def _by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch do it in float32 as well: for the other way see test_native.py."""
    monkeypatch.setattr("getiaction.policy.fast.unroll.find_library", lambda: None)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[True, False], ids=["in columns", "as they lie"])
def in_columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(unrolled_module, "read_faster_in_columns", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("_threads", "in_columns")
@pytest.mark.parametrize(("batch_size", "horizon"), [(1, 16), (1, 4), (3, 8), (16, 16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_network(shape: str, batch_size: int, horizon: int) -> None:
    unet = make(**SHAPES[shape])
    actions, cond = torch.randn(batch_size, horizon, 3).double(), torch.randn(batch_size, 5).double()
    fast, plain = denoise(unet, actions, cond)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10 * float(plain.abs().max()))


def test_float32_differs_by_rounding_only() -> None:
    unet = make(torch.float32, down_dims=(64, 256))
    fast, plain = denoise(unet, torch.randn(1, 16, 3), torch.randn(1, 5))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.usefixtures("in_columns")
@pytest.mark.parametrize("down_dims", [(16, 32), (64, 256)])
def test_it_is_made_once_and_sees_new_observations_and_new_weights(down_dims: tuple[int, ...]) -> None:
    unet = make(down_dims=down_dims)
    actions = torch.randn(2, 8, 3).double()
    first = unroll(unet, TIMESTEPS, torch.randn(2, 5).double(), 8)
    torch.testing.assert_close(*denoise(unet, actions, torch.randn(2, 5).double()))  # other observations
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(0.9)  # as an optimiser does, or `load_state_dict`
    torch.testing.assert_close(*denoise(unet, actions, torch.randn(2, 5).double()))
    assert unroll(unet, TIMESTEPS, torch.randn(2, 5).double(), 8) is first
    unet.load_state_dict({key: value * 1.1 for key, value in unet.state_dict().items()}, assign=True)
    torch.testing.assert_close(*denoise(unet, actions, torch.randn(2, 5).double()))  # other tensors
    torch.testing.assert_close(*denoise(copy.deepcopy(unet), actions, torch.randn(2, 5).double()))
    torch.testing.assert_close(
        *denoise(unet, torch.randn(1, 16, 3).double(), torch.randn(1, 5).double())
    )  # other shape


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("batch_size", [1, 16])
def test_autocast_multiplies_in_bf16_and_sees_new_weights(batch_size: int) -> None:
    unet = make(torch.float32, down_dims=(64, 256))
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(0.2)
    actions, cond = torch.randn(batch_size, 16, 3), torch.randn(batch_size, 5)
    exact = denoise(unet, actions, cond)[0]
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = denoise(unet, actions, cond)  # the plain one in bf16, too
        assert fast.dtype == torch.float32
        error, usual = ((value - exact).abs().max() for value in (fast, plain))
        assert 0 < error < 2 * usual + 1e-6
        with torch.no_grad():
            unet.final_conv[1].weight.data.mul_(-1)  # which PyTorch does not count as a change
            unet.final_conv[1].bias.data.mul_(-1)
        torch.testing.assert_close(denoise(unet, actions, cond)[0], -fast)


def test_a_layer_in_the_place_of_another_is_used() -> None:
    unet = make(down_dims=(16, 32))
    actions, cond = torch.randn(1, 8, 3).double(), torch.randn(1, 5).double()
    for _ in range(10):
        torch.testing.assert_close(*denoise(unet, actions, cond))
        block = unet.final_conv[0]
        size = block.block[0].in_channels, block.block[0].out_channels
        del block.block[0]  # so that the next one may be given its address
        block.block.insert(0, Conv1d(*size, 5, padding=2).double())
    del unet.final_conv[1]
    unet.final_conv.append(Conv1d(16, 3, 1).double())
    torch.testing.assert_close(*denoise(unet, actions, cond))


def test_plans_share_their_copies_and_go_when_nobody_needs_them(in_columns: bool) -> None:
    unet = make(torch.float32, down_dims=(64, 256))
    made: list[weakref.ref[UnrolledUnet]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for number in range(20):
                rows = 1 + number % 7
                unrolled = unroll(unet, TIMESTEPS, torch.randn(rows, 5), 4)
                made.append(weakref.ref(unrolled))
        alive = {one() for one in made} - {None}
        assert len(alive) == PLANS
        copies = [copy for one in alive for copy in one._copies]
        assert bool(copies) is in_columns
        assert len({id(copy) for copy in copies}) * PLANS == len(copies)
        alive.clear()
        del unrolled, copies, unet
        assert not [one for one in made if one()], "they wait for no collector"
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def test_a_network_with_a_hook_that_knows_it_is_freed() -> None:
    unet = make(down_dims=(16, 32))
    unet.final_conv[1].register_forward_hook(lambda *_, whole=unet: None)
    denoise(unet, torch.randn(1, 8, 3).double(), torch.randn(1, 5).double())
    gone = weakref.ref(unet)
    assert unet in KEPT.of
    del unet
    gc.collect()
    assert gone() is None


def test_what_was_returned_stays_as_it_was() -> None:
    unet = make(down_dims=(16, 32))
    with torch.no_grad():
        unrolled = unroll(unet, TIMESTEPS, torch.randn(1, 5).double(), 8)
    before = unrolled(torch.zeros(1, 8, 3).double(), 0)
    kept = before.clone()
    unrolled(torch.ones(1, 8, 3).double(), 1)
    assert torch.equal(before, kept)


def test_two_threads_do_not_disturb_each_other() -> None:
    unet, expected, got = make(down_dims=(16, 32)), {}, {}
    inputs = {seed: (torch.randn(1, 8, 3).double(), torch.randn(1, 5).double()) for seed in range(4)}
    for seed, (actions, cond) in inputs.items():
        expected[seed] = denoise(unet, actions, cond)[1]

    def work(seed: int) -> None:
        got[seed] = torch.stack([denoise(unet, *inputs[seed])[0] for _ in range(20)])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, values in got.items():
        torch.testing.assert_close(values, expected[seed].expand_as(values))


def test_networks_with_other_layers_are_left_alone() -> None:
    cond, names = torch.randn(1, 5).double(), ("down_modules.0.0.conv1.block.0", "up_modules.0.2", "mid_modules.1")
    for name in names:
        unet = make(down_dims=(16, 32))
        layer = unet.get_submodule(name)
        layer.__class__ = type("Another", (type(layer),), {})  # as parametrisations do
        with torch.no_grad():
            assert unroll(unet, TIMESTEPS, cond, 8) is None
    unet = make(down_dims=(16, 32))
    weight = unet.final_conv[0].block[0].weight
    weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        assert unroll(unet, TIMESTEPS, cond, 8) is None


def test_weights_that_were_half_taken_in_are_taken_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make(down_dims=(16, 32))
    inputs = torch.randn(1, 8, 3).double(), torch.randn(1, 5).double()
    denoise(unet, *inputs)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(0.9)

    def interrupt(*_: Any, **__: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "cat", interrupt)
        with pytest.raises(KeyboardInterrupt):
            denoise(unet, *inputs)
    torch.testing.assert_close(*denoise(unet, *inputs))


def test_other_layers_of_film_are_called() -> None:
    cond = torch.randn(1, 5).double()
    unet = make(down_dims=(16, 32))
    unet.mid_modules[0].cond_encoder[1].bias = None
    with torch.no_grad():
        assert unroll(unet, TIMESTEPS, cond, 8) is None
    unet = make(down_dims=(16, 32))
    step_encoder, forward = unet.diffusion_step_encoder, unet.diffusion_step_encoder.forward
    with torch.no_grad():
        assert unroll(unet, TIMESTEPS, cond, 8) is not None
        step_encoder.forward = lambda x: 2 * forward(x)  # as some tools do
        assert unroll(unet, TIMESTEPS, cond, 8) is None
        del step_encoder.forward
        assert unroll(unet, TIMESTEPS, cond, 8) is not None


def test_other_steps_are_other_steps() -> None:
    unet, actions, cond = make(down_dims=(16, 32)), torch.randn(1, 8, 3).double(), torch.randn(1, 5).double()
    for timesteps in (torch.tensor([5, 3]), torch.tensor([90, 3]), torch.tensor([90.0, 3.0])):
        with torch.no_grad():
            unrolled = unroll(unet, timesteps, cond, 8)
            plain = unet(actions, timesteps[:1], cond)
        torch.testing.assert_close(unrolled(actions, 0), plain)


def test_acting_on_the_cpu_takes_it_and_training_does_not(make_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = make_policy(), []
    plain = UnrolledUnet.__call__
    monkeypatch.setattr(UnrolledUnet, "__call__", lambda *given: calls.append(given[2]) or plain(*given))
    observations = {"observation.state": torch.randn(1, policy.n_obs_steps, 3)}
    policy.predict_action_chunk(observations, num_inference_steps=4)
    assert calls == [0, 1, 2, 3]
    batch = observations | {"action": torch.randn(1, 8, 2), "action_is_pad": torch.zeros(1, 8, dtype=torch.bool)}
    policy(batch, torch.randn(1, 8, 2), torch.tensor([3])).backward()
    assert len(calls) == 4
