"""Test policy folders: they load back bit by bit, and hold what LeRobot itself writes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from composing import compose
from lerobot.configs import PreTrainedConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as LeRobotPolicy
from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors
from safetensors.torch import load_file
from torch import Tensor

from getiaction.config.build import build_policy
from getiaction.errors import InputError
from getiaction.interop.description import describe
from getiaction.interop.layout import CONFIG, EXTRA, PREPROCESSOR_STATE, WEIGHTS
from getiaction.interop.lerobot import load_policy, write_policy
from getiaction.interop.lerobot_files import crop_ratio, not_for_lerobot
from getiaction.policy import DiffusionPolicy, Features, ImageEncoder

KEYPOINTS = Features(action_dim=2, state_dim=2, env_state_dim=16)
PICTURES = Features(action_dim=2, state_dim=2, cameras={"observation.image": (3, 40, 40)})
CAMERAS = ("observation.images.top", "observation.images.wrist")
ALOHA = Features(action_dim=14, state_dim=14, cameras=dict.fromkeys(CAMERAS, (3, 480, 640)))
SMALL = ["unet.down_dims=[16,32]", "unet.diffusion_step_embed_dim=16", "scheduler.num_train_timesteps=20"]
STATE_ONLY = [*SMALL, "backbone=none"]
SMALL_PICTURES = [*SMALL, "backbone.crop_shape=[36,36]"]
SMALL_ALOHA = ["+preset=aloha", *SMALL, "backbone.resnet=resnet18", "backbone.num_keypoints=8"]

EXPRESSIBLE = {
    "keypoints": (STATE_ONLY, KEYPOINTS),
    "pictures, ddim": ([*SMALL_PICTURES, "scheduler=ddim", "scheduler.prediction_type=sample"], PICTURES),
    "aloha": (SMALL_ALOHA, ALOHA),
}
INEXPRESSIBLE = {
    "scheduler": ([*STATE_ONLY, "scheduler=dpm_solver"], KEYPOINTS),
    "scheduler FlowMatch": ([*STATE_ONLY, "scheduler=flow_matching", "scheduler.prediction_type=sample"], KEYPOINTS),
    "prediction_type": ([*STATE_ONLY, "scheduler.prediction_type=v_prediction"], KEYPOINTS),
    "timestep_spacing": ([*STATE_ONLY, "+scheduler.timestep_spacing=trailing"], KEYPOINTS),
    "variance_type": ([*STATE_ONLY, "+scheduler.variance_type=fixed_large"], KEYPOINTS),
    "rescale_betas_zero_snr": ([*STATE_ONLY, "+scheduler.rescale_betas_zero_snr=true"], KEYPOINTS),
    "horizon": ([*STATE_ONLY, "policy.horizon=10"], KEYPOINTS),  # one halving, LeRobot wants two
    "environment_state": (STATE_ONLY, Features(action_dim=2, state_dim=2)),
    "observation.state": (STATE_ONLY, Features(action_dim=2, env_state_dim=16)),
    "crop_shape": ([*SMALL_PICTURES, "backbone.resize_shape=[40,40]", "backbone.crop_shape=[36,20]"], PICTURES),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:  # weights are large: not for pytest to keep
        yield Path(temporary) / "pretrained_model"


def random_statistics(features: Features) -> dict[str, dict[str, Tensor]]:
    statistics = {}
    for key, shape in features.shapes.items():
        size = (shape[0], 1, 1) if len(shape) == 3 else shape
        low = torch.randn(size)
        statistics[key] = {"min": low, "max": low + 1, "mean": low + 0.4, "std": torch.full(size, 0.3)}
    return statistics


def make_policy(overrides: list[str], features: Features) -> DiffusionPolicy:
    torch.manual_seed(0)
    config = compose(overrides)
    return build_policy(config, features, random_statistics(features), fetch_weights=False).eval()


def act(policy: DiffusionPolicy) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    shapes = {key: policy.features.shapes[key] for key in policy.features.observation_keys}
    observations = {key: torch.rand((1, policy.n_obs_steps, *shape), generator=draw) for key, shape in shapes.items()}
    return policy.predict_action_chunk(observations, generator=draw, num_inference_steps=3)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# --- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EXPRESSIBLE, *INEXPRESSIBLE])
def test_a_policy_comes_back_bit_by_bit(name: str, folder: Path) -> None:
    policy = make_policy(*(EXPRESSIBLE | INEXPRESSIBLE)[name])
    write_policy(folder, policy)
    loaded = load_policy(folder)
    assert not loaded.training
    assert describe(loaded) == describe(policy)
    before, after = policy.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(act(loaded), act(policy))


def test_a_run_folder_means_its_last_checkpoint(folder: Path) -> None:
    policy = make_policy(*EXPRESSIBLE["keypoints"])
    write_policy(folder / "checkpoints/000002/pretrained_model", policy)
    (folder / "checkpoints/last").symlink_to("000002")
    assert torch.equal(act(load_policy(str(folder))), act(policy))


def test_cameras_may_share_their_statistics(folder: Path) -> None:
    statistics = random_statistics(ALOHA)
    statistics[CAMERAS[1]] = statistics[CAMERAS[0]]
    policy = build_policy(compose(SMALL_ALOHA), ALOHA, statistics, fetch_weights=False).eval()
    write_policy(folder, policy)
    assert torch.equal(act(load_policy(folder)), act(policy))


# --- what LeRobot writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_the_files_are_those_that_lerobot_writes(name: str, folder: Path) -> None:
    policy = make_policy(*EXPRESSIBLE[name])
    write_policy(folder, policy)
    theirs = folder.with_name("lerobot")
    lerobot_policy = LeRobotPolicy.from_pretrained(folder, strict=True)
    lerobot_policy.save_pretrained(theirs)
    for processor in make_diffusion_pre_post_processors(lerobot_policy.config, policy.normalizer.statistics):
        processor.save_pretrained(theirs)

    assert {path.name for path in folder.iterdir()} == {path.name for path in theirs.iterdir()} | {EXTRA}
    for path in theirs.glob("policy_*.json"):
        assert read(folder / path.name) == read(path)
    for path in theirs.glob("*.safetensors"):
        ours, expected = load_file(folder / path.name), load_file(path)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_lerobot_reads_every_key_of_the_config_as_it_is_meant(name: str, folder: Path) -> None:
    write_policy(folder, make_policy(*EXPRESSIBLE[name]))
    ours = read(folder / CONFIG)
    assert set(ours) <= {"type"} | {field.name for field in fields(DiffusionConfig)}
    lerobot_config = PreTrainedConfig.from_pretrained(folder)
    assert isinstance(lerobot_config, DiffusionConfig)
    lerobot_config.save_pretrained(folder.with_name("lerobot"))
    theirs = read(folder.with_name("lerobot") / CONFIG)
    assert {key: theirs[key] for key in ours} == ours
    assert theirs["pretrained_backbone_weights"] is None  # or it would be fetched again


def test_alohas_crop_arrives_exactly(folder: Path) -> None:
    write_policy(folder, make_policy(*EXPRESSIBLE["aloha"]))
    config = PreTrainedConfig.from_pretrained(folder)
    assert (config.resize_shape, config.crop_shape) == ((240, 240), (224, 224))


def test_every_square_crop_arrives_exactly() -> None:
    encoder = ImageEncoder((3, 40, 40))
    for side in range(2, 257):
        for crop in range(1, side + 1):
            encoder.resize_shape, encoder.crop_shape = (side, side), (crop, crop)
            ratio = crop_ratio(encoder)
            assert ratio is not None
            assert int(side * ratio) == crop  # what LeRobot computes


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_lerobot_refuses_what_it_has_no_equal_for(name: str, folder: Path) -> None:
    policy = make_policy(*INEXPRESSIBLE[name])
    reasons = not_for_lerobot(policy)
    assert len(reasons) == 1
    assert name in reasons[0]
    write_policy(folder, policy)
    with pytest.raises(ValueError, match=r"'getiaction_diffusion' .* is not registered"):
        PreTrainedConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_nothing_speaks_against_lerobot(name: str) -> None:
    assert not_for_lerobot(make_policy(*EXPRESSIBLE[name])) == []


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(folder: Path) -> Path:
    write_policy(folder, make_policy(*EXPRESSIBLE["keypoints"]))
    return folder


def test_a_missing_file_is_named(written: Path) -> None:
    (written / PREPROCESSOR_STATE).unlink()
    with pytest.raises(InputError, match=f"pretrained_model is not whole: it has no {PREPROCESSOR_STATE}; copy"):
        load_policy(written)


def test_a_folder_without_weights_is_no_policy(written: Path) -> None:
    (written / WEIGHTS).unlink()
    with pytest.raises(InputError, match=rf"pretrained_model holds no policy \(no {WEIGHTS}\): give a run folder"):
        load_policy(written)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is no folder: give a run folder"):
        load_policy(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["DiffusionPipeline", "UNet1DModel", "SchedulerMixin", "logging", "NoSuchScheduler"])
def test_only_schedulers_of_diffusers_are_built(written: Path, name: str) -> None:
    described = read(written / EXTRA)
    described["scheduler"]["class"] = name
    (written / EXTRA).write_text(json.dumps(described))
    with pytest.raises(InputError, match=f"the policy names the scheduler {name}, which diffusers"):
        load_policy(written)


def test_weights_that_do_not_fit_are_refused(written: Path) -> None:
    described = read(written / EXTRA)
    described["unet"]["down_dims"] = [16, 64]
    (written / EXTRA).write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"model\.safetensors do not fit their policy\. \d+ of another shape: diff"):
        load_policy(written)


def test_what_our_own_file_lacks_is_named(written: Path) -> None:
    for content in ("{}", "[]", "{"):
        (written / EXTRA).write_text(content)
        with pytest.raises(InputError, match="pretrained_model is damaged, or no policy that this version knows: "):
            load_policy(written)
