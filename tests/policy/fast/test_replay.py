"""A chunk that is replayed as a CUDA graph is the chunk that was launched kernel by kernel."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from getiaction.policy import ConditionalUnet1d, DiffusionPolicy, Features, Normalizer
from getiaction.policy.encoder import ImageEncoder
from getiaction.policy.fast.convolution import Conv1d
from getiaction.policy.fast.replay import Replay
from getiaction.policy.fast.replays import Replays
from getiaction.policy.fast.watch import Held, Listeners, is_watched

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA GPU has graphs")
CALLS = 5  # two before the capture, the capture, and two replays


@pytest.fixture
def policy(without_tf32: None) -> DiffusionPolicy:
    torch.manual_seed(0)
    features = Features(action_dim=2, state_dim=2, cameras={"observation.image": (3, 40, 40)})
    made = DiffusionPolicy(
        features,
        normalizer=Normalizer({}, {"visual": "identity", "state": "identity", "action": "identity"}),
        noise_scheduler=DDPMScheduler(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2"),
        encoder=lambda shape: ImageEncoder(shape, crop_shape=(36, 36)),
        unet=lambda **sizes: ConditionalUnet1d(**sizes, down_dims=(32, 64)),
    )
    return made.cuda().eval() if torch.cuda.is_available() else made.eval()


def seen(policy: DiffusionPolicy, number: int, rows: int = 1) -> dict[str, Tensor]:
    """Draw observations."""
    draw = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (rows, 2, 3, 40, 40), generator=draw, dtype=torch.uint8)
    state = torch.randn(rows, 2, 2, generator=draw)
    return {"observation.image": pixels.to(policy.device), "observation.state": state.to(policy.device)}


def act(policy: DiffusionPolicy, number: int) -> Tensor:
    """Return a chunk as callers get it."""
    draw = torch.Generator(policy.device).manual_seed(number)
    return policy.predict_action_chunk(seen(policy, number), generator=draw)


def act_plainly(policy: DiffusionPolicy, number: int) -> Tensor:
    """Return the same chunk, launched kernel by kernel."""
    draw = torch.Generator(policy.device).manual_seed(number)
    return policy.act_on(policy.prepare(seen(policy, number)), generator=draw)


def replays(policy: DiffusionPolicy) -> int:
    """Count the graphs that a policy holds."""
    return sum(one.captured for one in policy._replays._kept.values())


@needs_gpu
def test_a_replayed_chunk_is_the_plain_one(policy: DiffusionPolicy) -> None:
    for number in range(CALLS):
        assert torch.equal(act(policy, number), act_plainly(policy, number))
    assert replays(policy) == 1


@needs_gpu
def test_ddim_and_other_step_counts_have_their_own_graphs(policy: DiffusionPolicy) -> None:
    policy.noise_scheduler = DDIMScheduler(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2")
    for steps in (2, 5):
        for number in range(CALLS):
            found = policy.predict_action_chunk(
                seen(policy, number), generator=torch.Generator("cuda").manual_seed(1), num_inference_steps=steps
            )
            prepared, draw = policy.prepare(seen(policy, number)), torch.Generator("cuda").manual_seed(1)
            assert torch.equal(found, policy.act_on(prepared, generator=draw, num_inference_steps=steps))
    assert replays(policy) == 2


@needs_gpu
def test_each_row_keeps_its_noise(policy: DiffusionPolicy) -> None:
    noise = torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(0)).cuda()
    for number in range(CALLS):
        rows = [[torch.Generator().manual_seed(10 * number + row) for row in range(3)] for _ in range(2)]
        observed = seen(policy, number, rows=3)
        found = policy.predict_action_chunk(observed, noise=noise, generator=rows[0])
        assert torch.equal(found, policy.act_on(policy.prepare(observed), noise=noise, generator=rows[1]))


@needs_gpu
def test_weights_that_change_where_they_lie_are_used(policy: DiffusionPolicy) -> None:
    for number in range(CALLS):
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(0.9)
        assert torch.equal(act(policy, number), act_plainly(policy, number))
    assert replays(policy) == 1


@needs_gpu
def test_weights_that_move_end_the_graph(policy: DiffusionPolicy) -> None:
    for number in range(CALLS):
        act(policy, number)
    for weight in policy.parameters():
        weight.data = weight.data * 0.9
    assert torch.equal(act(policy, 0), act_plainly(policy, 0))
    assert replays(policy) == 0


@needs_gpu
def test_autocast_has_a_graph_of_its_own(policy: DiffusionPolicy) -> None:
    for number in range(CALLS):
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(act(policy, number), act_plainly(policy, number))
        assert torch.equal(act(policy, number), act_plainly(policy, number))
    assert replays(policy) == 2


@needs_gpu
def test_hooks_are_called(policy: DiffusionPolicy) -> None:
    called: list[int] = []
    for number in range(CALLS):
        act(policy, number)
    policy.encoders[0].register_forward_hook(lambda *_: called.append(1))
    act(policy, 0)
    assert called


@needs_gpu
def test_a_function_that_waits_for_the_device_is_called_plainly(caplog: pytest.LogCaptureFixture) -> None:
    replay = Replay(lambda x: x * float(x.max()), torch.device("cuda"))
    for number in range(1, CALLS + 1):
        assert replay(torch.full((2,), float(number), device="cuda")).tolist() == [number**2] * 2
    assert not replay.captured
    assert "cannot be a CUDA graph" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(2, device="cuda").isfinite().all(), "the generator draws again"


def test_a_copy_of_a_policy_has_no_graphs(policy: DiffusionPolicy) -> None:
    if policy.device.type == "cuda":
        for number in range(CALLS):
            act(policy, number)
    assert not copy.deepcopy(policy)._replays._kept
    assert pickle.dumps(policy._replays) == pickle.dumps(Replays())


def test_what_a_graph_reads_is_remembered(policy: DiffusionPolicy) -> None:
    held = Held(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(2)
    assert held.unchanged()
    policy.diffusion.unet.final_conv[1].bias.data = policy.diffusion.unet.final_conv[1].bias.data.clone()
    assert not held.unchanged()
    for change in CHANGES:
        held = Held(policy)
        assert held.unchanged()
        change(policy)
        assert not held.unchanged()


def replace_at_its_address(policy: DiffusionPolicy) -> None:
    """Replace a layer so that the new one may be given the old one's address."""
    convolution = policy.diffusion.unet.final_conv[1]
    size = convolution.in_channels, convolution.out_channels
    del policy.diffusion.unet.final_conv[1], convolution
    policy.diffusion.unet.final_conv.append(Conv1d(*size, 1))


CHANGES: list[Callable[[DiffusionPolicy], object]] = [
    lambda policy: setattr(policy, "normalizer", copy.deepcopy(policy.normalizer)),
    *[replace_at_its_address] * 5,
    lambda policy: setattr(policy.diffusion.unet.final_conv[1], "bias", None),
    lambda policy: setattr(policy.diffusion.unet.final_conv[1], "bias", nn.Parameter(torch.ones(2))),
    lambda policy: policy.encoders[0].backbone.append(nn.Dropout2d()),
]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_who_listens_is_noticed(policy: DiffusionPolicy, kind: str) -> None:
    listeners, layer = Listeners(policy), policy.diffusion.unet.final_conv[1]
    assert not listeners.there()
    handle = getattr(layer, f"register_{kind}_hook")(lambda *_: None)
    assert listeners.there()
    assert is_watched(layer)
    handle.remove()
    assert not listeners.there()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert listeners.there()
    everywhere.remove()


def test_a_policy_is_freed_at_once(policy: DiffusionPolicy) -> None:
    """Evaluations in training make copies of it, each with a graph's memory."""
    other = copy.deepcopy(policy)
    other._replays._held, other._replays._listeners = Held(other), Listeners(other)
    gone = weakref.ref(other)
    gc.collect()
    gc.disable()
    try:
        del other
        assert gone() is None
    finally:
        gc.enable()
