"""Plain PyTorch: encoder, U-Net, diffusion and controller. Needs no config, no dataset and no trainer."""

from getiaction.policy.batched import BatchedActor
from getiaction.policy.controller import Controller
from getiaction.policy.diffusion import DiffusionPolicy
from getiaction.policy.encoder import ImageEncoder
from getiaction.policy.features import Features
from getiaction.policy.normalizer import Normalizer
from getiaction.policy.unet import ConditionalUnet1d

__all__ = [
    "BatchedActor",
    "ConditionalUnet1d",
    "Controller",
    "DiffusionPolicy",
    "Features",
    "ImageEncoder",
    "Normalizer",
]
