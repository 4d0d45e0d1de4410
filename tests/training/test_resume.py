"""Interrupted and resumed equals uninterrupted: real processes, real signals, the same bits."""

from __future__ import annotations

import logging
import os
import random
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from getiaction.config.compose import compose
from getiaction.config.resume import resumed_config
from getiaction.errors import InputError
from getiaction.training.metrics import read_metrics

# An epoch has 19 samples, a step 8 in two micro-batches: every stop is in the middle of an epoch.
LONG = ("training.gradient_accumulation_steps=2", "training.max_steps=120", "training.save_every=4", "seed=3")
PICTURES = ("training.gradient_accumulation_steps=2", "training.max_steps=8", "training.save_every=2", "seed=3")


@pytest.fixture(scope="module")
def uninterrupted(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of `LONG` that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny.fit(folder, *LONG)
    return folder


def assert_same_run(helpers: Any, folder: Path, uninterrupted: Path) -> None:
    """Compare weights, optimiser and schedule bit by bit, and the metrics of each step."""
    last = max(helpers.steps_saved(uninterrupted))
    helpers.assert_same_bits(folder, uninterrupted, step=last)
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == list(range(1, last + 1))
    assert helpers.losses(folder) == helpers.losses(uninterrupted)
    assert validations(folder) == validations(uninterrupted)


def validations(folder: Path) -> list[tuple[int, float, float]]:
    lines = [line for line in read_metrics(folder) if "val_loss" in line]
    return [(line["step"], line["val_loss"], line["val_action_error"]) for line in lines]


# --- killed -----------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment(tiny: Any, helpers: Any, tmp_path: Path, uninterrupted: Path) -> None:
    folder, draw = tmp_path / "run", random.Random(0)
    process = tiny.start(folder, *LONG)
    helpers.wait_for_checkpoint(folder, process)
    time.sleep(draw.uniform(0, 0.3))
    assert helpers.kill(process, signal.SIGKILL) == -signal.SIGKILL
    saved = max(helpers.steps_saved(folder))
    process = tiny.start_command(folder, f"training.resume={folder}")
    helpers.wait_for_checkpoint(folder, process, after=saved + draw.randrange(20))
    assert helpers.kill(process, signal.SIGKILL) == -signal.SIGKILL
    assert max(helpers.steps_saved(folder)) < 120
    tiny.resume(folder)
    assert_same_run(helpers, folder, uninterrupted)


def test_killed_while_a_checkpoint_is_being_written(
    tiny: Any, helpers: Any, tmp_path: Path, uninterrupted: Path
) -> None:
    folder = tmp_path / "run"
    process = tiny.start(folder, *LONG)
    helpers.wait_for_checkpoint(folder, process)
    helpers.wait_until(lambda: any((folder / "checkpoints").glob(".writing-*/*")), process, folder)
    helpers.kill(process, signal.SIGKILL)
    (folder / "checkpoints/.writing-killed/training_state").mkdir(parents=True)  # if the kill came a moment too late
    tiny.resume(folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"000112", "000116", "000120", "last"}
    assert_same_run(helpers, folder, uninterrupted)


def test_killed_with_pictures_and_batch_norm(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    more = (*helpers.WITH_PICTURES, "backbone.norm=batch", "backbone.crop_is_random=true", *PICTURES)
    tiny.fit(tmp_path / "uninterrupted", *more)
    folder = tmp_path / "run"
    process = tiny.start(folder, *more)
    helpers.wait_for_checkpoint(folder, process)
    time.sleep(random.Random(0).uniform(0, 0.5))
    assert helpers.kill(process, signal.SIGKILL) == -signal.SIGKILL
    tiny.resume(folder)
    assert_same_run(helpers, folder, tmp_path / "uninterrupted")


# --- asked to stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_prints_how_to_go_on(
    tiny: Any, helpers: Any, tmp_path: Path, uninterrupted: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "run"
    process = tiny.start(folder, *LONG, "training.save_every=100")
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 7, process, folder)
    assert helpers.kill(process, number) == code
    assert helpers.steps_saved(folder) == [len(helpers.losses(folder))]
    assert "Traceback" not in helpers.said(folder)
    (command,) = re.findall(r"to go on: python -m getiaction\.train (.*)", helpers.said(folder))
    assert helpers.finish(tiny.start_command(folder, *shlex.split(command))) == 0
    assert_same_run(helpers, folder, uninterrupted)


def test_a_second_interrupt_ends_at_once(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = tiny.start(folder, *LONG, "training.save_every=3")
    helpers.wait_for_checkpoint(folder, process)
    while process.poll() is None:
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.001)
    assert process.returncode != 0
    saved = helpers.steps_saved(folder)
    assert saved
    assert saved[-1] < 120


def test_stopping_twice_at_the_same_step_keeps_the_checkpoint(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "training.save_every=2", "training.max_steps=6")
    ask = trainer.store.save

    def save_and_ask(*args: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)  # arrives while the checkpoint of this step is written
        return ask(*args)

    trainer.store.save = save_and_ask
    with pytest.raises(SystemExit) as stopped:
        trainer.fit()
    assert stopped.value.code == 143
    assert helpers.steps_saved(tmp_path) == [2]
    assert trainer.store.newest().name == "000002"


def test_handlers_are_given_back(tiny: Any, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    tiny.fit(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# --- which run, which checkpoint --------------------------------------------------------------------------------------


def test_true_takes_the_newest_run(tiny: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    newest = Path("outputs/pusht_cpu/new")
    tiny.train(newest, "training.max_steps=2")
    for age, name in enumerate(("pusht_cpu/old", "default/older"), start=1):
        (Path("outputs") / name / "checkpoints").mkdir(parents=True)
        os.utime(Path("outputs") / name, (time.time() - 1000 * age,) * 2)
    Path("outputs/pusht_cpu/newer_without_a_checkpoint").mkdir()
    assert Path(compose(["+preset=pusht_cpu", "training.resume=true"]).output_dir) == newest
    assert Path(compose(["training.resume=true"]).output_dir) == newest
    tiny.resume(newest, "training.max_steps=4")
    assert helpers.steps_saved(newest) == [2, 4]


@pytest.mark.parametrize("resume", ["true", "outputs/pusht_cpu/nothing"])
def test_nothing_to_resume_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r"training\.resume=") as caught:
        compose(["+preset=pusht_cpu", f"training.resume={resume}"])
    assert isinstance(caught.value, InputError)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip_a_byte])
@pytest.mark.parametrize("part", ["pretrained_model", "training_state"])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(
    tiny: Any,
    helpers: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    part: str,
) -> None:
    tiny.train(tmp_path / "run", "training.max_steps=6")
    tiny.fit(tmp_path / "uninterrupted", "training.max_steps=6")
    damage(tmp_path / "run/checkpoints/000006" / part / "model.safetensors")
    caplog.set_level(logging.INFO)
    tiny.resume(tmp_path / "run")
    assert len([line for line in caplog.messages if "000006 is damaged" in line]) == 1
    assert any("at step 4 of 6" in line for line in caplog.messages)
    assert_same_run(helpers, tmp_path / "run", tmp_path / "uninterrupted")


# --- what may change --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two steps, to look at, not to go on with."""
    folder = tmp_path_factory.mktemp("stopped")
    tiny.train(folder, "training.max_steps=2")
    return folder


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1",
        "optimizer=adam",
        "seed=5",
        "policy.horizon=8",
        "unet=large",
        "dataset.episodes=[0]",
        "ema.enabled=false",
        "lr_scheduler.name=linear",
    ],
)
def test_what_would_change_the_run_is_refused(tiny: Any, stopped: Path, override: str) -> None:
    with pytest.raises(InputError, match=re.escape(override)) as caught:
        tiny.resumed_config(stopped, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("tracker=tensorboard", ("tracker", "name"), "tensorboard"),
        ("training.log_every=7", ("training", "log_every"), 7),
        ("training.max_steps=99", ("training", "max_steps"), 99),
        ("training.save_every=null", ("training", "save_every"), None),
        ("hardware.num_threads=1", ("hardware", "num_threads"), 1),
        ("validation.every=3", ("validation", "every"), 3),
    ],
)
def test_what_leaves_the_run_as_it_is_may_change(
    tiny: Any, stopped: Path, override: str, key: tuple[str, str], value: object
) -> None:
    config = tiny.resumed_config(stopped, override)
    assert getattr(getattr(config, key[0]), key[1]) == value
    assert config.optimizer["lr"] == 1e-3
    assert config.training.batch_size == 4


@pytest.mark.parametrize("override", ["training.batch_size=8", "training.gradient_accumulation_steps=2"])
def test_another_global_batch_is_refused(tiny: Any, stopped: Path, override: str) -> None:
    with pytest.raises(InputError, match="the run has a global batch of 4, now it is"):
        tiny.resume(stopped, override, "training.max_steps=3")


def test_the_same_global_batch_may_be_split_otherwise(tiny: Any, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    split = ("training.batch_size=2", "training.gradient_accumulation_steps=2")
    assert tiny.resume(folder, *split, "training.max_steps=3")["loss"] > 0


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("optimizer", "os.system"),
        ("scheduler", "getiaction.config.launch.run_and_forward_signals"),
        ("mirror", "torch.hub.load"),
    ],
)
def test_a_config_of_somebody_elses_runs_nothing_of_theirs(
    stopped: Path, tmp_path: Path, key: str, target: str
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content[key]["_target_"] = target
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    overrides = [f"training.resume='{folder}'"]
    with pytest.raises(InputError, match=f"would run {key}._target_={target}, which is not ours"):
        resumed_config(compose(overrides), overrides, folder)
    named = [*overrides, f"{key}._target_={target}"]
    assert getattr(resumed_config(compose(named), named, folder), key)["_target_"] == target


def test_repeating_the_whole_command_is_accepted(tiny: Any, stopped: Path) -> None:
    config = tiny.resumed_config(stopped, *tiny.overrides("training.max_steps=2"))
    saved = yaml.safe_load((stopped / "config.yaml").read_text())
    assert config.optimizer == saved["optimizer"]
    assert config.training.max_steps == 2


def test_the_command_refuses_with_one_message(tiny: Any, helpers: Any, stopped: Path) -> None:
    process = tiny.start_command(stopped, f"training.resume={stopped}", "optimizer.lr=1")
    assert helpers.finish(process) == 2
    lines = [line for line in helpers.said(stopped).splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: optimizer.lr=1 cannot change")
    assert helpers.steps_saved(stopped) == [2]


# --- other ends -------------------------------------------------------------------------------------------------------


def test_a_finished_run_resumes_to_nothing(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.train(tmp_path)
    before = helpers.losses(tmp_path)
    tiny.resume(tmp_path)
    assert helpers.losses(tmp_path) == before
    assert helpers.steps_saved(tmp_path) == [2, 4]


def test_a_longer_run_stays_longer_when_it_is_interrupted_again(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.train(tmp_path)
    tiny.resume(tmp_path, "training.max_steps=8")
    helpers.remove_checkpoint(tmp_path, 8)  # as if it had been killed at step 7
    tiny.resume(tmp_path)
    assert helpers.steps_saved(tmp_path)[-1] == 8


def test_a_run_of_before_there_were_mirrors_goes_on_without(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.train(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del config["mirror"], config["training"]["observation_noise"], config["policy"]["loss_weighting"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    more = ("training.observation_noise=0.1", "policy.loss_weighting=min_snr")
    now = compose(["+preset=pusht_laptop", *more, f"training.resume={tmp_path}"])
    assert now.mirror["_target_"] is not None
    assert now.policy.loss_weighting == "min_snr"
    resumed = resumed_config(now, [f"training.resume={tmp_path}"], tmp_path)
    assert resumed.mirror["_target_"] is None
    assert resumed.training.observation_noise == 0
    assert resumed.policy.loss_weighting == "none"


def test_a_line_of_metrics_that_was_cut_short_is_written_again(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.train(tmp_path / "run", "training.max_steps=6")
    tiny.fit(tmp_path / "uninterrupted", "training.max_steps=6")
    helpers.remove_checkpoint(tmp_path / "run", 6)
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    tiny.resume(tmp_path / "run")
    assert_same_run(helpers, tmp_path / "run", tmp_path / "uninterrupted")
    assert all(line.endswith("}") for line in metrics.read_text().splitlines())


def test_lines_between_two_log_steps_are_whole_after_a_resume(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    more = ("training.max_steps=9", "training.log_every=3", "training.save_every=4", "validation.every=4")
    tiny.fit(tmp_path / "uninterrupted", *more)
    tiny.train(tmp_path / "run", *more)
    helpers.remove_checkpoint(tmp_path / "run", 9)  # back to step 8, between the lines of 6 and 9
    tiny.resume(tmp_path / "run")
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == [3, 6, 9]
    assert validations(tmp_path / "run") == validations(tmp_path / "uninterrupted")
    helpers.assert_same_bits(tmp_path / "run", tmp_path / "uninterrupted", step=9)
