"""Turn pictures into a feature vector: ResNet, spatial softmax, one linear layer.

Modules and parameter names are LeRobot's (`backbone`, `pool.nets`, `pool.pos_grid`, `out`), so weights load both ways.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
import torchvision
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import functional as pictures

from getiaction.policy.fast.convolution import replace_convolutions
from getiaction.policy.fast.kernels import picture_kernels_for
from getiaction.policy.fast.packed import encode
from getiaction.policy.normalizer import Ranges, normalize_by


class SpatialSoftmax(nn.Module):
    """Return the expected image coordinates of each channel's activation (Finn et al., arXiv:1509.06113).

    Args:
        feature_shape: (C, h, w) of the feature map.
        num_keypoints: K; a 1x1 convolution maps C channels to K first.
    """

    pos_grid: Tensor

    def __init__(self, feature_shape: Sequence[int], *, num_keypoints: int) -> None:
        super().__init__()
        channels, height, width = feature_shape
        self.nets = nn.Conv2d(channels, num_keypoints, kernel_size=1)
        rows, columns = (torch.linspace(-1, 1, size, dtype=torch.float64) for size in (height, width))
        ys, xs = torch.meshgrid(rows, columns, indexing="ij")
        self.register_buffer("pos_grid", torch.stack([xs, ys], dim=-1).reshape(height * width, 2).float())

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, K, 2): x and y in [-1, 1]."""
        attention = functional.softmax(rearrange(self.nets(features), "b k h w -> b k (h w)"), dim=-1)
        return attention @ self.pos_grid  # (B, K, 2)


class ImageEncoder(nn.Module):
    """Encode pictures of one size into vectors of `feature_dim` = 2 x `num_keypoints`.

    Args:
        image_shape: (C, H, W) as recorded.
        resnet: name of a torchvision ResNet: resnet18, resnet34, resnet50, ...
        weights: torchvision weights ("IMAGENET1K_V1", ...), or None for training from scratch.
        norm: "group" (16 channels a group) or "batch". With `weights`, "group" keeps the pretrained affine values.
        resize_shape: (H, W) to resize to first, or None.
        crop_shape: (H, W) to crop to after that, or None.
        crop_is_random: crop at a random place per sample while training (the batch does it); the centre otherwise.
        num_keypoints: K of the spatial softmax.

    Raises:
        ValueError: `norm`, `weights` or a shape that cannot work, or weights that cannot be fetched.

    Source: Chi et al., "Diffusion Policy", arXiv:2303.04137, section III-B.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        resnet: str = "resnet18",
        weights: str | None = None,
        norm: str = "group",
        resize_shape: Sequence[int] | None = None,
        crop_shape: Sequence[int] | None = None,
        crop_is_random: bool = True,
        num_keypoints: int = 32,
    ) -> None:
        super().__init__()
        self.resnet, self.weights, self.norm = resnet, weights, norm
        self.resize_shape = pair(resize_shape)
        self.crop_shape = pair(crop_shape)
        self.crop_is_random = crop_is_random
        self.num_keypoints = num_keypoints
        self.image_shape = tuple(image_shape)
        self.input_shape = self.crop_shape or self.resize_shape or self.image_shape[1:]  # (H, W) that the ResNet sees

        available = self.resize_shape or self.image_shape[1:]
        if self.crop_shape and any(crop > side for crop, side in zip(self.crop_shape, available, strict=True)):
            raise ValueError(
                f"backbone.crop_shape={self.crop_shape} must fit into {available}: make it smaller, or null"
            )

        network = load_resnet(resnet, weights)
        self.backbone = nn.Sequential(*list(network.children())[:-2])  # drop average pooling and classifier
        if norm == "group":
            replace_batch_norm(self.backbone)
        elif norm != "batch":
            raise ValueError(f"backbone.norm={norm!r} must be 'group' or 'batch'")
        replace_convolutions(self.backbone)
        feature_shape = self._feature_shape()  # (C, h, w)
        if feature_shape[1] * feature_shape[2] == 1:
            raise ValueError(
                f"pictures of {self.input_shape} leave the spatial softmax one place to look at, so the policy would "
                "see nothing: use backbone.resize_shape or backbone.crop_shape of more than 32 pixels on a side"
            )
        self.pool = SpatialSoftmax(feature_shape, num_keypoints=num_keypoints)
        self.feature_dim = 2 * num_keypoints
        self.out = nn.Linear(self.feature_dim, self.feature_dim)

    @torch.no_grad()
    def _feature_shape(self) -> tuple[int, ...]:
        training = self.backbone.training
        features = self.backbone.eval()(torch.zeros(1, self.image_shape[0], *self.input_shape))
        self.backbone.train(training)
        return tuple(features.shape[1:])

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and centre-crop recorded pictures, (..., C, H, W) float, to what `forward` takes."""
        lead = images.shape[:-3]
        images = images.flatten(0, -4) if lead else images[None]
        if self.resize_shape is not None and tuple(images.shape[-2:]) != self.resize_shape:
            images = pictures.resize(images, list(self.resize_shape), antialias=True)
        if self.crop_shape is not None:
            images = pictures.center_crop(images, list(self.crop_shape))
        return images.unflatten(0, lead) if lead else images[0]

    def forward(self, images: Tensor, ranges: Ranges | None = None) -> Tensor:
        """Encode pictures, (B, C, h, w) of `input_shape`, into (B, feature_dim).

        Args:
            images: normalised; or uint8, as recorded.
            ranges: what normalises uint8, besides dividing by 255; a GPU does it on the way.
        """
        kernels = picture_kernels_for(self.backbone, images)
        if kernels is not None:
            features = kernels.run(self.backbone, images, ranges)
        else:
            images = normalize_by(ranges, images) if images.dtype == torch.uint8 else images
            features = encode(self.backbone, images)
        keypoints = self.pool(features)  # (B, K, 2)
        return functional.relu(self.out(keypoints.flatten(1)))


def pair(shape: Sequence[int] | None) -> tuple[int, int] | None:
    """Return (H, W), or None."""
    return (int(shape[0]), int(shape[1])) if shape else None


def load_resnet(name: str, weights: str | None) -> nn.Module:
    """Build a torchvision ResNet, fetching `weights` through torch's usual cache.

    Raises:
        ValueError: an unknown ResNet or weights name, or weights that are neither cached nor reachable.
    """
    if not name.startswith("resnet") or name not in torchvision.models.list_models(module=torchvision.models):
        known = [
            model for model in torchvision.models.list_models(module=torchvision.models) if model.startswith("resnet")
        ]
        raise ValueError(f"backbone.resnet={name!r} is no torchvision ResNet: use one of {', '.join(known)}")
    network = torchvision.models.get_model(name, weights=None)
    if weights is None:
        return network
    known_weights = torchvision.models.get_model_weights(name)
    try:
        chosen = known_weights[weights.rsplit(".", 1)[-1]]
    except KeyError:
        known = [entry.name for entry in known_weights]
        raise ValueError(
            f"backbone.weights={weights!r} is unknown for {name}: use one of {', '.join(known)}, or null"
        ) from None
    file = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rsplit("/", 1)[-1]
    try:
        if not file.exists() and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set")
        network.load_state_dict(chosen.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (URLError, OSError, RuntimeError, UnpicklingError) as error:  # the last two: a damaged file
        raise ValueError(
            f"backbone.weights={weights} could not be fetched ({error}). Two ways out: backbone.weights=null "
            "trains from "
            f"scratch; or put the file {file.name} into {file.parent}"
        ) from error
    return network


def replace_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by GroupNorm, 16 channels a group, keeping the affine values."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            group = nn.GroupNorm(child.num_features // 16, child.num_features)
            group.load_state_dict({"weight": child.weight.detach(), "bias": child.bias.detach()})
            setattr(module, name, group)
        else:
            replace_batch_norm(child)
