"""What cannot work is an error that names key, value, rule and fix; what works badly is a warning."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from accelerate import Accelerator
from composing import compose

from getiaction.check import check
from getiaction.config.build import fetch_weights
from getiaction.config.checks import check_config
from getiaction.config.dataset_checks import check_dataset
from getiaction.config.memory import memory_advice, ran_out
from getiaction.config.sources import find_data
from getiaction.errors import InputError
from getiaction.policy.encoder import load_resnet

ERRORS = [
    (["policy.n_action_steps=16"], "policy.n_action_steps=16 must be at most horizon - n_obs_steps + 1 = 15"),
    (["policy.horizon=10"], "divisible by 4 (time halves 2 times), got 10: use 8 or 16"),
    (["unet.n_groups=7"], "unet.n_groups=7 must divide every entry of unet.down_dims=[256, 512, 1024], not 256"),
    (["backbone.crop_shape=[32,28]"], "leave the spatial softmax one place to look at"),
    (["scheduler=dpm_solver", "policy.num_inference_steps=100"], "acts with NaN"),
    (["unet.kernel_size=4"], "unet.kernel_size=4 must be odd"),
    (["unet.diffusion_step_embed_dim=65"], "must be even"),
    (["unet.down_dims=[]"], "unet.down_dims=[] must be a list of positive numbers"),
    (["backbone.resize_shape=[64,64]"], "backbone.crop_shape=[84, 84] must fit into backbone.resize_shape=[64, 64]"),
    (["backbone.crop_shape=[84]"], "backbone.crop_shape=[84] must be null or two positive numbers"),
    (["backbone.norm=layer"], "backbone.norm=layer must be one of group, batch"),
    (["policy.num_inference_steps=101"], "must be at most scheduler.num_train_timesteps=100"),
    (["policy.num_inference_steps=1"], "starts DDPMScheduler where 100% of the noise is gone already"),
    (["policy.num_inference_steps=0"], "must be a whole number of at least 1"),
    (["scheduler.prediction_type=noise"], "must be one of epsilon, sample, v_prediction"),
    (["scheduler.prediction_type=flow_prediction"], "means nothing to DDPMScheduler: use epsilon or sample or v_pred"),
    (["scheduler=flow_matching", "scheduler.prediction_type=epsilon"], "use sample or flow_prediction"),
    (["policy.loss_weighting=snr"], "must be one of none, min_snr"),
    (["training.noise_draws=0"], "must be a whole number of at least 1"),
    (["lr_scheduler.name=cosin"], "must be one of constant, constant_with_warmup, cosine"),
    (["unet.use_film_scale_modulation=[1,2]"], "must be true or false"),  # trained, and could not be saved
    (["optimizer.scale_lr=square"], "optimizer.scale_lr=square must be one of none, sqrt, linear"),
    (
        ["hardware.num_nodes=2", "hardware.device=cpu"],
        "needs a place where they meet: hardware.rendezvous=<host>:29500",
    ),
    (["optimizer.betas=[0.9,0.9,0.9]"], "optimizer.betas=[0.9, 0.9, 0.9] must be two numbers in [0, 1)"),
    (["optimizer.betas=null"], "optimizer.betas=null means nothing"),
    (["optimizer.weight_decay=x"], "optimizer.weight_decay=x must be a number of at least 0"),
    (["optimizer.betas=0.9"], "optimizer.betas=0.9 must be two numbers"),
    (["hardware.num_threads=1000000000"], "a whole number of at least 1, and at most 1024"),
    (["scheduler.beta_schedule=linear", "scheduler.beta_end=2"], "must add some noise at each step"),  # NaN
    (["scheduler.beta_schedule=linear", "scheduler.beta_start=1e-9"], "scheduler.beta_start=1e-09"),  # 1 - 1e-9 is 1
    (["optimizer.lr=-1"], "optimizer.lr=-1 must be a positive number"),
    (["optimizer.lr=.nan"], "must be a positive number"),
    (["training.max_steps=null"], "training.max_steps and training.max_epochs are both null"),
    (["training.batch_size=0"], "training.batch_size=0 must be a whole number of at least 1"),
    (["dataset.val_fraction=1"], "dataset.val_fraction=1.0 must be in [0, 1)"),
    (["dataset.image_stats=zero"], "must be one of imagenet, half, dataset"),
    (["hardware.mixed_precision=fp8"], "must be one of no, bf16, fp16, auto"),
    (
        ["hardware.compile=true", "hardware.compile_mode=reduce-overhead", "training.gradient_accumulation_steps=2"],
        "whose gradients the next micro-batch overwrites, and training.gradient_accumulation_steps=2 adds them up",
    ),
    (["hardware.convolutions=fft"], "must be one of auto, library, taps"),
    (["hardware.num_processes=64"], "hardware.num_processes=64 needs as many GPUs"),
    (["+scheduler.noise=1"], "scheduler cannot be built"),
    (["scheduler._target_=diffusers.NoScheduler"], "scheduler cannot be built"),
    (["scheduler.beta_schedule=quadratic"], "scheduler cannot be built"),
    ([f"scheduler._target_={__name__}.refuse"], "scheduler cannot be built: AssertionError"),
]


def refuse(**_: object) -> None:
    """Stand in for somebody's class that says nothing of what is wrong."""
    raise AssertionError


WARNINGS = [
    (["backbone.weights=IMAGENET1K_V1"], "norms start from the pretrained affine values"),
    (["backbone.resize_shape=[480,640]", "backbone.crop_shape=[224,224]"], "shows 16% of"),
    (
        ["scheduler.beta_schedule=linear", "scheduler.num_train_timesteps=50"],
        "ends at cumulative alpha 0.60, above 0.02",
    ),
    (["policy.num_inference_steps=2"], "pure noise for that: use at least 3, or +scheduler.timestep_spacing=trailing"),
    (["scheduler=ddim", "policy.num_inference_steps=2"], "starts DDIMScheduler where 48% of the noise is gone already"),
    (
        ["scheduler=flow_matching", "scheduler.prediction_type=sample", "policy.loss_weighting=min_snr"],
        "leaves pure noise, which acting starts from, out of training",
    ),
    (["policy.normalization.action=mean_std"], "scheduler.clip_sample=true clips actions to 1.0"),
    (["lr_scheduler.name=constant"], "use lr_scheduler.name=constant_with_warmup"),
    (["training.max_steps=100"], "lr_scheduler.num_warmup_steps=500 reaches past training.max_steps=100"),
    (["backbone.norm=batch", "training.batch_size=2"], "batch statistics of so few samples are noise"),
    (["policy.horizon=12"], "LeRobot opens checkpoints"),
    (["hardware.convolutions=taps", "hardware.mixed_precision=bf16"], "does nothing with hardware.device=auto"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), ERRORS, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_what_cannot_work_is_an_error(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_config(compose(overrides))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"), WARNINGS, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_what_works_badly_is_a_warning_and_strictly_an_error(
    overrides: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_config(compose(overrides))
    assert len(caplog.records) == 1
    assert message in caplog.text
    with pytest.raises(InputError) as raised:
        check_config(compose([*overrides, "strict=true"]))
    assert message in str(raised.value)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_the_advice_for_one_denoising_step_works(scheduler: str, caplog: pytest.LogCaptureFixture) -> None:
    more = "+scheduler.timestep_spacing=trailing"
    check_config(compose([f"scheduler={scheduler}", "policy.num_inference_steps=1", more]))
    check_config(compose([f"scheduler={scheduler}", "policy.num_inference_steps=3"]))
    assert not caplog.records


def test_weights_that_cannot_be_fetched_name_two_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there, network or not
    with pytest.raises(InputError) as raised:
        fetch_weights(compose(["backbone.weights=IMAGENET1K_V1"]))
    assert "backbone.weights=null trains from scratch; or put the file resnet18-f37072fd.pth into" in str(raised.value)
    with pytest.raises(InputError, match="'IMAGENET1K_V9' is unknown for resnet18: use one of IMAGENET1K_V1, or null"):
        fetch_weights(compose(["backbone.weights=IMAGENET1K_V9"]))


def test_pretrained_weights_come_from_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    loaded = load_resnet("resnet18", "IMAGENET1K_V1")
    assert torch.equal(loaded.conv1.weight, network.conv1.weight)


@pytest.mark.parametrize("preset", ["pusht_basic", "pusht_fast", "pusht_multigpu"])
def test_advice_on_memory_can_be_pasted(preset: str) -> None:
    overrides = [f"+preset={preset}", "hardware.num_processes=1"]
    config = compose(overrides)
    lines = memory_advice(config, Accelerator(cpu=True)).splitlines()[1:]
    assert len(lines) == 4  # as many remedies as the seed names
    for line in lines:
        remedy = [word.replace("'", "") for word in line.split("#")[0].split()]
        check_config(compose([*overrides, *remedy]))


TOO_LARGE = [
    (["training.batch_size=1000000000"], "training.batch_size=1000000000 x training.gradient_accumulation_steps=1 x 1"),
    (
        ["training.gradient_accumulation_steps=100000000"],
        "steps=100000000 x 1 processes",
    ),
    (
        ["unet.diffusion_step_embed_dim=1000000"],
        "lower unet.down_dims=[16, 32] or unet.diffusion_step_embed_dim=1000000",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), TOO_LARGE, ids=lambda value: value[0])
def test_what_no_memory_holds_is_refused_before_any_is_taken(overrides: list[str], message: str, make_dataset) -> None:
    small = ["+preset=pusht_cpu", "dataset.episodes=null", "backbone=none", "unet.down_dims=[16,32]"]
    with pytest.raises(InputError) as raised:
        check([*small, f"dataset.root={make_dataset(cameras=(), lengths=(20, 20))}", *overrides])
    assert message in str(raised.value)


def test_recorded_pictures_that_show_nothing_are_refused(make_dataset) -> None:
    root = make_dataset(cameras=("observation.image",), image_size=(32, 32), lengths=(20, 20))
    sees = ["+preset=pusht_cpu", "dataset.episodes=null", f"dataset.root={root}", "backbone.resize_shape=null"]
    with pytest.raises(InputError, match=r"pictures of \[32, 32\] .* use backbone.resize_shape=\[96,96\]"):
        check(sees)
    check([*sees, "backbone.resize_shape=[96,96]"])


def test_an_error_of_memory_is_told_from_others() -> None:
    for fill in (torch.empty, np.empty):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            fill(10**16)
        assert ran_out(raised.value)
    assert not ran_out(RuntimeError("shapes differ"))


def test_all_errors_come_at_once() -> None:
    with pytest.raises(InputError) as raised:
        check_config(compose(["policy.horizon=10", "unet.n_groups=7", "unet.kernel_size=4"]))
    assert len(str(raised.value).splitlines()) == 3


DATASET_ERRORS = [
    (["dataset.episodes=[0,206,900]"], "pusht has episodes 0 to 205"),
    (["dataset.episodes=[3,3]"], "names [3] twice"),
    (["dataset.episodes=[]"], "leaves nothing to train on"),
    (["dataset.val_episodes=[300]"], "dataset.val_episodes=[300] do not exist"),
    (["dataset.observations=[observation.imagge]"], "pusht: choose from"),
    (["dataset.observations=[observation.state]"], "the backbone needs a camera"),
    (["backbone=none", "dataset.observations=[observation.image]"], "backbone=none cannot see"),
    (["backbone.crop_shape=[128,128]"], "must fit into the recorded picture=[96, 96]"),
    (["+dataset.delta_timestamps.action=[0.0,0.1,0.2]"], "has 3 steps"),
    (["+dataset.delta_timestamps.reward=[0.0]"], "dataset.delta_timestamps names reward"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), DATASET_ERRORS, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_what_the_dataset_cannot_give_is_an_error(overrides: list[str], message: str, pusht_root: Path) -> None:
    config = compose([f"dataset.root={pusht_root}", *overrides])
    with pytest.raises(InputError) as raised:
        check_dataset(config, find_data(config))
    assert message in str(raised.value)


def test_a_crop_of_under_half_of_the_recorded_picture_is_a_warning(
    pusht_root,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        config = compose(["backbone.crop_shape=[32,32]", f"dataset.root={pusht_root}"])
        check_dataset(config, find_data(config))
    assert "shows 11% of the recorded picture=[96, 96]" in caplog.text


def test_states_alone_need_no_camera(pusht_keypoints_root: Path) -> None:
    config = compose(["backbone=none", "dataset=pusht_keypoints", f"dataset.root={pusht_keypoints_root}"])
    check_dataset(config, find_data(config))
    with pytest.raises(InputError, match="use backbone=none"):
        check_dataset(compose(["dataset=pusht_keypoints"]), find_data(config))


# --- mirror -----------------------------------------------------------------------------------------------------------


def test_a_mirror_must_know_every_feature_that_is_used(make_dataset, tmp_path) -> None:
    root = f"dataset.root={make_dataset(cameras=('observation.images.top',))}"
    config = compose(["+preset=pusht_basic", "mirror=pusht", "backbone.crop_shape=null", root])
    with pytest.raises(InputError, match=r"mirror says nothing of observation\.images\.top, which the policy uses"):
        check_dataset(config, find_data(config))
    states = compose(["+preset=pusht_keypoints", "mirror=pusht"])
    with pytest.raises(InputError, match=r"order has 2 places, the dataset's observation\.state has 3: this mirror is"):
        check_dataset(states, find_data(config))


def test_pictures_whose_rows_become_columns_must_be_square() -> None:
    config = compose(["+preset=pusht_basic", "dataset=pusht_demo", "mirror=pusht"])
    mixture = find_data(config)
    check_dataset(config, mixture)
    config.backbone["crop_shape"] = [84, 76]
    with pytest.raises(InputError, match="transpose needs square pictures, the policy sees 84x76"):
        check_dataset(config, mixture)
