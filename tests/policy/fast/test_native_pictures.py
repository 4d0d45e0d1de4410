"""Convolutions of pictures that learn by C, on a CPU: PyTorch's, for any shape, layout and number of threads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from getiaction.policy.fast import native, native_layers, native_pictures, native_winograd
from getiaction.policy.fast.convolution import Conv2d, use_taps
from getiaction.policy.fast.native_layers import use_native

SHAPES: dict[str, tuple[int, int, tuple[int, int], int, dict[str, Any]]] = {  # C, C', (h, w), B, what else is special
    "wide windows": (64, 64, (21, 21), 3, {"kernel_size": 5, "padding": 2}),
    "every second place": (32, 64, (9, 9), 4, {"padding": 1, "stride": 2}),
    "every second place, even sides": (32, 48, (8, 6), 5, {"padding": 1, "stride": 2}),
    "two taps": (32, 32, (7, 7), 3, {"kernel_size": 2, "stride": 2}),
    "odd channels": (21, 17, (5, 8), 7, {"padding": 1}),
    "large windows, wide padding": (16, 16, (6, 5), 3, {"kernel_size": 5, "padding": 4}),
    "more padding than is seen": (16, 16, (20, 1), 2, {"padding": 5, "stride": 10}),
    "no padding": (16, 20, (7, 9), 2, {}),
    "strides past the end": (16, 16, (8, 8), 2, {"stride": 3}),
    "more than one place at a time": (16, 18, (3, 3), 90, {"padding": 1}),
    "one place": (256, 256, (1, 1), 3, {"padding": 1}),
    "with a bias": (24, 18, (4, 4), 3, {"padding": 1, "bias": True}),
    "few tiles": (16, 16, (8, 8), 2, {"padding": 1}),
}
TILED: dict[str, tuple[int, int, tuple[int, int], int, dict[str, Any]]] = {  # where Winograd's products are fewer
    "tiles of a ResNet": (32, 64, (21, 21), 3, {"padding": 1}),
    "small tiles": (32, 48, (6, 6), 5, {"padding": 1}),
    "small tiles over the edge": (16, 32, (6, 5), 9, {"padding": 1}),
    "tiles over the edge": (48, 16, (7, 5), 9, {"padding": 1}),
    "more channels than are multiplied at once": (16, 528, (4, 4), 33, {"padding": 1}),
    "tiles with a bias": (16, 32, (8, 8), 9, {"padding": 1, "bias": True}),
    "48 channels": (48, 48, (8, 8), 9, {"padding": 1}),
    "many channels go in": (1040, 16, (3, 4), 40, {"padding": 1}),
}
SHAPES |= TILED
BOTH = pytest.mark.parametrize("name", ["every second place", "tiles of a ResNet"])


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Skip where there is no C compiler."""
    if native.find_library() is None:
        pytest.skip("needs a C compiler")
    assert native_layers.works()


def make(name: str) -> tuple[Conv2d, Tensor]:
    """Return a layer that learns by C, and pictures."""
    torch.manual_seed(0)
    wide, high, sides, batch, special = SHAPES[name]
    layer = Conv2d(wide, high, **{"kernel_size": 3, "bias": False, **special}).to(memory_format=torch.channels_last)
    x = torch.randn(batch, wide, *sides).contiguous(memory_format=torch.channels_last)
    assert use_native(layer)
    return layer, x


def learn(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what comes out, and the gradients of what went in and of the weights."""
    x = x.detach().requires_grad_()
    out = layer(x)
    weights = torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect who computes gradients of weights, each time."""
    counted = list[str]()
    for owner in (native_pictures.Weigher, native_winograd.Convolver):
        weigh: Any = owner.weigh

        def count(own: Any, *given: Any, weigh: Any = weigh) -> Tensor:
            counted.append(type(own).__name__)
            return weigh(own, *given)

        monkeypatch.setattr(owner, "weigh", count)
    return counted


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_pytorchs(name: str, calls: list[str]) -> None:
    """As near to float64's as PyTorch's in float32."""
    layer, x = make(name)
    found = learn(layer, x)
    assert calls == ["Convolver" if name in TILED else "Weigher"]
    layer.by_native = False
    usual, exact = learn(layer, x), learn(copy.deepcopy(layer).double(), x.double())
    for ours, theirs, right in zip(found, usual, exact, strict=True):
        assert ours.shape == right.shape
        apart, own, size = (float(one.double().norm()) for one in (ours - right, theirs - right, right))
        assert apart <= 4 * own + 1e-6 * size  # all are zeros where only padding is seen
    assert name in TILED or torch.equal(found[0], usual[0])
    assert found[2].stride() == layer.weight.stride()


@pytest.mark.parametrize("name", ["wide windows", "odd channels", "more than one place at a time", *TILED])
def test_numbers_are_the_same_bit_by_bit_for_any_threads(name: str) -> None:
    layer, x = make(name)
    before, seen = torch.get_num_threads(), []
    for number in (1, 2, 3, 5):
        torch.set_num_threads(number)
        seen.append(learn(layer, x)[0 if name in TILED else 2 :])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for found in seen[1:] for one, other in zip(seen[0], found, strict=True))


@BOTH
@pytest.mark.parametrize("how", ["weights", "gradient", "pictures", "expanded gradient", "a part of more channels"])
def test_numbers_may_lie_anyhow(how: str, name: str, calls: list[str]) -> None:
    layer, x = make(name)
    wanted = learn(layer, x)
    if how == "weights":
        layer.weight.data = layer.weight.data.contiguous()
        found = learn(layer, x)
        assert found[2].is_contiguous()
    elif how == "pictures":
        found = learn(layer, x.contiguous())  # which PyTorch convolves as they lie
        assert len(calls) == 1
    elif how == "a part of more channels":
        more = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
        found = learn(layer, more)
        assert len(calls) == 2
    else:
        out = layer(x)
        came = torch.ones_like(out) if how == "gradient" else torch.ones(1, 1, 1, 1).expand(out.shape)
        came = came.contiguous() if how == "gradient" else came
        [found_weight] = torch.autograd.grad(out, layer.weight, came)
        layer.by_native = False
        [wanted_weight] = torch.autograd.grad(layer(x), layer.weight, came)
        torch.testing.assert_close(found_weight, wanted_weight, rtol=1e-4, atol=1e-3)
        return
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.eval(),
        lambda layer: layer.weight.requires_grad_(False),
        lambda layer: setattr(layer, "groups", 2) or setattr(layer, "weight", nn.Parameter(torch.randn(64, 16, 3, 3))),
        lambda layer: setattr(layer, "dilation", (2, 2)),
        lambda layer: setattr(layer, "padding", (1, 0)),
        lambda layer: setattr(layer, "padding", 1),
        lambda layer: setattr(layer, "stride", 2),
        lambda layer: setattr(layer, "stride", (1, 2)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(64, 32, 3, 1))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(8, 32, 3, 3))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(64, 32, 1, 1))),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(64, 1, 3, 3).expand(64, 32, 3, 3))),
    ],
)
@BOTH
def test_what_is_not_plain_is_left_to_pytorch(change: Any, name: str, calls: list[str]) -> None:
    layer, x = make(name)
    change(layer)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert calls == []


@pytest.mark.parametrize(("side", "channels"), [(8, 32), (9, 48), (6, 16)])
def test_weights_that_were_laid_before_give_the_same_bits(side: int, channels: int) -> None:
    convolver, draw = native_pictures.convolver(), torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, channels, 3, 3, generator=draw), torch.randn(48, generator=draw)
    x = torch.randn(9, side, side, channels, generator=draw).movedim(3, 1)
    panels = convolver.lay(native_winograd.tile_of(x), weight)
    for given in (x, x.neg()):
        wanted = convolver.convolve(given, weight, bias)
        assert torch.equal(convolver.convolve(given, torch.empty_like(weight), bias, panels=panels), wanted)


@pytest.mark.parametrize(("side", "batch", "taken"), [(4, 32, ["Convolver"]), (4, 31, []), (3, 32, [])])
def test_tiles_come_before_taps(side: int, batch: int, taken: list[str], calls: list[str]) -> None:
    """Where there are enough of them."""
    layer = Conv2d(256, 256, 3, padding=1)
    use_taps(layer)
    assert use_native(layer)
    learn(layer, torch.randn(batch, 256, side, side).contiguous(memory_format=torch.channels_last))
    assert layer.by_taps
    assert calls == taken


@BOTH
def test_a_wrong_number_of_channels_is_pytorchs_error(name: str) -> None:
    layer, x = make(name)
    with pytest.raises(RuntimeError, match="expected input"):
        layer(x[:, :16])


@pytest.mark.parametrize("shape", [(1,), (16,), (64,), (32, 1), ()])
def test_a_bias_of_another_shape_is_pytorchs_error(shape: tuple[int, ...]) -> None:
    layer, x = make("tiles with a bias")
    layer.bias = nn.Parameter(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="bias"):
        layer(x)


def test_a_weight_that_is_computed_is_computed_as_often_as_by_pytorch() -> None:
    """A power iteration of `spectral_norm` is one."""
    times = list[int]()

    class Count(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            times.append(1)
            return weight

    layer, x = Conv2d(256, 256, 3, padding=1), torch.randn(32, 256, 4, 4).contiguous(memory_format=torch.channels_last)
    use_taps(layer)
    assert layer.by_taps
    register_parametrization(layer, "weight", Count())
    seen = []
    for by_native in (True, False):
        layer.by_native = by_native
        times.clear()
        layer(x)
        seen.append(len(times))
    assert seen[0] == seen[1]


def test_memory_that_was_not_written_reaches_no_number() -> None:
    layer, x = make("48 channels")
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        found = learn(layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(one.isfinite().all() for one in found)


@BOTH
def test_second_derivatives_are_refused(name: str) -> None:
    layer, x = make(name)
    with pytest.raises(RuntimeError, match=r"has no second derivative.*hardware.convolutions=library"):
        torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)


@BOTH
def test_what_is_no_number_stays_none(name: str) -> None:
    layer, x = make(name)
    x[0, 0, 0, 0] = torch.nan
    [gradient] = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert gradient[:, 0].isnan().any()


@BOTH
@pytest.mark.parametrize("change", ["weight in two bytes", "weight in eight", "saved in two bytes", "several at once"])
def test_a_backward_pass_of_other_numbers_is_pytorchs(change: str, name: str, calls: list[str]) -> None:
    layer, x = make(name)

    def learn_otherwise() -> Any:
        layer.float()
        out = layer(x)
        came = torch.ones_like(out)
        if change == "several at once":
            return torch.autograd.grad(out, layer.weight, torch.stack([came, 2 * came]), is_grads_batched=True)[0]
        layer.to(torch.float64 if "eight" in change else torch.bfloat16 if "saved" not in change else torch.float32)
        try:
            return torch.autograd.grad(out, layer.weight, came)[0].float()
        except RuntimeError as error:
            return type(error)

    ways = []
    for by_native in (True, False):
        layer.by_native = by_native
        if "saved" in change:
            with torch.autograd.graph.saved_tensors_hooks(lambda one: one.bfloat16(), lambda one: one):
                ways.append(learn_otherwise())
        else:
            ways.append(learn_otherwise())
    assert calls == []
    if isinstance(ways[1], Tensor):
        torch.testing.assert_close(ways[0], ways[1], rtol=1e-2, atol=1e-2)
    else:
        assert ways[0] == ways[1]


@BOTH
def test_a_gradient_that_holds_no_numbers_is_pytorchs(name: str, calls: list[str]) -> None:
    layer, x = make(name)
    out = layer(x)
    came = torch._efficientzerotensor((len(x), *out.shape[2:], 64)).movedim(3, 1)
    [gradient] = torch.autograd.grad(out, layer.weight, came)
    assert not gradient.any()
    assert calls == []


class Nothing(torch.autograd.Function):
    """Have no gradient."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> None:
        return None


@BOTH
def test_what_has_no_gradient_gives_none(name: str) -> None:
    """Zeros would let a weight decay."""
    layer, x = make(name)
    Nothing.apply(layer(x)).sum().backward()
    assert layer.weight.grad is None
