"""Our policy is LeRobot's: same weights and draws, same loss, gradients and actions. Every preset, full size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from composing import compose
from lerobot.configs import PreTrainedConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as LeRobotPolicy
from lerobot.policies.factory import make_pre_post_processors
from torch import Tensor, nn

from getiaction.config.build import build_policy
from getiaction.config.compose import CONF_DIR
from getiaction.config.schema import Config
from getiaction.interop.lerobot import write_policy
from getiaction.interop.lerobot_files import not_for_lerobot
from getiaction.policy import DiffusionPolicy, Features

Batch = dict[str, Tensor]

BATCH_SIZE = 2
PUSHT = Features(action_dim=2, state_dim=2, cameras={"observation.image": (3, 96, 96)})
KEYPOINTS = Features(action_dim=2, state_dim=2, env_state_dim=16)
ALOHA = Features(
    action_dim=14,
    state_dim=14,
    cameras={"observation.images.top": (3, 480, 640), "observation.images.wrist": (3, 480, 640)},
)
TWO_CAMERAS = Features(
    action_dim=3,
    state_dim=5,
    env_state_dim=4,
    cameras={"observation.images.left": (3, 60, 80), "observation.images.right": (3, 60, 80)},
)
SMALL = ["unet.down_dims=[16,32]", "unet.diffusion_step_embed_dim=32"]
SMALL_PICTURES = [*SMALL, "backbone.crop_shape=[36,36]"]
VARIANTS = {
    "keypoints": ([*SMALL, "backbone=none"], KEYPOINTS),
    "four groups": ([*SMALL, "backbone=none", "unet.n_groups=4"], KEYPOINTS),
    "mean_std": (
        [*SMALL, "backbone=none", "policy.normalization.state=mean_std", "policy.normalization.action=mean_std"],
        KEYPOINTS,
    ),
    "linear noise, no clip": (
        [*SMALL, "backbone=none", "scheduler.beta_schedule=linear", "scheduler.clip_sample=false"],
        KEYPOINTS,
    ),
    "sample, masked": (
        [*SMALL_PICTURES, "scheduler.prediction_type=sample", "policy.do_mask_loss_for_padding=true"],
        PUSHT,
    ),
    "pictures min_max": ([*SMALL_PICTURES, "policy.normalization.visual=min_max"], PUSHT),
    "identity": (
        [*SMALL_PICTURES, "policy.normalization.state=identity", "policy.normalization.visual=identity"],
        PUSHT,
    ),
    "shift only, checkpointed": (
        [*SMALL_PICTURES, "unet.use_film_scale_modulation=false", "unet.gradient_checkpointing=true"],
        PUSHT,
    ),
    "every denoising step, one observation": (
        [
            *SMALL_PICTURES,
            "scheduler.num_train_timesteps=20",
            "policy.num_inference_steps=null",
            "policy.n_obs_steps=1",
        ],
        PUSHT,
    ),
    "shared encoder, ddim": ([*SMALL, "scheduler=ddim", "backbone.crop_shape=[32,48]"], TWO_CAMERAS),
    "separate encoders, resized": (
        [
            *SMALL,
            "backbone.resize_shape=[40,60]",
            "backbone.crop_shape=[36,54]",
            "policy.use_separate_rgb_encoder_per_camera=true",
        ],
        TWO_CAMERAS,
    ),
}
PRESETS = sorted(path.stem for path in (CONF_DIR / "preset").glob("*.yaml"))
GRADIENTS = {  # parameter -> relative error; ReLU and max-pooling make of rounding other gradients in deep layers,
    "backbone.0.weight": 0.05,
    "pool.nets.weight": 1e-3,  # and these two see the backbone's rounding: 1.02e-4 on AVX2, below 1e-4 on AVX-512
    "rgb_encoder.out.weight": 1e-3,
    "down_modules.0.0.conv1.block.0.weight": 1e-4,
    "diffusion_step_encoder.1.bias": 1e-4,
    "mid_modules.0.cond_encoder.1.bias": 1e-4,
    "final_conv.1.weight": 1e-4,
}


@dataclass
class Twins:
    """Hold one policy in both libraries, and one raw batch for both, pictures in uint8."""

    ours: DiffusionPolicy
    theirs: LeRobotPolicy
    preprocess: Callable[[Batch], Batch]
    postprocess: Callable[[Tensor], Tensor]
    batch: Batch

    @property
    def prepared(self) -> Batch:
        """The batch as our training sees it: resized and cropped."""
        return {**self.batch, **self.ours.prepare(self.batch)}

    @property
    def preprocessed(self) -> Batch:
        """The batch as LeRobot's training sees it: normalised."""
        return self.preprocess({key: in_unit_range(value) for key, value in self.batch.items()})


def in_unit_range(value: Tensor) -> Tensor:
    return value / 255 if value.dtype == torch.uint8 else value


def features_of(config: Config) -> Features:
    if not config.uses_images:
        return KEYPOINTS
    return ALOHA if "aloha" in config.dataset.repo_id else PUSHT


def random_statistics(features: Features) -> dict[str, dict[str, Tensor]]:
    statistics = {}
    for key, shape in features.shapes.items():
        size = (shape[0], 1, 1) if len(shape) == 3 else shape
        low, span = torch.randn(size), 0.5 + torch.rand(size)
        span[-1] *= len(shape) == 3  # a joint that never moves
        statistics[key] = {"min": low, "max": low + span, "mean": low + span / 3, "std": span / 4}
    return statistics


def random_batch(policy: DiffusionPolicy, statistics: dict[str, dict[str, Tensor]]) -> Batch:
    batch = {}
    for key, shape in policy.features.shapes.items():
        steps = policy.horizon if key == "action" else policy.n_obs_steps
        size = (BATCH_SIZE, steps, *shape)
        if len(shape) == 3:
            batch[key] = torch.randint(256, size, dtype=torch.uint8)
        else:
            low, high = statistics[key]["min"], statistics[key]["max"]
            batch[key] = low + (high - low) * torch.rand(size)
    batch["action_is_pad"] = torch.zeros(BATCH_SIZE, policy.horizon, dtype=torch.bool)
    batch["action_is_pad"][0, -3:] = True
    return batch


def shake_norms(policy: nn.Module) -> None:
    """Move normalisation layers from their neutral start, so that a lost value shows."""
    for name, value in policy.state_dict().items():
        if name.endswith("running_mean") or (value.ndim == 1 and name.endswith("bias")):
            value.add_(torch.randn_like(value), alpha=0.1)
        elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.mul_(0.5 + torch.rand_like(value))


def make_twins(config: Config, features: Features) -> Twins:
    torch.manual_seed(1)
    statistics = random_statistics(features)
    ours = build_policy(config, features, statistics, fetch_weights=False).eval()
    shake_norms(ours)
    assert not_for_lerobot(ours) == []
    with tempfile.TemporaryDirectory() as temporary:  # up to 1.2 GB: not for pytest to keep
        folder = Path(temporary) / "pretrained_model"
        write_policy(folder, ours)
        lerobot_config = PreTrainedConfig.from_pretrained(folder)
        lerobot_config.crop_is_random = False
        theirs = LeRobotPolicy.from_pretrained(folder, config=lerobot_config, strict=True)
        preprocess, postprocess = make_pre_post_processors(theirs.config, pretrained_path=str(folder))
    return Twins(ours, theirs, preprocess, postprocess, random_batch(ours, statistics))


@pytest.fixture(scope="module", params=[*PRESETS, *VARIANTS])
def twins(request: pytest.FixtureRequest) -> Iterator[Twins]:
    if request.param in VARIANTS:
        overrides, features = VARIANTS[request.param]
        yield make_twins(compose(overrides), features)
    else:
        unweighted = "policy.loss_weighting=none"  # LeRobot's loss has no weights; test_diffusion.py sees to ours
        config = compose([f"+preset={request.param}", "policy.num_inference_steps=2", unweighted])
        yield make_twins(config, features_of(config))


def losses(twins: Twins) -> tuple[Tensor, Tensor]:
    """Return our loss and LeRobot's, which draws noise and then timesteps from the global generator."""
    torch.manual_seed(7)
    noise = torch.randn(twins.batch["action"].shape)
    timesteps = torch.randint(0, twins.ours.num_train_timesteps, (BATCH_SIZE,))
    torch.manual_seed(7)
    return twins.ours(twins.prepared, noise, timesteps), twins.theirs(twins.preprocessed)[0]


def gradients(policy: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    chosen = {name: value for name, value in policy.named_parameters() if name.endswith(tuple(GRADIENTS))}
    return dict(zip(chosen, torch.autograd.grad(loss, list(chosen.values())), strict=True))


def error(value: Tensor, expected: Tensor) -> float:
    """Return the relative error of a whole tensor."""
    return float((value - expected).norm() / expected.norm())


def test_weights_have_lerobots_names_shapes_and_values(twins: Twins) -> None:
    ours, theirs = twins.ours.state_dict(), twins.theirs.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_same_loss_in_evaluation(twins: Twins) -> None:
    with torch.no_grad():
        ours, theirs = losses(twins)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_same_loss_gradients_and_running_statistics_in_training(twins: Twins) -> None:
    twins.ours.train(), twins.theirs.train()
    ours, theirs = losses(twins)
    our_gradients, their_gradients = gradients(twins.ours, ours), gradients(twins.theirs, theirs)
    twins.ours.eval(), twins.theirs.eval()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        tolerance = next(value for ending, value in GRADIENTS.items() if name.endswith(ending))
        assert error(gradient, their_gradients[name]) < tolerance, name
    buffers = dict(twins.theirs.named_buffers())
    for name, value in twins.ours.named_buffers():
        if "running" in name:
            assert error(value, buffers[name]) < 1e-4, name


def test_same_actions(twins: Twins) -> None:
    noise = torch.randn(twins.batch["action"].shape)
    observations = {key: value for key, value in twins.batch.items() if key.startswith("observation")}
    torch.manual_seed(7)  # DDPM's noise of each step comes from the global generator in LeRobot
    ours = twins.ours.predict_action_chunk(observations, noise=noise)
    torch.manual_seed(7)
    theirs = twins.postprocess(twins.theirs.predict_action_chunk(twins.preprocessed, noise=noise))
    assert ours.shape == (BATCH_SIZE, twins.ours.n_action_steps, twins.ours.features.action_dim)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
