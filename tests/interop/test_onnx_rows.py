"""Hold what is exported in place of the U-Net's layers against those layers, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from getiaction.interop.onnx_rows import Conv1dInRows, DoublingInRows, MishOfSigmoid, in_rows, replacement
from getiaction.policy import ConditionalUnet1d
from getiaction.policy.fast.activation import Mish


@pytest.fixture(autouse=True)
def _in_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


LAYERS = [(1, 1, 0), (3, 1, 1), (5, 1, 2), (3, 2, 1), (1, 2, 0), (5, 1, 0)]  # size, stride, padding


@pytest.mark.parametrize(
    ("size", "stride", "padding", "time"),
    [(*layer, time) for layer in LAYERS for time in (1, 2, 5, 16) if time + 2 * layer[2] >= layer[0]],
)
def test_a_convolution_is_the_same(size: int, stride: int, padding: int, time: int) -> None:
    layer = nn.Conv1d(3, 4, size, stride=stride, padding=padding, bias=stride == 1)
    x = torch.randn(2, 3, time)
    torch.testing.assert_close(Conv1dInRows(layer)(x), layer(x))


@pytest.mark.parametrize("time", [1, 2, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_doubling_time_is_the_same(time: int, bias: bool) -> None:
    layer = nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1, bias=bias)
    x = torch.randn(2, 3, time)
    torch.testing.assert_close(DoublingInRows(layer)(x), layer(x))


def test_mish_is_the_same_far_out_as_well() -> None:
    x = torch.tensor([-1e4, -800.0, -50.0, -1.0, -1e-8, 0.0, 1e-8, 1.0, 50.0, 800.0, 1e4])
    torch.testing.assert_close(MishOfSigmoid()(x), nn.functional.mish(x), rtol=1e-12, atol=1e-18)
    torch.testing.assert_close(MishOfSigmoid()(x.float()), nn.functional.mish(x.float()), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_whole_network_is_the_same_and_the_own_stays(kernel_size: int) -> None:
    unet = ConditionalUnet1d(action_dim=2, cond_dim=3, down_dims=(16, 32, 32), kernel_size=kernel_size).eval()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    noisy, cond = torch.randn(2, 8, 2), torch.randn(2, 3)
    films = [film[0] for film in unet.modulation(torch.tensor([3]), cond)]
    other = in_rows(unet)
    kinds = {type(module) for module in other.modules()}
    assert {Conv1dInRows, DoublingInRows, MishOfSigmoid} <= kinds
    assert not any(issubclass(kind, (nn.Conv1d, nn.ConvTranspose1d, Mish)) for kind in kinds)
    torch.testing.assert_close(other.denoise(noisy, films), unet.denoise(noisy, films))
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 4, 3, groups=2),
        nn.Conv1d(4, 4, 3, dilation=2),
        nn.Conv1d(4, 4, 3, padding="same"),
        nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1, groups=2),
        nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1),
        nn.Linear(4, 4),
    ],
)
def test_other_layers_stay(layer: nn.Module) -> None:
    assert replacement(layer) is None
