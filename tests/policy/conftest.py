"""Share a policy that is small enough for hundreds of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from getiaction.policy import ConditionalUnet1d, DiffusionPolicy, Features, ImageEncoder, Normalizer

MakePolicy = Callable[..., DiffusionPolicy]


@pytest.fixture(scope="module", autouse=True)  # pytest ends a package's only with the session
def _one_thread() -> Iterator[None]:
    """Use one thread: on small tensors more of them wait for each other, very long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_policy() -> MakePolicy:
    """Return a function that builds a tiny policy; keyword arguments go to `DiffusionPolicy`."""

    def make(features: Features | None = None, *, noise_scheduler: Any = None, **arguments: Any) -> DiffusionPolicy:
        torch.manual_seed(0)
        features = features or Features(action_dim=2, state_dim=3)
        statistics: dict[str, dict[str, Tensor]] = {
            key: {"min": torch.full(shape, -2.0), "max": torch.full(shape, 4.0)}
            for key, shape in features.shapes.items()
            if len(shape) == 1
        }
        modes = {"visual": "identity", "state": "min_max", "env": "min_max", "action": "min_max"}
        settings: dict[str, Any] = {
            "encoder": partial(ImageEncoder, crop_shape=(34, 34), num_keypoints=4),
            "n_obs_steps": 2,
            "horizon": 8,
            "n_action_steps": 4,
            "num_inference_steps": 4,
        }
        return DiffusionPolicy(
            features,
            normalizer=Normalizer(statistics, modes),
            noise_scheduler=noise_scheduler or DDPMScheduler(20, beta_schedule="squaredcos_cap_v2"),
            unet=partial(ConditionalUnet1d, down_dims=(16, 32), diffusion_step_embed_dim=16),
            **(settings | arguments),
        )

    return make


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """Let a GPU round to float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
