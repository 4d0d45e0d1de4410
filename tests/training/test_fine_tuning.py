"""`training.init_from`: a run starts from the weights of a policy, of ours or LeRobot's, or says why it cannot."""

from __future__ import annotations

import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composing import compose
from safetensors.torch import load_file

from getiaction.config.resume import resumed_config
from getiaction.errors import InputError
from getiaction.interop.layout import EXTRA, WEIGHTS
from getiaction.interop.lerobot import load_policy


@pytest.fixture(scope="module")
def base(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained run."""
    folder = tmp_path_factory.mktemp("base")
    tiny.train(folder)
    return folder


def start_weights(tiny: Any, folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in tiny.trainer(folder, *overrides).policy.state_dict().items()}


def test_a_run_starts_from_the_weights_of_a_run(tiny: Any, base: Path, tmp_path: Path) -> None:
    started = start_weights(tiny, tmp_path / "run", f"training.init_from='{base}'")
    saved = load_file(base / "checkpoints/last/pretrained_model" / WEIGHTS)
    assert all(torch.equal(started[key], saved[key]) for key in saved)
    drawn = start_weights(tiny, tmp_path / "other")
    assert any(not torch.equal(drawn[key], saved[key]) for key in saved)


def test_it_starts_from_a_policy_of_lerobots_with_the_overrides_that_the_message_names(
    tiny: Any, keypoints_run: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(keypoints_run / "checkpoints/last/pretrained_model", tmp_path / "policy")
    (source / EXTRA).unlink()
    demo = compose(["dataset=pusht_demo_keypoints"]).dataset
    seen = ",".join(demo.observations or [])
    data = [f"dataset.root='{demo.root}'", "dataset.episodes=[0,1,2]", f"dataset.observations=[{seen}]"]
    more = [*data, f"training.init_from='{source}'"]
    with pytest.raises(InputError, match="another policy than this config builds") as refused:
        tiny.train(tmp_path / "run", *more)
    named = shlex.split(str(refused.value).splitlines()[-1])
    assert "unet.kernel_size=5" in named
    started = start_weights(tiny, tmp_path / "run", *more, *named)
    saved = load_file(source / WEIGHTS)
    assert all(torch.equal(started[key], saved[key]) for key in saved)


def test_training_goes_on_from_there_and_resumes_without_the_source(
    tiny: Any, base: Path, tmp_path: Path, helpers: Any
) -> None:
    source = shutil.copytree(base, tmp_path / "source", symlinks=True)
    tiny.train(tmp_path / "whole", f"training.init_from='{source}'")
    tiny.train(tmp_path / "half", f"training.init_from='{source}'")
    helpers.remove_checkpoint(tmp_path / "half", 4)
    shutil.rmtree(source)
    tiny.resume(tmp_path / "half")
    helpers.assert_same_bits(tmp_path / "whole", tmp_path / "half", 4)


def test_the_statistics_are_those_of_the_runs_own_data(tiny: Any, base: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "run", f"training.init_from='{base}'", "dataset.val_fraction=0")
    ours, before = trainer.policy.normalizer.statistics, load_policy(base).normalizer.statistics
    assert any(not torch.equal(ours[key][name], before[key][name]) for key in ours for name in ours[key])


MISFITS = {
    "unet.down_dims=[16,64]": r"another policy than this config builds.*\n.*unet\.down_dims='\[16,32\]'",
    "policy.n_obs_steps=1": r"policy\.n_obs_steps=2",
    "scheduler.prediction_type=sample": r"scheduler\.prediction_type=epsilon",
    "policy.normalization.action=mean_std": r"policy\.normalization\.action=min_max",
    "dataset.observations=[observation.state,observation.image]": "sees and does observation.state 2, action 2; with",
}


@pytest.mark.parametrize("override", MISFITS)
def test_another_policy_is_refused_with_the_overrides_that_make_it_the_same(
    tiny: Any, base: Path, tmp_path: Path, override: str
) -> None:
    more = ["backbone=resnet18", "backbone.crop_shape=[40,40]"] if "image" in override else []
    with pytest.raises(InputError, match=MISFITS[override]):
        tiny.train(tmp_path / "run", f"training.init_from='{base}'", override, *more)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_may_differ_is_warned_of(tiny: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    changed = ("policy.n_action_steps=4", "scheduler=dpm_solver")
    tiny.train(tmp_path / "run", f"training.init_from='{base}'", *changed)
    assert "was made with policy.n_action_steps=8, now it is 4" in caplog.text
    assert "was made with scheduler.clip_sample=true, which there is none of here" in caplog.text
    assert f"starting from the weights of {base / 'checkpoints/last/pretrained_model'}" in caplog.text


def test_a_policy_that_is_not_there_is_named(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.init_from=/nowhere is no folder: give a run folder"):
        tiny.train(tmp_path / "run", "training.init_from=/nowhere")


def test_a_run_of_a_version_without_this_key_resumes(tiny: Any, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "old", symlinks=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["training"]["init_from"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert resumed_config(compose([]), [], folder).training.init_from is None
