"""Convolutions of few places in C: what PyTorch computes, with weights in float32 and in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy.fast import native
from getiaction.policy.fast.native_few import FewPlaces

LAYERS: dict[str, tuple[int, int, dict[str, Any], tuple[int, ...]]] = {  # channels in and out, the window, (B, h, w)
    "3x3": (16, 48, {"kernel_size": 3, "padding": 1}, (2, 3, 3)),
    "every second place": (24, 70, {"kernel_size": 3, "padding": 1, "stride": 2}, (2, 6, 5)),
    "1x1 at every second place": (20, 33, {"kernel_size": 1, "stride": 2}, (3, 5, 6)),
    "1x1": (96, 64, {"kernel_size": 1}, (1, 4, 3)),
    "more places than are multiplied at once": (8, 40, {"kernel_size": 3, "padding": 1}, (2, 8, 9)),
    "more of padding than of picture": (5, 7, {"kernel_size": 5, "padding": 2}, (1, 1, 2)),
    "no padding": (5, 7, {"kernel_size": 3}, (2, 4, 3)),
    "deeper than a cache": (256, 32, {"kernel_size": 3, "padding": 1}, (1, 3, 3)),
    "one channel, one place": (1, 1, {"kernel_size": 1}, (1, 1, 1)),
}


@pytest.fixture(autouse=True)
def _compiles() -> None:
    if native.find_library() is None:
        pytest.skip("needs a C compiler")


def make(name: str, *, bias: bool = True) -> tuple[nn.Conv2d, Tensor]:
    """Return a layer and what it sees, whose channels lie in order, but not side by side."""
    into, out, window, (batch, height, width) = LAYERS[name]
    torch.manual_seed(0)
    whole = torch.randn(batch, height + 1, width + 2, into + 3)
    x = whole[:, 1:, 1:-1, :into].permute(0, 3, 1, 2)
    return nn.Conv2d(into, out, **window, bias=bias), x


def few(layer: nn.Conv2d, dtype: torch.dtype = torch.float32) -> FewPlaces:
    bias = None if layer.bias is None else layer.bias.detach()
    return FewPlaces(layer, layer.weight.detach(), bias, dtype)


@torch.no_grad()
def assert_rounding_only(found: Tensor, layer: nn.Conv2d, x: Tensor) -> None:
    exact = nn.functional.conv2d(
        x.double(),
        layer.weight.double(),
        None if layer.bias is None else layer.bias.double(),
        layer.stride,
        layer.padding,
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_what_the_layer_computes(name: str, bias: bool) -> None:
    layer, x = make(name, bias=bias)
    assert_rounding_only(few(layer)(x), layer, x)


@pytest.mark.parametrize("name", LAYERS)
def test_bf16_rounds_the_weights_and_nothing_else(name: str) -> None:
    layer, x = make(name)
    found = few(layer, torch.bfloat16)(x)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    assert_rounding_only(found, layer, x)
    assert torch.equal(few(layer)(x), found)  # the same sums in the same order


@pytest.mark.parametrize("name", LAYERS)
def test_no_bit_depends_on_the_threads_or_on_other_pictures(name: str) -> None:
    layer, x = make(name)
    run, before = few(layer), torch.get_num_threads()
    whole = run(x)
    try:
        for threads in (1, 2, 3, 7):  # more than there are panels, too
            torch.set_num_threads(threads)
            assert torch.equal(run(x), whole)
            for number in range(len(x)):
                assert torch.equal(run(x[number : number + 1]), whole[number : number + 1])
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_where_it_is_seen() -> None:
    layer, x = make("3x3")
    clean = few(layer)(x)
    x = x.clone(memory_format=torch.channels_last)
    x[1, 0, 0, 0] = float("nan")
    found = few(layer)(x)
    assert found[1, :, :2, :2].isnan().all()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1, :, 2], clean[1, :, 2])
