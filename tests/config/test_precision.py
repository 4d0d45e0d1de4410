"""Which precision pays on which CPU, what products are rounded to, and that an evaluation says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from getiaction import half
from getiaction.config.precision import allow_tf32, choose_precision, rounding
from getiaction.half import is_faster_in_bf16


@pytest.fixture(autouse=True)
def _restores_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_tf32_is_allowed_or_kept_from_products_and_convolutions_alike() -> None:
    for allowed in (True, False):
        allow_tf32(allowed)
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize(
    ("precision", "device", "tf32", "said"),
    [
        ("no", "cpu", True, {}),
        ("no", "cuda", False, {}),
        ("no", "cuda", True, {"tf32": True}),
        ("bf16", "cpu", True, {"mixed_precision": "bf16"}),
        ("bf16", "cuda", True, {"mixed_precision": "bf16", "tf32": True}),
    ],
)
def test_an_evaluation_says_what_it_rounds_to(precision: str, device: str, tf32: bool, said: dict[str, object]) -> None:
    allow_tf32(tf32)
    assert rounding(precision, device) == said


@pytest.mark.parametrize(
    ("vendor", "avx512_bf16", "amx", "faster"),
    [
        ("AuthenticAMD", True, False, True),
        ("AuthenticAMD", False, False, False),
        ("GenuineIntel", True, False, False),  # as virtual machines without AMX show it
        ("GenuineIntel", True, True, True),
        (None, True, False, False),  # nobody says who made it
    ],
)
def test_auto_takes_bf16_on_the_cpus_that_gain_from_it(
    vendor: str | None, avx512_bf16: bool, amx: bool, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "read_cpu", {"vendor_id": vendor}.get)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert is_faster_in_bf16("cpu") is faster
    assert choose_precision("auto", "cpu") == ("bf16" if faster else "no")
    assert choose_precision("bf16", "cpu") == "bf16"  # who asks for it gets it
