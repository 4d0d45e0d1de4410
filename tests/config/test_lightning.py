"""The first GetiAction's files mean what they say, are mended aloud, and train by the same code as every run here."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
import yaml
from composing import compose
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from safetensors.torch import load_file

from getiaction.config.compose import CONF_DIR
from getiaction.config.lightning import keys
from getiaction.config.lightning.arguments import read_arguments
from getiaction.config.lightning.translate import translate
from getiaction.config.lightning.translation import Translation
from getiaction.config.overrides import as_override, quote
from getiaction.config.value_checks import look_up
from getiaction.errors import InputError

FILES = sorted(path.stem for path in (CONF_DIR / "lightning").glob("*.yaml"))


@pytest.fixture(scope="session")
def pusht_like(make_dataset: Callable[..., Path]) -> Path:
    """Return a small dataset with PushT's shapes and rate."""
    return make_dataset(
        lengths=(31, 29, 30, 28, 32),
        cameras=("observation.image",),
        image_size=(96, 96),
        state_dim=2,
        action_dim=2,
        fps=10,
    )


def read(*arguments: str, root: Path) -> Translation:
    return translate(read_arguments([*arguments, f"--data.root={root}"]))


def config_of(found: Translation) -> dict[str, Any]:
    """Return the composed config, but for where data and run lie."""
    config = asdict(compose(found.overrides))
    del config["dataset"]["root"], config["output_dir"]
    return config


# --- the six files of the tree ----------------------------------------------------------------------------------------


def test_the_six_are_there() -> None:
    assert FILES == ["aloha", "pusht_advanced", "pusht_basic", "pusht_cpu", "pusht_fast", "pusht_multigpu"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_tree_is_its_preset(name: str, pusht_like: Path, aloha_root: Path) -> None:
    root = aloha_root if name == "aloha" else pusht_like
    found = read("--config", str(CONF_DIR / "lightning" / f"{name}.yaml"), "--strict", root=root)
    assert found.changed == found.left_out == []
    preset = asdict(compose([f"+preset={name}"]))
    del preset["dataset"]["root"], preset["output_dir"]
    assert config_of(found) == preset


# --- names ------------------------------------------------------------------------------------------------------------

MODEL_VALUES: dict[str, Any] = {  # key of model.init_args -> (value in a file, value in the config here)
    "n_obs_steps": (3, 3),
    "horizon": (32, 32),
    "n_action_steps": (4, 4),
    "drop_n_last_frames": (2, 2),
    "num_inference_steps": (7, 7),
    "do_mask_loss_for_padding": (True, True),
    "use_separate_rgb_encoder_per_camera": (True, True),
    "vision_backbone": ("resnet34", "resnet34"),
    "resize_shape": ([80, 80], [80, 80]),
    "crop_shape": ([90, 90], [90, 90]),
    "crop_is_random": (False, False),
    "spatial_softmax_num_keypoints": (16, 16),
    "down_dims": ([64, 128], [64, 128]),
    "kernel_size": (3, 3),
    "n_groups": (4, 4),
    "diffusion_step_embed_dim": (64, 64),
    "use_film_scale_modulation": (False, False),
    "gradient_checkpointing": (True, True),
    "num_train_timesteps": (50, 50),
    "beta_schedule": ("scaled_linear", "squaredcos_cap_v2"),  # mended: it does not reach noise in 100 steps
    "beta_start": (0.001, 0.001),
    "beta_end": (0.03, 0.03),
    "prediction_type": ("sample", "sample"),
    "clip_sample": (False, False),
    "clip_sample_range": (2.0, 2.0),
    "learning_rate": ("5e-4", 5e-4),
    "optimizer_lr": ("5e-4", 5e-4),
    "optimizer_betas": ([0.9, 0.99], [0.9, 0.99]),
    "optimizer_eps": (1e-7, 1e-7),
    "optimizer_weight_decay": (0.01, 0.01),
    "scheduler_name": ("linear", "linear"),
    "scheduler_warmup_steps": (7, 7),
    "compile_model": (True, True),
    "compile_mode": ("max-autotune", "max-autotune"),
    "device": ("cpu", "cpu"),
    "pretrained_backbone_weights": ("ResNet18_Weights.IMAGENET1K_V1", "IMAGENET1K_V1"),
    "use_group_norm": (False, "batch"),
    "use_amp": (True, "auto"),
    "pretrained_path": ("me/policy", "me/policy"),
    "input_features": ({"observation.state": None}, ["observation.state"]),
}
ELSEWHERE = {"crop_ratio", "noise_scheduler_type", "normalization_mapping", "pretrained_revision", "policy_name"}
ELSEWHERE |= {"config_kwargs"}


def test_every_name_of_lerobots_and_of_the_format_is_known() -> None:
    known = {*keys.MODEL, *keys.MODEL_SPECIAL, *keys.MODEL_WITHOUT_EFFECT}
    assert {field.name for field in fields(DiffusionConfig)} <= known
    assert {*keys.MODEL, *keys.MODEL_SPECIAL} == {*MODEL_VALUES} | ELSEWHERE


@pytest.mark.parametrize("name", MODEL_VALUES)
def test_a_model_key_arrives(name: str, pusht_like: Path) -> None:
    value, expected = MODEL_VALUES[name]
    found = read(f"--model.{name}", json.dumps(value) if not isinstance(value, str) else value, root=pusht_like)
    key = {**keys.MODEL, **keys.MODEL_SPECIAL}[name]
    assert look_up(compose(found.overrides), key) == expected


def test_model_keys_that_are_no_single_value(pusht_like: Path) -> None:
    ddim = read("--model.noise_scheduler_type", "DDIM", root=pusht_like)
    assert compose(ddim.overrides).scheduler["_target_"] == "diffusers.DDIMScheduler"
    mapped = read("--model.normalization_mapping", "{STATE: MEAN_STD, VISUAL: IDENTITY}", root=pusht_like)
    modes = compose(mapped.overrides).policy.normalization
    assert (modes.state, modes.visual, modes.action) == ("mean_std", "identity", "min_max")
    ratio = read("--model.resize_shape=[90,80]", "--model.crop_ratio=0.9", root=pusht_like)
    assert compose(ratio.overrides).backbone["crop_shape"] == [81, 72]
    pinned = read("--model.pretrained_path=me/policy", "--model.pretrained_revision=v2", root=pusht_like)
    assert compose(pinned.overrides).training.init_from == "me/policy@v2"
    general = read(
        "--model=getiaction.policies.lerobot.LeRobotPolicy",
        "--model.policy_name=diffusion",
        "--model.config_kwargs={horizon: 32}",
        root=pusht_like,
    )
    assert compose(general.overrides).policy.horizon == 32


OTHERS: dict[str, tuple[str, Any]] = {  # option -> (key here, value)
    "--data.repo_id=me/data": ("dataset.repo_id", "me/data"),
    "--data.episodes=[0,1]": ("dataset.episodes", [0, 1]),
    "--data.revision=v2": ("dataset.revision", "v2"),
    "--data.train_batch_size=32": ("training.batch_size", 32),
    "--data.num_rollouts_val=5": ("evaluation.episodes", 5),
    "--trainer.max_epochs=2": ("training.max_epochs", 2),
    "--trainer.max_steps=-1": ("training.max_epochs", 1000),
    "--trainer.max_steps=70": ("training.max_steps", 70),
    "--trainer.accelerator=cpu": ("hardware.device", "cpu"),
    "--trainer.accelerator=gpu": ("hardware.device", "cuda"),
    "--trainer.devices=4": ("hardware.num_processes", 4),
    "--trainer.devices=[0,1]": ("hardware.num_processes", 2),
    "--trainer.precision=16-mixed": ("hardware.mixed_precision", "auto"),
    "--trainer.precision=bf16-mixed": ("hardware.mixed_precision", "bf16"),
    "--trainer.precision=32": ("hardware.mixed_precision", "no"),
    "--trainer.gradient_clip_val=1.5": ("training.max_grad_norm", 1.5),
    "--trainer.gradient_clip_val=0": ("training.max_grad_norm", None),
    "--trainer.accumulate_grad_batches=2": ("training.gradient_accumulation_steps", 2),
    "--trainer.log_every_n_steps=7": ("training.log_every", 7),
    "--trainer.sync_batchnorm=true": ("hardware.sync_batch_norm", True),
    "--trainer.enable_checkpointing=false": ("training.save_every", None),
    "--trainer.check_val_every_n_epoch=2": ("validation.every", 12),  # 2 x 91 samples of 4 episodes / 16
    "--trainer.val_check_interval=30": ("validation.every", 30),
    "--trainer.logger={class_path: lightning.pytorch.loggers.WandbLogger}": ("tracker.name", "wandb"),
    "--trainer.logger=false": ("tracker.name", "local"),
    "--seed_everything=3": ("seed", 3),
    "--getiaction.ema.power=0.5": ("ema.power", 0.5),
}


@pytest.mark.parametrize("option", OTHERS)
def test_other_keys_arrive(option: str, pusht_like: Path) -> None:
    key, expected = OTHERS[option]
    assert look_up(compose(read(option, root=pusht_like).overrides), key) == expected


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.horizn=16", r"model\.init_args\.horizn does not exist: did you mean model\.init_args\.horizon\?"),
        ("--data.train_batchsize=3", r"did you mean data\.init_args\.train_batch_size\?"),
        ("--trainer.max_epoch=3", r"trainer\.max_epoch does not exist: did you mean trainer\.max_epochs\?"),
        ("--modell.horizon=3", r"modell does not exist: did you mean model\?"),
        ("--model=getiaction.policies.ACT", r"model\.class_path=getiaction\.policies\.ACT has no equal here"),
        ("--model.policy_name=act", r"policy_name=act has no equal here: there is diffusion"),
        ("--model.noise_scheduler_type=EDM", r"noise_scheduler_type=EDM must be DDPM or DDIM"),
        ("--model.horizon=ten", r"model\.init_args\.horizon='ten' must be a whole number of"),
        ("--model.down_dims=3", r"model\.init_args\.down_dims=3 must be a list of numbers"),
        ("--model.beta_schedule=steep", r"model\.init_args\.beta_schedule=steep: steep is not implemented"),
        (
            "--ckpt_path=epoch=3.ckpt",
            r"ckpt_path=epoch=3\.ckpt is a file of Lightning's, a pickle, which is never opened",
        ),
        ("--trainer={max_epochs: -1, max_steps: -1}", r"trainer\.max_epochs=-1 never ends: give a number"),
        ("--trainer.accumulate_grad_batches=0", r"trainer\.accumulate_grad_batches=0 must be a whole number"),
        ("--trainer.enable_checkpointing=maybe", r"trainer\.enable_checkpointing='maybe' must be true or false"),
        ("--trainer=5", r"trainer=5 must hold keys"),
        ("--model.init_args=foo", r"model\.init_args=foo must hold keys"),
        ("--getiaction=foo", r"getiaction=foo must hold keys"),
        ("--model.resize_shape=96", r"resize_shape=96 must be \[height, width\]"),
        ("--model.config_kwargs=foo", r"config_kwargs='foo' must be a mapping"),
        (
            "--model.init_args={n_obs_steps: 4, horizon: 2, down_dims: [512]}",
            r"n_obs_steps=4 must be at most horizon=2",
        ),
        ("--data.episodes=5", r"data\.init_args\.episodes=5 must be a list of whole numbers"),
        ("--data.train_batch_size=many", r"train_batch_size='many' must be a whole number"),
        ("--data.delta_timestamps=[0.1]", r"delta_timestamps=\[0\.1\] must be a mapping"),
        ("--data.delta_timestamps.action=[]", r"delta_timestamps\.action=\[\] must be a list of seconds"),
        ("--data.delta_timestamps.action=[0.0,0.1,...,-1.5]", "must be a list of seconds"),
        ("--data.delta_timestamps.action=[0.0,.inf]", "must be a list of seconds"),
        ("--trainer.precision=8", r"trainer\.precision=8 must be one of 32"),
        ("--trainer.accelerator=tpu", r"trainer\.accelerator=tpu must be one of auto, gpu"),
        ("--trainer.strategy=fsdp", r"trainer\.strategy=fsdp has no equal here"),
        ("--trainer.devices=none", r"trainer\.devices=none must be a number, a list or auto"),
        ("--trainer.gradient_clip_algorithm=value", "there is norm only"),
        ("--data.val_gyms={class_path: x.MyGym}", r"val_gyms=MyGym must be one of PushTGym"),
        ("--data.delta_timestamps.action=soon", r"delta_timestamps\.action=soon must be a list of seconds"),
    ],
)
def test_mistakes_are_named(option: str, said: str, pusht_like: Path) -> None:
    with pytest.raises(InputError, match=said):
        read(option, root=pusht_like)


def test_a_checkpoint_stands_for_its_run(pusht_like: Path) -> None:
    for given in ("runs/one", "runs/one/checkpoints/last", "runs/one/checkpoints/000002/pretrained_model"):
        assert read(f"--ckpt_path={given}", root=pusht_like).values["training.resume"] == "runs/one"


def test_what_has_no_effect_is_listed(pusht_like: Path) -> None:
    given = [f"--data.{name}=1" for name in keys.DATA_WITHOUT_EFFECT]
    given += [f"--trainer.{name}=1" for name in keys.TRAINER_WITHOUT_EFFECT]
    given += [f"--model.{name}=1" for name in keys.MODEL_WITHOUT_EFFECT]
    found = read(*given, root=pusht_like)
    assert len(found.left_out) == len(given)
    assert "trainer.callbacks: the loop has none; curves, checkpoints and rollouts are its own" in found.left_out


# --- the command line -------------------------------------------------------------------------------------------------


def test_later_files_and_options_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model:\n  class_path: Diffusion\n  init_args:\n    horizon: 8\n    n_obs_steps: 1\ntrainer:\n")
    second.write_text("model:\n  init_args: {horizon: 32}\n")
    found = read_arguments(
        ["--model.n_obs_steps=5", "--config", str(first), f"--config={second}", "--model.n_action_steps", "4"]
    )
    assert found.content == {
        "model": {"init_args": {"n_obs_steps": 1, "horizon": 32, "n_action_steps": 4}, "class_path": "Diffusion"}
    }
    assert read_arguments(["--model.init_args.down_dims", "[512,1024,2048]"]).content["model"]["init_args"] == {
        "down_dims": [512, 1024, 2048]
    }
    windows = read_arguments(["--data.delta_timestamps.observation.state=[0.0]"]).content["data"]["init_args"]
    assert windows == {"delta_timestamps": {"observation.state": [0.0]}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["file.yaml"], r"file\.yaml is no option: files come with --config file\.yaml"),
        (["--model.horizon"], "--model.horizon needs a value"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
        (["--model.down_dims=[1,"], r"--model.down_dims \[1, cannot be read: lists are \[1,2\]"),
    ],
)
def test_what_cannot_be_read_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_arguments(arguments)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [", "is no YAML"),
        ("- 1", "must hold model:, data: and trainer:"),
        ("model: {init_args: foo}", "must be class_path: and init_args:"),
        ("trainer: [1]", r"trainer=\[1\] must hold keys"),
        ("getiaction: foo", "getiaction=foo must hold keys"),
        ("seed_everything: ${oc.env:NOT_SET_ANYWHERE}", "is no YAML: .*NOT_SET_ANYWHERE"),
    ],
)
def test_a_damaged_file_is_named(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(InputError, match=said):
        read_arguments(["--config", str(tmp_path / "x.yaml")])


def test_short_keys_of_a_later_file_win(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("model: {init_args: {horizon: 16}}\ndata: {init_args: {train_batch_size: 8}}")
    (tmp_path / "two.yaml").write_text("model: {horizon: 32}\ndata: {train_batch_size: 4}\ntrainer:\n")
    found = read_arguments(["-c", str(tmp_path / "one.yaml"), "--config", str(tmp_path / "two.yaml")]).content
    assert found == {"model": {"init_args": {"horizon": 32}}, "data": {"init_args": {"train_batch_size": 4}}}


def test_quoted_values_are_read_as_what_they_are(pusht_like: Path, tmp_path: Path) -> None:
    (tmp_path / "größe.yaml").write_text(
        "model: {init_args: {use_group_norm: 'false', num_inference_steps: '10', learning_rate: '1e-3'}}\n"
        "data: {init_args: {train_batch_size: '64', revision: '1.10'}}\n"
        "trainer: {enable_checkpointing: 'false', check_val_every_n_epoch: 5, accumulate_grad_batches: null}\n"
    )
    found = read("--config", str(tmp_path / "größe.yaml"), root=pusht_like)
    config = compose(found.overrides)
    assert (config.backbone["norm"], config.policy.num_inference_steps, config.optimizer["lr"]) == ("batch", 10, 1e-3)
    assert (config.training.batch_size, config.training.save_every) == (64, None)
    assert (config.dataset.revision, config.name) == ("1.10", "gr__e")


def test_a_given_resize_shape_is_never_changed(pusht_like: Path) -> None:
    for resize in ([224, 224], [64, 64]):
        found = read(f"--model.resize_shape={json.dumps(resize)}", "--strict", root=pusht_like)
        backbone = compose(found.overrides).backbone
        assert (backbone["resize_shape"], backbone["crop_shape"]) == (resize, None)  # as LeRobot: no ratio, no crop
    half = read("--model.resize_shape=[96,96]", "--model.crop_ratio=0.5", "--strict", root=pusht_like)
    assert compose(half.overrides).backbone["crop_shape"] == [48, 48]
    alone = read("--model.crop_ratio=0.5", root=pusht_like)
    assert "model.init_args.crop_ratio: a share of resize_shape alone, without crop_shape" in alone.left_out


def test_gyms_and_loggers(pusht_like: Path) -> None:
    gym = "{class_path: getiaction.gyms.PushTGym, init_args: {seed: 1}}"
    loggers = "[{class_path: x.WandbLogger, init_args: {project: p, entity: me, name: n}}, {class_path: x.CSVLogger}]"
    given = [f"--data.val_gyms=[{gym}]", "--data.num_rollouts_val=5", f"--trainer.logger={loggers}"]
    found = read(*given, root=pusht_like)
    config = compose(found.overrides)
    assert (config.evaluation.every, config.evaluation.episodes, config.validation.every) == (6, 5, 5000)
    assert (config.tracker.name, config.tracker.project, config.tracker.entity) == ("wandb", "p", "me")
    listed = " ".join(found.left_out)
    for name in ("val_gyms.init_args", "trainer.logger.init_args.name", "trainer.logger CSVLogger"):
        assert name in listed
    assert (
        compose(read("--trainer.logger=x.TensorBoardLogger", root=pusht_like).overrides).tracker.name == "tensorboard"
    )


def test_data_of_a_folder_alone_have_its_name(pusht_like: Path) -> None:
    assert compose(read(root=pusht_like).overrides).dataset.repo_id == f"local/{pusht_like.name}"


@pytest.mark.parametrize(
    "value", ["a b", "it's", "a\\b", "end\\", "\\'", "null", "true", "nan", "1e5", "ä=b,c", "[x]", "", "/a/b.c"]
)
def test_hydra_reads_back_what_is_quoted(value: str) -> None:
    assert compose([f"dataset.root={quote(value)}"]).dataset.root == value
    assert shlex.split(as_override("dataset.root", value)) == [f"dataset.root={quote(value)}"]


# --- what contradicts itself ------------------------------------------------------------------------------------------

TENTHS = "[0.0, 0.1, ..., 1.5]"
CONTRADICTIONS: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "norm": (
        ["--model.pretrained_backbone_weights=ResNet18_Weights.IMAGENET1K_V1"],
        "use_group_norm true -> false: ResNet18_Weights.IMAGENET1K_V1 were trained with batch norm, which group norm",
        {"backbone.norm": "batch", "backbone.weights": "IMAGENET1K_V1"},
    ),
    "horizon": (
        ["--model.horizon=10", "--model.n_action_steps=10"],
        "horizon 10 -> 16: the U-Net halves time twice, and LeRobot opens multiples of 8 only",
        {"policy.horizon": 16, "policy.n_action_steps": 10},
    ),
    "too many actions": (
        ["--model.n_action_steps=16"],
        "n_action_steps 16 -> 15: of 16 predicted actions 15 lie ahead: the first belong to past observations",
        {"policy.n_action_steps": 15},
    ),
    "a schedule that ends before noise": (
        ["--model.beta_schedule=linear", "--model.num_train_timesteps=50"],
        "beta_schedule linear -> squaredcos_cap_v2: over 50 steps it ends at cumulative alpha 0.60, so acting starts",
        {"scheduler.beta_schedule": "squaredcos_cap_v2"},
    ),
    "more denoising than training": (
        ["--model.num_train_timesteps=50", "--model.num_inference_steps=60"],
        "num_inference_steps 60 -> 50: there are num_train_timesteps=50 only",
        {"policy.num_inference_steps": 50},
    ),
    "warm-up of a constant": (
        ["--model.scheduler_name=constant", "--model.scheduler_warmup_steps=10"],
        "scheduler_name constant -> constant_with_warmup: constant alone has no scheduler_warmup_steps=10",
        {"lr_scheduler.name": "constant_with_warmup"},
    ),
    "crop for resolution": (
        ["--model.crop_shape=[56,56]"],
        "resize_shape null -> [64, 64]: a crop of 56x56 shows 34% of a 96x96 picture; it is cropped from that now",
        {"backbone.resize_shape": [64, 64], "backbone.crop_shape": [56, 56]},
    ),
    "centre crop for resolution": (
        ["--model.crop_shape=[64,64]", "--model.crop_is_random=false"],
        "resize_shape null -> [64, 64]: a crop of 64x64 shows 44% of a 96x96 picture; it is resized to that now",
        {"backbone.resize_shape": [64, 64], "backbone.crop_shape": None},
    ),
    "crop larger than the picture": (
        ["--model.crop_shape=[224,224]"],
        "crop_shape [224, 224] -> [96, 96]: pictures have 96x96 pixels",
        {"backbone.crop_shape": [96, 96]},
    ),
    "windows one frame late": (
        [f"--data.delta_timestamps.action={TENTHS}"],
        "delta_timestamps.action [0, 0.1, ..., 1.5] -> [-0.1, 0, ..., 1.4]: with n_obs_steps=2 actions count from",
        {"dataset.delta_timestamps": None},
    ),
    "no time axis": (
        [f"--data.delta_timestamps.action={TENTHS}"],
        "delta_timestamps.observation.state, observation.image none -> [-0.1, 0]: n_obs_steps=2 observations at 10 Hz",
        {},
    ),
    "another rate": (
        ["--data.delta_timestamps.action=[0.0, 0.2, ..., 3.0]"],
        "[0, 0.2, ..., 3] -> [-0.1, 0, ..., 1.4]: the data have 10 Hz; 0.2 s apart, a robot would act 2 times as fast",
        {},
    ),
    "another length": (
        ["--data.delta_timestamps.action=[-0.1, 0.0, 0.1]"],
        "delta_timestamps.action [-0.1, 0, 0.1] -> [-0.1, 0, ..., 1.4]: 16 steps are needed",
        {},
    ),
    "an observation that is not there": (
        ["--data.delta_timestamps.observation.force=[0.0]"],
        "delta_timestamps.observation.force left out: the dataset has observation.state",
        {},
    ),
    "a key of config_kwargs": (
        ["--model=LeRobotPolicy", "--model.horizon=32", "--model.config_kwargs={horizon: 16}"],
        "horizon 32 -> 16: config_kwargs says so",
        {"policy.horizon": 16},
    ),
    "two names of one thing": (
        ["--model.device=cuda", "--trainer.accelerator=cpu"],
        "model.init_args.device cuda -> cpu: trainer.accelerator says so",
        {"hardware.device": "cpu"},
    ),
    "two learning rates": (
        ["--model.learning_rate=1e-3", "--model.optimizer_lr=1e-4"],
        "optimizer_lr 0.0001 -> 0.001: learning_rate says so",
        {"optimizer.lr": 1e-3},
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_mended_aloud_and_refused_when_strict(name: str, pusht_like: Path) -> None:
    given, said, expected = CONTRADICTIONS[name]
    found = read(*given, root=pusht_like)
    assert any(said in line for line in found.changed), found.changed
    config = compose(found.overrides)
    assert {key: look_up(config, key) for key in expected} == expected
    with pytest.raises(InputError, match="--strict: this contradicts itself") as refused:
        read(*given, "--strict", root=pusht_like)
    assert said in str(refused.value)


def test_what_took_no_effect_in_the_first_getiaction_is_said(pusht_like: Path) -> None:
    found = read("--model.scheduler_warmup_steps=7", "--strict", root=pusht_like)
    assert "in effect here, only read by the first GetiAction: scheduler_warmup_steps" in found.notes


def test_windows_that_fit_are_no_contradiction(pusht_like: Path) -> None:
    windows = {"observation.image": [-0.1, 0.0], "observation.state": [-0.1, 0.0]}
    windows["action"] = [round(0.1 * step, 1) for step in range(-1, 15)]
    assert read(f"--data.delta_timestamps={json.dumps(windows)}", "--strict", root=pusht_like).changed == []


def test_data_without_pictures_need_no_backbone(make_dataset: Callable[..., Path]) -> None:
    found = read("--model.vision_backbone=resnet18", "--strict", root=make_dataset(cameras=()))
    assert "model.init_args.vision_backbone: the dataset has no pictures" in found.left_out
    assert compose(found.overrides).backbone["_target_"] is None


# --- the commands -----------------------------------------------------------------------------------------------------

TINY = """
model:
  class_path: getiaction.policies.lerobot.diffusion.Diffusion
  init_args:
    horizon: 10
    down_dims: [16, 32]
    diffusion_step_embed_dim: 16
    num_train_timesteps: 20
    scheduler_warmup_steps: 1
data:
  class_path: getiaction.data.lerobot.LeRobotDataModule
  init_args:
    repo_id: lerobot/pusht
    train_batch_size: 4
    data_format: lerobot
trainer:
  max_epochs: 100
  accelerator: cpu
  devices: 1
"""


@pytest.fixture(scope="session")
def states_only(make_dataset: Callable[..., Path]) -> Path:
    """Return a small dataset of PushT's states, without pictures: trains in a moment."""
    return make_dataset(lengths=(31, 29, 30), cameras=(), state_dim=2, action_dim=2, fps=10)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run("-m", "getiaction.cli", *arguments, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_fit_validate_and_test(states_only: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    file = ["--config", "tiny.yaml", "--data.root", str(states_only)]
    steps = ["--trainer.max_steps", "2", "--getiaction.output_dir", "one"]
    cold = [sys.executable, "-m", "getiaction.cli", "fit", *file, *steps]
    fitted = subprocess.run(cold, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert fitted.returncode == 0, fitted.stderr
    assert (
        "changed: horizon 10 -> 12: the U-Net halves time once, and LeRobot opens multiples of 4 only" in fitted.stdout
    )
    assert "left out: data.init_args.data_format: batches have one format here" in fitted.stdout
    shown = next(line for line in fitted.stdout.splitlines() if line.startswith("the same here: "))
    same = shlex.split(shown.removeprefix("the same here: python -m getiaction.train "))
    trained = run(tmp_path, "train", *["output_dir=two" if one.startswith("output_dir") else one for one in same])
    assert trained.returncode == 0, trained.stderr
    name = "checkpoints/last/pretrained_model/model.safetensors"
    one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert yaml.safe_load((tmp_path / "one/config.yaml").read_text())["name"] == "tiny"

    validated = run(tmp_path, "validate", *file, "--ckpt_path", "one")
    assert validated.returncode == 0, validated.stderr
    metrics = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    measured = next(line for line in metrics if "val_loss" in line)
    expected = [f"{name} {measured[name]:.4f}" for name in ("val_loss", "val_action_error")]
    assert validated.stdout.splitlines()[-2:] == expected

    (tmp_path / "other.yaml").write_text(TINY)
    other = ["--config", "other.yaml", "--data.root", str(states_only), "--trainer.max_steps=3"]
    resumed = run(tmp_path, "fit", *other, "--ckpt_path", "one/checkpoints/last")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "one/checkpoints/000003").exists()

    rolled = [*file, "--ckpt_path", "one", "--data.num_rollouts_test=2", "--data.max_episode_steps=5"]
    tested = run(tmp_path, "test", *rolled)
    assert tested.returncode == 0, tested.stderr
    assert "2 episodes: score A" in tested.stdout


def test_mistakes_end_with_2_and_name_the_keys_of_the_file(states_only: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    file = ["--config", "tiny.yaml", "--data.root", str(states_only)]
    for arguments, said in {
        ("fit", *file, "--model.kernel_size=4"): "(unet.kernel_size is model.init_args.kernel_size)",
        ("validate", *file): "validate needs --ckpt_path",
        ("fit", *file, "--strict"): "--strict: this contradicts itself",
    }.items():
        done = run(tmp_path, *arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()
    printed = run(tmp_path, "fit", *file, "--model.horizon=8", "--print_config")
    assert yaml.safe_load(printed.stdout)["model"]["init_args"]["horizon"] == 8
    helped = run(tmp_path, "fit", "--help")
    assert "spatial_softmax_num_keypoints" in helped.stdout
