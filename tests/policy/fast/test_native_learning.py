"""What learns by C on a CPU: PyTorch's results and gradients, for any layout and number of threads, where asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from getiaction.policy import ConditionalUnet1d, ImageEncoder
from getiaction.policy.fast import (
    native,
    native_blocks,
    native_layers,
    native_norms,
    native_pictures,
    native_winograd,
    packed,
)
from getiaction.policy.fast.convolution import Conv1d, use_taps
from getiaction.policy.fast.native_layers import use_native
from getiaction.policy.fast.native_norms import MISH, PLAIN, RELU
from getiaction.policy.unet import ConvBlock, ResidualBlock

GROUPS = {"some": 4, "one": 1, "each channel": 24}
ORDERS = {"samples outermost": (0, 2, 3, 1), "places outermost": (2, 3, 0, 1), "channels first": (0, 1, 2, 3)}
BLOCKS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {  # C, C', T, B, what else is special
    "as it is added": (32, 32, 16, 5, {}),
    "with a residual convolution": (24, 40, 8, 7, {}),
    "of actions": (2, 32, 16, 3, {}),
    "fewer moments than taps": (16, 16, 2, 50, {}),
    "one moment": (16, 24, 1, 4, {}),
    "one tap": (16, 24, 4, 4, {"kernel_size": 1}),
    "more moments than go together": (16, 16, 200, 2, {"kernel_size": 3}),
    "shift only": (48, 16, 4, 130, {"film_scale": False}),
    "as wide as it may be": (256, 256, 4, 9, {}),
}


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Skip where there is no C compiler."""
    if native.find_library() is None:
        pytest.skip("needs a C compiler")
    assert native_layers.works()


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(*shape: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Return numbers (B, C, h, w) that lie in memory in an order, the side that comes first outermost."""
    if order is None:
        return torch.randn(shape)
    return torch.randn([shape[side] for side in order]).permute([order.index(side) for side in range(4)])


def passes(call: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return what comes out, and the gradients of a loss that weighs each number differently."""
    given = [one.detach().to(dtype).requires_grad_() for one in given]
    out = call(*given)
    weights = torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape).to(dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), given)]


def assert_rounding_only(found: list[Tensor], usual: list[Tensor], exact: list[Tensor]) -> None:
    """Compare with float64: no further from it than a few times as far as PyTorch in float32 is."""
    for number, (ours, theirs, right) in enumerate(zip(found, usual, exact, strict=True)):
        apart, own, size = (float(one.double().norm()) for one in (ours - right, theirs - right, right))
        assert apart < 4 * own + 1e-6 * size + 1e-12, (number, apart, own, size)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    ("activation", "names"),
    [
        (MISH, ("start", "film")),
        (MISH, ("film",)),
        (MISH, ("start", "added")),
        (RELU, ("added",)),
        (RELU, ()),
        (PLAIN, ()),
    ],
    ids=["start, Mish, FiLM", "Mish, FiLM", "start, Mish, addition", "addition, ReLU", "ReLU", "norm alone"],
)
def test_group_norm_and_what_follows(
    activation: int, names: tuple[str, ...], groups: str, order: str, threads: int
) -> None:
    torch.manual_seed(0)
    norm, channels = nn.GroupNorm(GROUPS[groups], 24), 24
    shapes = {"start": (channels,), "film": (5, 2 * channels)}
    given = [drawn(5, channels, 6, 7, order=ORDERS[order]) + 1, *(drawn(channels) for _ in range(2))]
    given += [
        drawn(5, channels, 6, 7, order=ORDERS["places outermost"]) if name == "added" else drawn(*shapes[name])
        for name in names
    ]

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
            own = copy.deepcopy(norm).to(x.dtype)
            del own.weight, own.bias
            own.weight, own.bias = weight, bias
            return function(own, x=x, activation=activation, **dict(zip(names, others, strict=True)))

        return call

    ours = by(native_norms.normalise_groups)
    theirs = by(lambda norm, activation, **given: native_layers.plainly(norm, activation, **given))
    exact = passes(theirs, given, torch.float64)
    assert_rounding_only(passes(ours, given, torch.float32), passes(theirs, given, torch.float32), exact)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("activation", "adds"),
    [(RELU, False), (RELU, True), (PLAIN, False)],
    ids=["ReLU", "addition, ReLU", "norm alone"],
)
def test_batch_norm_and_what_follows(activation: int, adds: bool, order: str, threads: int) -> None:
    torch.manual_seed(0)
    ours, channels = nn.BatchNorm2d(24), 24
    theirs = copy.deepcopy(ours)
    given = [drawn(5, channels, 6, 7, order=ORDERS[order]) + 1]
    given += [drawn(5, channels, 6, 7, order=ORDERS["places outermost"])] if adds else []

    def fast(x: Tensor, added: Tensor | None = None) -> Tensor:
        return native_norms.normalise_batch(ours, x, added, activation=activation)

    def plain(x: Tensor, added: Tensor | None = None) -> Tensor:
        return native_layers.plainly(theirs.to(x.dtype), activation, x=x, added=added)

    found, usual = passes(fast, given, torch.float32), passes(plain, given, torch.float32)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    assert_rounding_only(found, usual, passes(plain, given, torch.float64))


def make_block(wide: int, high: int, **special: Any) -> ResidualBlock:
    """Return a residual block in which every weight and bias matters."""
    torch.manual_seed(0)
    shape = {"kernel_size": 5, "n_groups": 8, "film_scale": True} | special
    block = ResidualBlock(wide, high, cond_dim=6, **shape).train()
    with torch.no_grad():
        for name, weight in block.named_parameters():
            weight.normal_(1.0 if name.endswith("1.weight") and weight.ndim == 1 else 0.0, 0.3)
    return block


def block_passes(block: ResidualBlock, steps: int, batch: int, dtype: torch.dtype, order: str) -> list[Tensor]:
    """Return what comes out of a block, and the gradients of its input, FiLM's values and all of its weights."""
    torch.manual_seed(1)
    wide, high = block.conv1.block[0].in_channels, block.conv1.block[0].out_channels
    x = drawn(batch, wide, 1, steps, order=ORDERS[order])
    film = drawn(batch, high * (1 + block.film_scale))
    weights = {name: weight for name, weight in block.named_parameters() if "cond_encoder" not in name}

    def call(x: Tensor, film: Tensor, *_: Tensor) -> Tensor:
        return block.modulate(x, film)

    found = passes(call, [x, film], dtype)
    out = block.modulate(x.to(dtype), film.to(dtype))
    return found + list(torch.autograd.grad(out.square().sum(), list(weights.values())))


@pytest.mark.parametrize("order", ["samples outermost", "places outermost"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_the_plain_one(name: str, order: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, high, steps, batch, special = BLOCKS[name]
    block = make_block(wide, high, **special)
    usual = block_passes(block, steps, batch, torch.float32, order)
    exact = block_passes(copy.deepcopy(block).double(), steps, batch, torch.float64, order)
    use_native(block)
    calls = count(monkeypatch, native_blocks, "run_block")
    assert_rounding_only(block_passes(block, steps, batch, torch.float32, order), usual, exact)
    assert len(calls) == 2


def count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """Return a list that grows with each call of a module's function."""
    calls, plain = list[None](), getattr(module, name)

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(None)
        return plain(*given, **named)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("name", ["with a residual convolution", "fewer moments than taps", "as wide as it may be"])
def test_a_blocks_numbers_are_the_same_bit_by_bit_for_any_threads(name: str) -> None:
    wide, high, steps, batch, special = BLOCKS[name]
    block, before, seen = make_block(wide, high, **special), torch.get_num_threads(), []
    use_native(block)
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        seen.append(block_passes(block, steps, batch, torch.float32, "samples outermost"))
    torch.set_num_threads(before)
    for others in seen[1:]:
        assert all(torch.equal(one, other) for one, other in zip(seen[0], others, strict=True))


@pytest.mark.parametrize("dims", [(16, 32, 64), (64, 320)], ids=["narrow", "wide, by taps"])
def test_a_unet_learns_what_the_plain_one_does(dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = ConditionalUnet1d(action_dim=3, cond_dim=5, down_dims=dims).train()
    fast = copy.deepcopy(plain)
    use_taps(fast)
    use_native(fast)
    blocks, norms = (
        count(monkeypatch, *one) for one in ((native_blocks, "run_block"), (native_norms._Normalise, "apply"))
    )
    actions, cond, timesteps = torch.randn(33, 8, 3), torch.randn(33, 5), torch.arange(33)

    def run(unet: ConditionalUnet1d, dtype: torch.dtype) -> list[Tensor]:
        def call(actions: Tensor, cond: Tensor) -> Tensor:
            return unet(actions, timesteps, cond)

        found = passes(call, [actions, cond], dtype)
        loss = unet(actions.to(dtype), timesteps, cond.to(dtype)).square().sum()
        return found + list(torch.autograd.grad(loss, list(unet.parameters())))

    found = run(fast, torch.float32)
    assert (len(blocks), len(norms)) == ((24, 2) if dims[-1] < 256 else (8, 18))  # two passes
    assert_rounding_only(found, run(plain, torch.float32), run(plain.double(), torch.float64))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_resnet_learns_what_the_plain_one_does(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layers, "MANY", 0)
    torch.manual_seed(0)
    plain = ImageEncoder((3, 48, 48), norm=norm, num_keypoints=4).train().to(memory_format=torch.channels_last)
    fast, pictures = copy.deepcopy(plain), torch.randn(4, 3, 48, 48)
    use_taps(fast)
    use_native(fast)
    calls = count(monkeypatch, native_norms._Normalise, "apply")

    def run(encoder: ImageEncoder, dtype: torch.dtype) -> list[Tensor]:
        features = (
            encoder.backbone(pictures.to(dtype)) if encoder is plain else native_layers.run(encoder.backbone, pictures)
        )
        weights = list(encoder.backbone.parameters())
        return [features.detach(), *torch.autograd.grad(features.square().sum(), weights)]

    found = run(fast, torch.float32)
    assert len(calls) == 20
    usual = run(plain, torch.float32)
    pairs = zip(fast.backbone.named_buffers(), plain.backbone.named_buffers(), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for (_, one), (_, other) in pairs)
    for ours, theirs in zip(found, usual, strict=True):  # ReLUs at which rounding decides are in both
        assert float((ours - theirs).norm()) < 2e-2 * float(theirs.norm()) + 1e-6
    assert torch.allclose(found[0], usual[0], rtol=1e-3, atol=1e-4)


def listen(block: ResidualBlock) -> None:
    block.conv2.block[1].register_forward_hook(lambda *_: None)


def replace_forward(block: ResidualBlock) -> None:
    layer = block.conv1.block[0]
    layer.forward = lambda x: 0 * nn.Conv1d.forward(layer, x[:, :, 0])[:, :, None]  # type: ignore[method-assign]


def replace_norm(block: ResidualBlock) -> None:
    block.conv2.block[1] = nn.Sequential(block.conv2.block[1])


def replace_activation(block: ResidualBlock) -> None:
    block.conv1.block[2] = nn.Mish()


def replace_block(block: ResidualBlock) -> None:
    class Doubled(ConvBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.conv1.__class__ = Doubled


def replace_second(block: ResidualBlock) -> None:
    block.conv2.block[0] = Conv1d(24, 24, 3, padding=1)


def leave_out_a_bias(block: ResidualBlock) -> None:
    block.residual_conv = Conv1d(16, 24, 1, bias=False)


def widen_residual(block: ResidualBlock) -> None:
    block.residual_conv = Conv1d(16, 24, 3, padding=1)


def expand_a_bias(block: ResidualBlock) -> None:
    assert isinstance(block.residual_conv, Conv1d)
    block.residual_conv.bias = nn.Parameter(torch.randn(1).expand(24))


CHANGES: list[Callable[[ResidualBlock], Any]] = [
    listen, replace_forward, replace_norm, replace_activation, replace_block, replace_second, leave_out_a_bias,
    widen_residual, expand_a_bias, nn.Module.eval, nn.Module.double,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_a_plain_block_that_learns_is_left_to_pytorch(
    change: Callable[[ResidualBlock], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make_block(16, 24)
    change(block)
    dtype = block.conv1.block[0].weight.dtype
    x, film = torch.randn(2, 16, 1, 4, dtype=dtype), torch.randn(2, 48, dtype=dtype)
    plain = block.modulate(x.contiguous(memory_format=torch.channels_last), film)
    use_native(block)
    calls = count(monkeypatch, native_blocks, "run_block")
    found = block.modulate(x.contiguous(memory_format=torch.channels_last), film)  # norms by C, where they may be
    torch.testing.assert_close(found, plain)
    assert calls == []


def test_what_is_no_plain_input_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(16, 24)
    use_native(block)
    calls = count(monkeypatch, native_blocks, "run_block")
    x, film = torch.randn(3, 16, 1, 8).contiguous(memory_format=torch.channels_last), torch.randn(3, 48)
    torch.testing.assert_close(block.modulate(x, film[:1]), block.modulate(x, film[:1].expand(3, 48).clone()))
    assert len(calls) == 1  # the second
    for wrong in ((x, film[:, :24]), (x[:, :8], film), (x[..., :0], film)):
        with pytest.raises((RuntimeError, ValueError)):
            block.modulate(*wrong)
    turned = torch._neg_view(x)
    torch.testing.assert_close(block.modulate(turned, film), block.modulate(turned.clone(), film))
    assert block.modulate(x.repeat(1, 1, 2, 1), film).shape == (3, 24, 2, 8)
    assert len(calls) == 2


@pytest.mark.parametrize("how", ["sliced", "expanded", "transposed"])
def test_weights_may_lie_anyhow(how: str) -> None:
    block = make_block(16, 24)
    layer = block.conv1.block[0]
    if how == "sliced":
        room = torch.zeros(24, 16, 10)
        room[..., ::2] = layer.weight.data
        layer.weight = nn.Parameter(room[..., ::2])
    elif how == "expanded":
        layer.weight = nn.Parameter(torch.randn(24, 16, 1).expand(24, 16, 5))
    else:
        layer.weight.data = layer.weight.data.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    usual = block_passes(block, 4, 3, torch.float32, "samples outermost")
    exact = block_passes(copy.deepcopy(block).double(), 4, 3, torch.float64, "samples outermost")
    use_native(block)
    for _ in range(20):  # a write next to a gradient would be found out sooner or later
        found = block_passes(block, 4, 3, torch.float32, "samples outermost")
    assert_rounding_only(found, usual, exact)


def test_what_is_kept_may_come_back_lying_otherwise() -> None:
    """As `torch.autograd.graph.save_on_cpu` may have it."""
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=3, cond_dim=5, down_dims=(16, 32)).train()
    use_native(unet)
    actions, cond, timesteps = torch.randn(4, 8, 3), torch.randn(4, 5), torch.arange(4)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(unet(actions, timesteps, cond).square().sum(), list(unet.parameters())))

    kept = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().contiguous(), lambda x: x):
        packed = gradients()
    for one, other in zip(kept, packed, strict=True):
        torch.testing.assert_close(one, other)


def test_a_film_layer_without_a_bias_is_left_to_pytorch() -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=3, cond_dim=5, down_dims=(16, 32)).train()
    unet.blocks()[0].cond_encoder[1] = nn.Linear(133, 32, bias=False)
    given = torch.randn(4, 8, 3), torch.arange(4), torch.randn(4, 5)
    plain = unet(*given)
    use_native(unet)
    torch.testing.assert_close(unet(*given), plain)


def test_second_derivatives_are_refused() -> None:
    block = make_block(16, 24)
    use_native(block)
    x, film = torch.randn(2, 16, 1, 4).contiguous(memory_format=torch.channels_last), torch.randn(2, 48)
    out = block.modulate(x.requires_grad_(), film)
    with pytest.raises(RuntimeError, match=r"has no second derivative.*hardware.convolutions=library"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("of", ["a block", "a norm"])
@pytest.mark.parametrize("change", ["a gradient without memory", "a weight cast in between", "saved in two bytes"])
def test_a_backward_pass_of_other_numbers_is_refused(of: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C would read, and write, what is not there."""
    monkeypatch.setattr(native_layers, "MANY", 0)
    block, norm = make_block(16, 24), nn.GroupNorm(2, 16)
    use_native(block)
    x = torch.randn(2, 16, 1, 4).contiguous(memory_format=torch.channels_last).requires_grad_()

    def run() -> Tensor:
        return block.modulate(x, torch.randn(2, 48)) if of == "a block" else native_layers.normalise(norm, x, RELU)

    if "saved" in change:
        with torch.autograd.graph.saved_tensors_hooks(lambda one: one.bfloat16(), lambda one: one):
            out = run()
    else:
        out = run()
    came: Tensor = torch.ones_like(out)
    if "memory" in change:
        came = TwoTensor(came, came)
    elif "cast" in change:
        (block if of == "a block" else norm).half()
    with pytest.raises(RuntimeError, match="plain float32 tensors"):
        torch.autograd.grad(out, x, came)


def test_the_trial_is_in_float32_whatever_the_default_is() -> None:
    native_layers.works.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert native_layers.works()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_hook_sees_what_it_would_see() -> None:
    block, seen = make_block(16, 24), list[Tensor]()
    block.conv2.block[1].register_forward_hook(lambda _, given, out: seen.append(out.detach()))
    x, film = torch.randn(2, 16, 1, 4).contiguous(memory_format=torch.channels_last), torch.randn(2, 48)
    block.modulate(x, film)
    use_native(block)
    block.modulate(x, film)
    torch.testing.assert_close(seen[0], seen[1])


def test_under_autocast_and_without_gradients_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(16, 24)
    use_native(block)
    calls = count(monkeypatch, native_blocks, "run_block")
    x, film = torch.randn(2, 16, 1, 4).contiguous(memory_format=torch.channels_last), torch.randn(2, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block.modulate(x, film)
    with torch.no_grad():
        block.modulate(x, film)
    assert calls == []
    block.modulate(x, film)
    assert len(calls) == 1


@pytest.mark.parametrize("weight", ["conv1.block.0.weight", "conv2.block.1.bias", "residual_conv.weight"])
def test_what_is_no_number_stays_none(weight: str) -> None:
    block = make_block(16, 24)
    use_native(block)
    block.get_parameter(weight).data.view(-1)[0] = torch.nan
    x, film = torch.randn(2, 16, 1, 4).contiguous(memory_format=torch.channels_last), torch.randn(2, 48)
    out = block.modulate(x.requires_grad_(), film)
    assert out.isnan().any()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().any()


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 16), nn.BatchNorm2d(16)], ids=["group", "batch"])
def test_a_picture_that_is_no_number_stays_none(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layers, "MANY", 0)
    x = torch.randn(2, 16, 3, 3)
    x[0, 0, 0, 0] = torch.nan
    x.requires_grad_()
    out = native_layers.normalise(norm, x, RELU)
    assert out.isnan().any()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().any()


@pytest.mark.parametrize("numbers", [8, 16])
def test_vectors_of_other_cpus_compute_the_same(numbers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A compiler makes pairs of vectors of 16 numbers, which only AVX-512 has, so they can be tried anywhere."""
    monkeypatch.setenv("GETIACTION_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FAST", ("-O1", f"-DWIDE={numbers}"))
    finders = (
        *(native.find_library, native_norms.find_norms, native_blocks.find_blocks),
        *(native_pictures.find_pictures, native_winograd.find_winograd, native_layers.works, packed.works),
    )
    for finder in finders:
        finder.cache_clear()
    try:
        library = native.find_library()
        assert library is not None
        assert library.panel == 2 * numbers
        assert native_layers.works()
        wide, high, steps, batch, special = BLOCKS["with a residual convolution"]
        block = make_block(wide, high, **special)
        usual = block_passes(block, steps, batch, torch.float32, "samples outermost")
        exact = block_passes(copy.deepcopy(block).double(), steps, batch, torch.float64, "samples outermost")
        use_native(block)
        assert_rounding_only(block_passes(block, steps, batch, torch.float32, "samples outermost"), usual, exact)
        assert packed.works() or not torch.backends.mkldnn.is_available()
    finally:
        for finder in finders:
            finder.cache_clear()


def test_what_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    native_layers.works.cache_clear()
    real = native_norms.Norms.forwards

    def wrong(self: native_norms.Norms, *given: Any) -> tuple[Tensor, Tensor]:
        out, moments = real(self, *given)
        return out.mul_(1.001), moments

    monkeypatch.setattr(native_norms.Norms, "forwards", wrong)
    block = make_block(16, 24)
    try:
        assert not use_native(block)
    finally:
        native_layers.works.cache_clear()
    assert not block.by_native
    assert "something else" in caplog.text
