"""Convolutions by taps give what PyTorch's give, in all three passes, and are taken where they are asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy import ConditionalUnet1d, ImageEncoder
from getiaction.policy.fast import convolution
from getiaction.policy.fast.convolution import Conv1d, Conv2d, use_taps
from getiaction.policy.fast.taps import convolve_by_taps, find_taps
from getiaction.policy.fast.unroll import unroll

SIZES = [  # sides, kernel, stride, padding
    ((2, 2), (3, 3), (1, 1), (1, 1)),
    ((1, 1), (3, 3), (1, 1), (1, 1)),  # the middle alone sees anything
    ((3, 4), (3, 3), (1, 1), (1, 1)),
    ((5, 4), (3, 3), (2, 2), (1, 1)),
    ((4, 5), (3, 3), (2, 2), (1, 1)),
    ((4, 6), (3, 5), (1, 2), (0, 2)),
    ((7, 8), (2, 3), (3, 2), (1, 0)),
    ((4, 4), (1, 1), (2, 2), (0, 0)),  # three of four places are seen by none
    ((1, 4), (1, 5), (1, 1), (0, 2)),
    ((1, 2), (1, 5), (1, 1), (0, 2)),  # two taps see only padding
    ((1, 7), (1, 3), (1, 2), (0, 1)),
]


def passes(convolve: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> list[Tensor]:
    """Return what comes out, and the gradients of a loss that weighs each number differently."""
    given = [one.detach().requires_grad_() for one in (x, weight, bias) if one is not None]
    out = convolve(*given, *([] if bias is not None else [None]), *sizes)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype)).sum(), given)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 0, 3, 1), (3, 1, 2, 0)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("sides", "kernel", "stride", "padding"), SIZES)
def test_all_passes_are_pytorchs(
    sides: Any, kernel: Any, stride: Any, padding: Any, with_bias: bool, order: Any
) -> None:
    def lie(*shape: int) -> Tensor:
        """Return random numbers that lie in memory as `order` says, the side that comes first outermost."""
        back = [order.index(side) for side in range(4)]
        return torch.randn([shape[side] for side in order], dtype=torch.float64).permute(back)

    torch.manual_seed(0)
    x, weight = lie(3, 6, *sides), lie(8, 6, *kernel)
    bias = torch.randn(8, dtype=torch.float64) if with_bias else None
    found, expected = (passes(one, x, weight, bias, stride, padding) for one in (convolve_by_taps, functional.conv2d))
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right)
    assert found[2].stride() == weight.stride()  # which lets an optimiser take it as it is


def test_nothing_is_multiplied_by_padding() -> None:
    def products(side: int) -> int:
        taps = find_taps((side, side), (3, 3), (1, 1), (1, 1), batch=1)
        return sum(outputs.stop - outputs.start for tap in taps for outputs, _ in tap.runs)

    assert [products(side) for side in (1, 2, 3)] == [1, 16, 49]


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_what_is_asked_for_has_a_gradient(frozen: str) -> None:
    shapes = {"x": (2, 6, 3, 3), "weight": (8, 6, 3, 3), "bias": (8,)}
    given = {name: torch.randn(shape, requires_grad=name != frozen) for name, shape in shapes.items()}
    convolve_by_taps(**given, stride=(1, 1), padding=(1, 1)).sum().backward()
    assert [name for name, value in given.items() if value.grad is None] == [frozen]


# --- in a network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """List the shapes that are convolved by taps."""
    seen: list[tuple[int, ...]] = []

    def watched(x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return convolve_by_taps(x, *rest)

    monkeypatch.setattr(convolution, "convolve_by_taps", watched)
    return seen


@pytest.fixture
def _also_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take them in float64 as well: in float32 a ReLU at zero makes of rounding what it likes."""

    def is_faster(layer: Any, x: Tensor, most: int) -> bool:
        return layer.training and convolution.count_places(layer, x) <= most

    monkeypatch.setattr(convolution, "is_faster_by_taps", is_faster)


def gradients(network: nn.Module, *given: Tensor) -> list[Tensor]:
    """Return what comes out of a network, and the gradients of its weights."""
    out = network(*given)
    torch.manual_seed(1)
    loss = (out * torch.randn(out.shape).to(out.dtype)).sum()
    return [out, *torch.autograd.grad(loss, list(network.parameters()))]


@pytest.mark.usefixtures("_also_in_float64")
def test_a_unet_learns_the_same(calls: list[Any]) -> None:
    torch.manual_seed(0)
    plain = ConditionalUnet1d(action_dim=2, cond_dim=5, down_dims=(32, 256, 512), kernel_size=5).double()
    given = torch.randn(16, 16, 2).double(), torch.arange(16), torch.randn(16, 5).double()
    expected = gradients(plain, *given)
    assert not calls
    by_taps = copy.deepcopy(plain)
    use_taps(by_taps)
    for value, right in zip(gradients(by_taps, *given), expected, strict=True):
        torch.testing.assert_close(value, right)
    assert {shape[1] for shape in calls} == {256, 512, 1024}
    assert {shape[2:] for shape in calls} == {(1, 4), (1, 8)}
    assert all(torch.equal(one, other) for one, other in zip(by_taps.parameters(), plain.parameters(), strict=True))
    laid = by_taps.mid_modules[0].conv1.block[0].weight
    assert laid.stride() == (512 * 5, 1, 512)
    assert copy.deepcopy(laid).stride() == laid.stride()  # as in the average of the weights


def test_a_unet_in_float32_goes_through_rows_and_differs_by_rounding_only(calls: list[Any]) -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=2, cond_dim=5, down_dims=(32, 512))  # too wide for rows, but for the taps
    given = torch.randn(16, 8, 2), torch.arange(16), torch.randn(16, 5)
    expected = gradients(copy.deepcopy(unet).double(), given[0].double(), given[1], given[2].double())
    assert not unet._is_faster_in_rows(given[0])
    use_taps(unet)
    assert unet._is_faster_in_rows(given[0])
    for value, right in zip(gradients(unet, *given), expected, strict=True):
        assert (value - right).norm() <= 1e-5 * right.norm()
    assert {shape[1:] for shape in calls} == {(512, 1, 4), (1024, 1, 4)}
    assert not unet.eval()._is_faster_in_rows(given[0])


@pytest.mark.usefixtures("_also_in_float64")
def test_an_encoder_learns_the_same(calls: list[Any]) -> None:
    torch.manual_seed(0)
    plain = ImageEncoder((3, 40, 40), norm="batch", num_keypoints=4).double()
    pictures = torch.rand(16, 3, 40, 40).double()
    expected = gradients(plain, pictures)
    by_taps = copy.deepcopy(plain)
    by_taps.to(memory_format=torch.channels_last)
    use_taps(by_taps)
    for value, right in zip(gradients(by_taps, pictures), expected, strict=True):
        torch.testing.assert_close(value, right)
    assert {shape[1:] for shape in calls} == {(256, 3, 3), (512, 2, 2)}
    assert calls.count((16, 512, 2, 2)) == 3


def test_they_are_taken_where_they_are_faster_only(calls: list[Any]) -> None:
    def taken(layer: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> bool:
        calls.clear()
        layer.to(dtype)(torch.randn(shape, dtype=dtype))
        return bool(calls)

    layers = [Conv1d(256, 8, 3, padding=1), Conv2d(256, 8, 3, padding=1), Conv1d(32, 8, 3, padding=1)]
    row, picture, narrow = layers
    assert not taken(row, 16, 256, 4)  # nobody asked for it
    use_taps(nn.ModuleList(layers))
    assert taken(row, 16, 256, 4)
    assert taken(row, 16, 256, 1, 4)
    assert taken(picture, 16, 256, 4, 4)
    assert not taken(row, 16, 256, 9)
    assert not taken(picture, 16, 256, 4, 5)
    assert not taken(narrow, 16, 32, 4)
    assert taken(row, 1, 256, 4)
    assert not taken(row.eval(), 16, 256, 4)
    assert not taken(picture, 16, 256, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(row.train(), 16, 256, 4)


def test_what_comes_out_may_be_changed_in_place() -> None:
    for layer, shape in ((Conv2d(256, 8, 3, padding=1), (16, 256, 1, 1)), (Conv1d(256, 8, 1), (16, 256, 1))):
        use_taps(layer)
        torch.relu_(layer(torch.randn(shape))).sum().backward()
        assert layer.weight.grad is not None


@pytest.mark.parametrize("shape", [(16, 256, 4), (16, 256, 16), (16, 256, 1, 4), (16, 256, 1, 16)])
def test_what_comes_out_lies_as_it_would(shape: tuple[int, ...]) -> None:
    plain, by_taps, x = Conv1d(256, 8, 3, padding=1), Conv1d(256, 8, 3, padding=1), torch.randn(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    by_taps.load_state_dict(plain.state_dict())
    use_taps(by_taps)
    found, expected = by_taps(x), plain(x)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_acting_takes_the_weights_as_they_lie(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=2, cond_dim=5, down_dims=(32, 256), kernel_size=5).eval().to(dtype)
    actions, cond, timesteps = torch.randn(2, 8, 2, dtype=dtype), torch.randn(2, 5, dtype=dtype), torch.tensor([7])
    with torch.no_grad():
        expected = unet(actions, timesteps.expand(2), cond)
        use_taps(unet)
        unrolled = unroll(unet, timesteps, cond, 8)
        assert unrolled is not None
        torch.testing.assert_close(unrolled(actions, 0), expected, rtol=1e-4, atol=1e-5)
