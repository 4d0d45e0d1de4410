"""Which kernels are used, and what they are given; that they are right, `test_fused.py` tells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from getiaction.policy import kernels
from getiaction.policy.kernels import cast, cast_once

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


def test_kernels_that_do_not_run_give_way_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels._find.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))

    def refuse() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    for _ in range(3):
        assert kernels._find(refuse) is None
    assert caplog.text.count("PyTorch's slower ones are, on this GPU: Failed to find C compiler.") == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (6, 1))
    kernels._find.cache_clear()
    assert kernels._find(lambda: kernels) is None
    kernels._find.cache_clear()
