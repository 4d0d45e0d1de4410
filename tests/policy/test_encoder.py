"""Test the image encoder: normalisation layers, keypoints, crops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from getiaction.policy import ImageEncoder
from getiaction.policy.encoder import SpatialSoftmax, load_resnet, replace_batch_norm


def test_group_norm_keeps_the_affine_values() -> None:
    network = torchvision.models.resnet18(weights=None)
    batch_norms = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    for layer in batch_norms.values():
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)

    replace_batch_norm(network)

    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    for name, before in batch_norms.items():
        after = network.get_submodule(name)
        assert isinstance(after, nn.GroupNorm)
        assert after.num_channels // after.num_groups == 16
        assert torch.equal(after.weight, before.weight)
        assert torch.equal(after.bias, before.bias)
        assert after.weight.requires_grad


def test_group_norm_makes_a_picture_independent_of_its_batch() -> None:
    images = torch.rand(3, 3, 48, 48)
    encoder = ImageEncoder((3, 48, 48), norm="group").train()
    torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 8), (2, 4), (1, 6)])
def test_spatial_softmax_finds_a_peak(row: int, column: int) -> None:
    pool = SpatialSoftmax((1, 5, 9), num_keypoints=1)
    nn.init.ones_(pool.nets.weight)
    nn.init.zeros_(pool.nets.bias)
    features = torch.zeros(1, 1, 5, 9)
    features[0, 0, row, column] = 100
    expected = torch.tensor([[[column / 4 - 1, row / 2 - 1]]])  # x to the right, y down, both in [-1, 1]
    torch.testing.assert_close(pool(features), expected)


def test_spatial_softmax_of_an_even_map_is_its_centre() -> None:
    keypoints = SpatialSoftmax((8, 5, 9), num_keypoints=3)(torch.ones(2, 8, 5, 9))
    torch.testing.assert_close(keypoints, torch.zeros(2, 3, 2))


@pytest.mark.parametrize("resnet", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_encoder_gives_two_numbers_a_keypoint(resnet: str, norm: str) -> None:
    encoder = ImageEncoder((3, 40, 50), resnet=resnet, norm=norm, num_keypoints=6)
    assert encoder.feature_dim == 12
    assert encoder(torch.rand(2, 3, 40, 50)).shape == (2, 12)


def test_encoder_is_left_in_training_mode_with_fresh_running_statistics() -> None:
    encoder = ImageEncoder((3, 40, 40), norm="batch")
    assert all(layer.training for layer in encoder.modules())
    assert not encoder.backbone[1].running_mean.any()


def test_prepare_crops_the_centre_and_keeps_leading_dimensions() -> None:
    images = torch.rand(2, 5, 3, 96, 90)
    encoder = ImageEncoder((3, 96, 90), crop_shape=(84, 80))
    assert torch.equal(encoder.prepare(images), images[..., 6:90, 5:85])
    assert torch.equal(encoder.prepare(images[0, 0]), images[0, 0, :, 6:90, 5:85])


def test_prepare_resizes_then_crops_and_leaves_prepared_pictures_alone() -> None:
    encoder = ImageEncoder((3, 80, 60), resize_shape=(40, 40), crop_shape=(32, 36))
    flat = torch.tensor([0.2, 0.5, 0.9])[:, None, None].expand(3, 80, 60)
    prepared = encoder.prepare(flat)
    torch.testing.assert_close(prepared, flat[:, :32, :36])
    assert torch.equal(encoder.prepare(torch.rand(3, 40, 40)).new_tensor(prepared.shape), torch.tensor([3.0, 32, 36]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, r"backbone\.norm='layer' must be 'group' or 'batch'"),
        ({"resnet": "vit_b_16"}, r"backbone\.resnet='vit_b_16' is no torchvision ResNet: use one of .*resnet18"),
        ({"resnet": "resnet19"}, r"backbone\.resnet='resnet19' is no torchvision ResNet"),
        ({"weights": "CIFAR"}, r"backbone\.weights='CIFAR' is unknown for resnet18: use one of IMAGENET1K_V1, or null"),
        ({"crop_shape": (84, 84)}, "crop_shape"),  # larger than the picture: centre-cropping would pad with black
    ],
)
def test_what_cannot_work_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageEncoder((3, 40, 40), **arguments)


@pytest.mark.parametrize("side", [28, 32])
def test_pictures_too_small_to_see_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match="more than 32 pixels on a side"):
        ImageEncoder((3, 96, 96), crop_shape=(side, side))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_another_picture_is_another_feature_and_the_whole_resnet_learns(norm: str) -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder((3, 40, 40), norm=norm)
    features = encoder(torch.rand(4, 3, 40, 40))
    assert not torch.allclose(features[0], features[1], atol=1e-5)
    features.sum().backward()
    gradient = encoder.backbone[0].weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_offline_asks_nobody_for_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ValueError, match=rf"HF_HUB_OFFLINE is set.*resnet18-\w+\.pth into {tmp_path}/hub/checkpoints"):
        load_resnet("resnet18", "IMAGENET1K_V1")
