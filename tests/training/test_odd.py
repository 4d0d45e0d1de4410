"""Whole runs on what is small, strange or cannot be written: the right result, or one message before it starts."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm

from getiaction.config.overrides import as_override
from getiaction.data.batches import TrainingBatches
from getiaction.errors import InputError, TrainingError
from getiaction.training.metrics import read_metrics

SHAPE = {"cameras": ("observation.image",), "image_size": (48, 48), "state_dim": 2, "action_dim": 2, "fps": 10}


@pytest.fixture
def data(make_dataset) -> Callable[..., str]:
    """Return a function that records episodes of these lengths and returns the override that names them."""
    return lambda *lengths: f"dataset.root={make_dataset(lengths=lengths, **SHAPE)}"


# --- small data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [False, True], ids=["states", "pictures"])
def test_a_single_episode_trains_without_validation(
    data, tiny: Any, helpers: Any, tmp_path: Path, pictures: bool, drawn: None
) -> None:
    more = helpers.WITH_PICTURES if pictures else ()
    tiny.train(tmp_path / "run", data(20), *more)
    lines = read_metrics(tmp_path / "run")
    assert len(helpers.losses(tmp_path / "run")) == 4
    assert not [line for line in lines if "val_loss" in line]
    assert (tmp_path / "run/curves.png").exists()


@pytest.mark.parametrize("pictures", [False, True], ids=["states", "pictures"])
def test_one_frame_episodes_train_where_their_only_frame_is_a_sample(
    data, tiny: Any, helpers: Any, tmp_path: Path, pictures: bool
) -> None:
    more = helpers.WITH_PICTURES if pictures else ()
    tiny.train(tmp_path / "run", data(1, 1, 12, 1), "policy.drop_n_last_frames=0", *more)
    assert len(helpers.losses(tmp_path / "run")) == 4


def test_one_frame_episodes_give_no_samples_where_the_last_frames_are_dropped(data, tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "run", data(1, 20, 1), "dataset.val_episodes=[]")
    assert trainer.plan.epoch_samples == 20 - 7


def test_nothing_but_one_frame_episodes_is_refused_before_anything_is_written(data, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"none of the 2 episodes to train on of dataset .* is longer than policy\.drop_n_last_frames=7",
    ):
        tiny.train(tmp_path / "run", data(1, 1, 1))
    assert not list((tmp_path / "run").iterdir())


def test_equal_states_train(data, tiny: Any, helpers: Any, tmp_path: Path) -> None:
    """One frame has no range: normalising must not divide by it."""
    tiny.train(tmp_path / "run", data(1), "policy.drop_n_last_frames=0", "training.batch_size=2")
    assert all(0 < loss < 100 for loss in helpers.losses(tmp_path / "run"))


# --- strange paths ----------------------------------------------------------------------------------------------------

STRANGE = ["mit Leerzeichen, 日本語 ñ", "lr=1e-3,seed=2", "it's [a]{b}(c)", '#5 & 100% $HOME: say "hi"', "a:b;c"]


def run(*command: str, cwd: Path) -> str:
    done = warm.run("-m", *command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", STRANGE)
def test_a_run_may_lie_and_read_anywhere(name: str, tiny: Any, helpers: Any, tmp_path: Path) -> None:
    place = tmp_path / name
    shutil.copytree(tiny.root, place / "data")
    named = {"dataset.root": place / "data", "dataset.cache_dir": place / "cache", "output_dir": place / "run"}
    overrides = [shlex.split(as_override(key, str(value)))[0] for key, value in named.items()]
    tiny.train(place / "run", *helpers.WITH_PICTURES, "training.max_steps=2", *overrides[:2])
    again = shlex.split(as_override("training.resume", str(place / "run")))[0]
    config = tiny.resumed_config(place / "run", "training.max_steps=3")
    assert (config.training.resume, config.dataset.root) == (str(place / "run"), str(place / "data"))
    tiny.resume(place / "run", "training.max_steps=3")
    assert helpers.steps_saved(place / "run")[-1] == 3
    assert again.startswith("training.resume=")


@pytest.mark.parametrize("name", ["it's 日本, [a]=$5"])
def test_commands_go_on_and_evaluate_there(name: str, tiny: Any, helpers: Any, tmp_path: Path) -> None:
    place = tmp_path / name
    data, folder = shutil.copytree(tiny.root, place / "data"), place / "run"
    given = [shlex.split(as_override(*pair))[0] for pair in (("dataset.root", str(data)), ("output_dir", str(folder)))]
    two = ("hardware.num_processes=2", "hardware.num_threads=1", "training.batch_size=4")
    run("getiaction.train", *helpers.TINY, *given, *two, "training.max_steps=2", cwd=tmp_path)
    [resume, checkpoint] = [shlex.split(as_override(key, str(folder)))[0] for key in ("training.resume", "checkpoint")]
    alone = ("hardware.num_processes=1", "training.batch_size=8")
    run("getiaction.train", resume, "training.max_steps=4", *alone, cwd=tmp_path)
    assert helpers.steps_saved(folder)[-1] == 4
    acting = (
        "env=pusht",
        "env.max_steps=3",
        "num_workers=0",
        "videos=false",
        "episodes=2",
        "device=cpu",
        "num_threads=1",
    )
    where = shlex.split(as_override("output_dir", str(place / "evaluation")))[0]
    run("getiaction.evaluate", checkpoint, where, *acting, cwd=tmp_path)
    assert (place / "evaluation/evaluation.json").exists()


def test_the_command_that_goes_on_can_be_pasted(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    folder = tmp_path / "it's here, 日本"
    given = shlex.split(as_override("output_dir", str(folder)))[0]
    process = tiny.start_command(folder, *tiny.overrides(given, "training.max_steps=4000", "training.save_every=null"))
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 2, process, folder)
    process.terminate()
    assert helpers.finish(process) == 143
    [typed] = re.findall(r"to go on: (.*)", helpers.said(folder))
    length = max(helpers.steps_saved(folder)) + 1
    command = typed.replace("python", shlex.quote(sys.executable), 1) + f" training.max_steps={length}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert helpers.steps_saved(folder)[-1] == length


# --- caches that cannot be written ------------------------------------------------------------------------------------


def read_only(folder: Path) -> tuple[str, ...]:
    """Return what starts a command that sees `folder` mounted read-only; skip where that is forbidden."""
    quoted = shlex.quote(str(folder))
    mount = f'mount --bind {quoted} {quoted} && mount -o remount,ro,bind {quoted} && exec "$@"'
    launcher = ("unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh")
    allowed = shutil.which("unshare") and not subprocess.run([*launcher, "true"], capture_output=True).returncode
    if not allowed:
        pytest.skip("this machine lets nobody mount (unshare --mount --map-root-user)")
    return launcher


def test_a_read_only_cache_that_has_the_pictures_serves(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    more = (*helpers.WITH_PICTURES, f"dataset.cache_dir={shared}", "training.max_steps=2")
    tiny.train(tmp_path / "first", *more)
    process = tiny.start(tmp_path / "second", *more, launcher=(*read_only(shared), sys.executable))
    assert helpers.finish(process) == 0, helpers.said(tmp_path / "second")
    helpers.assert_same_bits(tmp_path / "first", tmp_path / "second", 2)


def test_a_read_only_cache_that_lacks_them_is_one_message(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    more = (*helpers.WITH_PICTURES, f"dataset.cache_dir={tmp_path / 'shared'}")
    launcher = (*read_only(tmp_path / "shared"), sys.executable)
    process = tiny.start(tmp_path / "run", *more, launcher=launcher)
    assert helpers.finish(process) == 2
    assert "Traceback" not in helpers.said(tmp_path / "run")
    assert f"the frame cache {tmp_path / 'shared'}/frames cannot be written" in helpers.said(tmp_path / "run")
    assert "set dataset.cache_dir=<folder>" in helpers.said(tmp_path / "run")


def test_data_that_are_gone_are_one_message_though_their_pictures_are_cached(
    tiny: Any, helpers: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny.root, tmp_path / "copy")
    more = (*helpers.WITH_PICTURES, f"dataset.root={copy}", f"dataset.cache_dir={tmp_path / 'cache'}")
    tiny.train(tmp_path / "run", *more, "training.max_steps=2")
    shutil.rmtree(copy)
    with pytest.raises(InputError, match=r"dataset\.root=.*copy does not exist"):
        tiny.resume(tmp_path / "run", "training.max_steps=3")
    [cached] = (tmp_path / "cache/frames").iterdir()
    tiny.resume(tmp_path / "run", "training.max_steps=3", f"dataset.root={cached}")  # the cache is a dataset itself
    assert helpers.steps_saved(tmp_path / "run")[-1] == 3


# --- runs that end badly ----------------------------------------------------------------------------------------------


def test_memory_that_runs_out_is_answered_with_what_helps(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingBatches, "step", lambda *_: torch.empty(10**16))
    with pytest.raises(TrainingError, match=r"cpu has no memory left(.|\n)*training\.batch_size=2 "):
        tiny.train(tmp_path / "run")


def test_weights_out_of_range_after_the_last_step_are_a_warning(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ("optimizer.lr=1e30", "lr_scheduler.name=constant", "lr_scheduler.num_warmup_steps=0")
    metrics = tiny.train(tmp_path / "run", *overrides, "training.max_steps=1", "ema.enabled=false")
    assert "warning: the validation loss at step 1 is nan: the weights are out of range" in caplog.text
    assert metrics["loss"] < 10
