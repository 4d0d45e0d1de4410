"""Which kernels are used, and what they are given; that they are right, `test_fused.py` tells."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy import ImageEncoder
from getiaction.policy.fast import casts, kernels
from getiaction.policy.fast.casts import cast, cast_once
from getiaction.policy.fast.convolution import Conv2d, use_library
from getiaction.policy.fast.kernels import few_kernels_for, picture_kernels_for

HALF = torch.bfloat16


def test_a_weight_is_cast_once_where_that_is_asked_for() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    assert cast(weight, torch.float32) is weight
    assert cast(weight, HALF) is not cast(weight, HALF)
    with torch.no_grad(), cast_once():
        first = cast(weight, HALF)
        assert cast(weight, HALF) is first
        assert cast(weight, torch.float16).dtype == torch.float16
        assert cast(weight, torch.float32) is weight
    with torch.no_grad():
        weight.mul_(2)
    with torch.no_grad(), cast_once():
        assert torch.equal(cast(weight, HALF), weight.to(HALF))
    assert cast(weight, HALF).requires_grad


def test_a_weight_that_is_made_for_a_call_is_not_kept() -> None:
    with torch.no_grad(), cast_once():
        for _ in range(20):
            made = torch.randn(4, 3)
            assert torch.equal(cast(made, HALF), made.to(HALF))
        assert not casts._CASTS.get()


def test_functions_of_autograd_see_the_weight_itself() -> None:
    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return cast(weight, HALF)

    weight = nn.Parameter(torch.randn(4, 3))
    with torch.no_grad(), cast_once():
        assert Seen.apply(weight).data_ptr() == Seen.apply(weight).data_ptr()


class OnGpu:
    """Stand in for pictures on a GPU, as far as anybody looks."""

    device, dtype, ndim = torch.device("cuda"), torch.float32, 4

    def __init__(self, rows: int = 1, last: bool = True, dtype: torch.dtype = torch.float32) -> None:
        self.rows, self.last, self.dtype = rows, last, dtype

    def __len__(self) -> int:
        return self.rows

    def is_contiguous(self, **_: Any) -> bool:
        return self.last


def test_which_pictures_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(takes=lambda backbone, device: device == "cuda")
    monkeypatch.setattr(kernels, "find_picture_kernels", lambda: found)
    few: list[Any] = []
    monkeypatch.setattr(kernels, "few_kernels_for", lambda layer, x: few[0] if few else None)
    backbone = ImageEncoder((3, 40, 40)).backbone
    assert picture_kernels_for(backbone, OnGpu()) is found
    assert picture_kernels_for(backbone, OnGpu(last=False)) is None
    few.append(found)  # the convolutions will leave the channels last
    assert picture_kernels_for(backbone, OnGpu(last=False)) is found
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"))
    assert picture_kernels_for(theirs, OnGpu(last=False)) is None
    few.clear()
    backbone.to(memory_format=torch.channels_last)
    assert picture_kernels_for(backbone, OnGpu(last=False)) is found
    assert picture_kernels_for(backbone, torch.zeros(1, 3, 40, 40)) is None
    assert picture_kernels_for(backbone, OnGpu(rows=0)) is None
    assert picture_kernels_for(backbone, OnGpu(dtype=torch.float64)) is None
    handle = backbone[4][0].bn1.register_forward_hook(lambda *_: None)
    assert picture_kernels_for(backbone, OnGpu()) is None
    handle.remove()
    use_library(backbone)
    assert picture_kernels_for(backbone, OnGpu()) is None


@pytest.mark.parametrize("runs", [True, False])
def test_batch_norm_has_a_trial_of_its_own(monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    found = SimpleNamespace(takes=lambda backbone, device: True)
    monkeypatch.setattr(kernels, "find_picture_kernels", lambda: found)
    monkeypatch.setattr(kernels, "_FOUND", {kernels._try_batch_norm: kernels if runs else None})
    casts = True
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: casts)
    assert picture_kernels_for(ImageEncoder((3, 40, 40)).backbone, OnGpu()) is found
    backbone = ImageEncoder((3, 40, 40), norm="batch").backbone
    assert picture_kernels_for(backbone, OnGpu()) is (found if runs else None)
    monkeypatch.setattr(kernels, "find_picture_kernels", None)  # not asked where batch norm would not take them
    casts = False
    assert picture_kernels_for(backbone, OnGpu()) is None
    casts = True
    assert picture_kernels_for(backbone.eval(), OnGpu()) is None


def test_kernels_that_do_not_run_give_way_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "_FOUND", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))

    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def find() -> ModuleType:
        return kernels

    def refuse() -> ModuleType:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    for _ in range(3):
        assert kernels._find(refuse) is None
    assert caplog.text.count("PyTorch's slower ones are, on this GPU: Failed to find C compiler.") == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (6, 1))
    assert kernels._find(lambda: kernels) is None
    capturing = True
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    assert kernels._find(find) is None
    capturing = False
    assert kernels._find(find) is kernels


def test_which_convolutions_of_pictures_are_products_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    few = SimpleNamespace(takes_picture=lambda layer, x: True)
    monkeypatch.setattr(kernels, "find_kernels", lambda: SimpleNamespace(few=few))
    layer: Any = Conv2d(3, 4, 3)
    assert few_kernels_for(layer, OnGpu()) is few
    assert few_kernels_for(layer, torch.zeros(1, 3, 8, 8)) is None
    assert few_kernels_for(layer, OnGpu(rows=0)) is None
    assert few_kernels_for(layer, OnGpu(dtype=torch.float64)) is None
    few.takes_picture = lambda layer, x: False
    assert few_kernels_for(layer, OnGpu()) is None
    few.takes_picture = lambda layer, x: True
    use_library(layer)
    assert few_kernels_for(layer, OnGpu()) is None
