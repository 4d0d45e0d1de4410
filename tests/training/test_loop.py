"""The loop: what a step computes, what is logged, and when it stops."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from getiaction.config import placement, run
from getiaction.config import precision as precision_module
from getiaction.errors import TrainingError
from getiaction.interop.lerobot import load_policy
from getiaction.policy.fast import convolution, native, native_blocks, native_layers, native_pictures
from getiaction.training.metrics import read_metrics
from getiaction.training.ranks import Watchdog

LOG_COLUMNS = {"step", "time", "epoch", "samples", "loss", "lr", "samples_per_s", "data_wait", "memory_gb"}
VALIDATION_COLUMNS = {"step", "time", "val_loss", "val_action_error"}


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if "loss" in line]


def weights_of(folder: Path, kind: str = "training_state") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / kind / "model.safetensors")


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["states", "masked", "several draws, flow matching", "pictures"])
def test_two_small_batches_equal_one_large(tiny: Any, helpers: Any, tmp_path: Path, case: str) -> None:
    masked = ("policy.do_mask_loss_for_padding=true", "policy.drop_n_last_frames=0")
    several = ("training.noise_draws=3", "policy.loss_weighting=min_snr", "scheduler=flow_matching")
    more = {"states": (), "masked": masked, "pictures": helpers.WITH_PICTURES}.get(case, several)
    tiny.fit(tmp_path / "one", *more, "training.batch_size=8", "training.save_every=null")
    accumulated = ("training.batch_size=4", "training.gradient_accumulation_steps=2", "training.save_every=null")
    tiny.fit(tmp_path / "two", *more, *accumulated)
    assert helpers.losses(tmp_path / "two") == pytest.approx(helpers.losses(tmp_path / "one"), rel=1e-5)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    if (
        case != "pictures"
    ):  # AdamW's first steps turn rounding of tiny gradients into whole learning rates in a deep network
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        tiny.fit(tmp_path / name, f"seed={seed}")
    assert helpers.losses(tmp_path / "one") == helpers.losses(tmp_path / "two")
    assert all(
        a != b for a, b in zip(helpers.losses(tmp_path / "one"), helpers.losses(tmp_path / "other"), strict=True)
    )
    helpers.assert_same_bits(tmp_path / "one", tmp_path / "two", step=4)


def test_what_ran_before_in_the_process_changes_nothing(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "one")
    torch.manual_seed(123)
    torch.randn(1000)
    tiny.fit(tmp_path / "two")
    helpers.assert_same_bits(tmp_path / "one", tmp_path / "two", step=4)


def test_data_on_the_host_train_the_same(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    for where in ("device", "host"):
        tiny.fit(tmp_path / where, f"hardware.data_placement={where}")
    helpers.assert_same_bits(tmp_path / "device", tmp_path / "host", step=4)


def test_a_tiny_network_learns_its_data(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path, "training.max_steps=100", "training.save_every=null", "training.batch_size=16")
    curve = helpers.losses(tmp_path)
    assert sum(curve[-20:]) / 20 < 0.8 * sum(curve[:5]) / 5


# --- learning rate and length -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"])
def test_learning_rate_follows_diffusers(tiny: Any, tmp_path: Path, name: str) -> None:
    tiny.fit(tmp_path, f"lr_scheduler.name={name}", "training.max_steps=8", "training.save_every=null")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=8)
    expected = []
    for _ in range(8):
        optimizer.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    assert [line["lr"] for line in train_lines(tmp_path)] == expected
    assert expected[2] == pytest.approx(1e-3)


def test_warm_up_starts_at_zero(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "training.max_steps=1")
    before = {key: value.clone() for key, value in trainer.policy.named_parameters()}
    trainer.fit()
    assert all(torch.equal(before[key], value) for key, value in trainer.policy.named_parameters())


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(2, "null", 10), (2, 100, 10), (20, 3, 3), (1, "null", 5)],
    ids=["epochs only", "epochs first", "steps first", "rounded up"],
)
def test_epochs_become_steps_and_the_shorter_length_wins(
    tiny: Any, tmp_path: Path, epochs: int, steps: int | str, expected: int
) -> None:
    trainer = tiny.trainer(tmp_path, f"training.max_epochs={epochs}", f"training.max_steps={steps}")
    assert trainer.plan.epoch_samples == 19  # 32 frames in two episodes, less 7 at the end of each, 1 shorter: 10 + 9
    assert trainer.plan.max_steps == expected


# --- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False], ids=["averaged", "raw"])
def test_a_loss_that_is_not_finite_stops_the_run(tiny: Any, tmp_path: Path, ema: bool) -> None:
    diverging = (
        "optimizer.lr=1e30",
        "training.save_every=1",
        "training.max_steps=30",
        "training.keep_checkpoints=null",
    )
    with pytest.raises(TrainingError) as caught:
        tiny.fit(tmp_path, *diverging, f"ema.enabled={ema}", "training.log_every=5", "training.keep_checkpoints=null")
    message = str(caught.value)
    assert "the loss is nan" in message or "the loss is inf" in message
    assert "step " in message
    assert "samples [" in message
    assert "optimizer.lr=" in message
    assert "training.max_grad_norm=" in message
    assert "last good checkpoint" in message
    saved = list((tmp_path / "checkpoints").glob("[0-9]*"))
    assert saved
    for file in (file for path in saved for file in path.rglob("*.safetensors")):
        assert all(value.isfinite().all() for value in load_file(file).values()), file


def test_the_message_names_the_step_and_samples_that_broke(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "training.max_steps=9", "training.save_every=null", "training.log_every=9")

    def break_weights(optimizer: Any, *_: Any) -> None:
        steps = next(iter(optimizer.state.values()))["step"].item()
        if steps == 4:
            next(trainer.policy.parameters()).data.fill_(float("nan"))

    trainer.optimizer.optimizer.register_step_post_hook(break_weights)
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    assert "at step 5." in str(caught.value)
    assert f"{trainer.batches.ids(4)[:8].tolist()}" in str(caught.value)
    assert "No checkpoint was saved yet" in str(caught.value)


def test_weights_that_break_in_the_very_step_that_is_saved_are_not_saved(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "training.max_steps=4", "training.save_every=2")
    last = list(trainer.policy.parameters())[-1]

    def break_weights(optimizer: Any, *_: Any) -> None:
        if next(iter(optimizer.state.values()))["step"].item() == 4:
            last.data.fill_(float("inf"))

    trainer.optimizer.optimizer.register_step_post_hook(break_weights)
    with pytest.raises(TrainingError, match="last good checkpoint is step 2"):
        trainer.fit()
    assert trainer.store.steps() == [2]


def test_gradients_are_clipped(tiny: Any, tmp_path: Path) -> None:
    def norms(*more: str) -> list[float]:
        trainer, seen = tiny.trainer(tmp_path, "training.save_every=null", *more), []
        weights = list(trainer.policy.parameters())

        def measure(*_: Any) -> None:
            seen.append(
                torch.stack([weight.grad.norm() for weight in weights if weight.grad is not None]).norm().item()
            )

        trainer.optimizer.optimizer.register_step_pre_hook(measure)
        trainer.fit()
        return seen

    free, clipped = norms(), norms("training.max_grad_norm=0.01")
    assert len(free) == len(clipped) == 4
    assert min(free) > 0.02
    assert clipped == pytest.approx([0.01] * 4, rel=1e-3)


# --- precision --------------------------------------------------------------------------------------------------------


def test_bf16_trains_on_the_cpu(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "full", "training.max_steps=6")
    helpers.forget_precision()
    trainer = tiny.trainer(tmp_path / "half", "training.max_steps=6", "hardware.mixed_precision=bf16")
    trainer.fit()
    full, half = helpers.losses(tmp_path / "full"), helpers.losses(tmp_path / "half")
    assert half == pytest.approx(full, rel=0.1)
    assert half != full
    assert all(weight.dtype == torch.float32 for weight in trainer.policy.parameters())


@pytest.mark.parametrize("asked", ["auto", "fp16"])
def test_precision_that_the_cpu_lacks_falls_back_with_one_line(
    tiny: Any, tmp_path: Path, asked: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_module, "is_faster_in_bf16", lambda device: False)  # an older CPU
    caplog.set_level(logging.INFO)
    trainer = tiny.trainer(tmp_path, f"hardware.mixed_precision={asked}")
    assert trainer.accelerator.mixed_precision == "no"
    lines = [record.message for record in caplog.records if "precision" in record.message]
    assert len(lines) == 1
    assert asked in lines[0]
    assert "falls back" in lines[0]


def test_auto_precision_takes_bf16_where_the_cpu_multiplies_it(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_module, "is_faster_in_bf16", lambda device: device == "cpu")
    trainer = tiny.trainer(tmp_path, "hardware.mixed_precision=auto")
    assert trainer.accelerator.mixed_precision == "bf16"


WIDE = ("unet.down_dims=[16,264]", "training.batch_size=16", "lr_scheduler.num_warmup_steps=0")


@pytest.mark.parametrize("pictures", [False, True])
def test_taps_train_alike_and_resume_exactly(
    tiny: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: bool
) -> None:
    calls, more = list[str](), (*WIDE, *(helpers.WITH_PICTURES if pictures else ()))

    def watch(module: Any, name: str) -> None:
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: calls.append(name) or plain(*given))

    watch(convolution, "convolve_by_taps")
    watch(native_layers, "convolve_by_taps")
    watch(native_blocks, "run_block")
    watch(native_pictures, "convolve")
    tiny.fit(tmp_path / "library", *more, "hardware.convolutions=library")
    assert not calls
    folder = tmp_path / "taps"
    tiny.train(folder, *more, "hardware.convolutions=taps")
    assert "convolve_by_taps" in calls
    compiled = native.find_library() is not None
    assert ("run_block" in calls, "convolve" in calls) == (compiled, compiled and pictures)
    assert helpers.losses(folder) == pytest.approx(helpers.losses(tmp_path / "library"), rel=1e-3 if pictures else 1e-4)
    shutil.copytree(folder, tmp_path / "stopped", symlinks=True)
    helpers.remove_checkpoint(tmp_path / "stopped", 4)
    tiny.resume(tmp_path / "stopped")
    helpers.assert_same_bits(tmp_path / "stopped", folder, step=4)


def test_an_evaluation_in_training_acts_as_the_checkpoint_does(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, *WIDE, "hardware.convolutions=taps")
    trainer.fit()
    observations = {"observation.state": torch.rand(3, 2, 2) * 500}
    saved = load_policy(tmp_path).predict_action_chunk(observations, generator=torch.Generator().manual_seed(0))
    average = run.as_saved(trainer.ema.average)
    assert torch.equal(average.predict_action_chunk(observations, generator=torch.Generator().manual_seed(0)), saved)
    assert not next(trainer.policy.diffusion.unet.mid_modules.parameters()).is_contiguous()  # it goes on as it was


@pytest.mark.parametrize(
    ("overrides", "vendor", "by_taps"),
    [
        ((), "GenuineIntel", True),
        ((), "AuthenticAMD", True),
        ((), None, False),
        (("hardware.convolutions=library",), "GenuineIntel", False),
        (("hardware.convolutions=taps",), None, True),
        (("hardware.convolutions=taps", "hardware.mixed_precision=bf16"), "GenuineIntel", False),
    ],
)
def test_taps_are_taken_where_they_are_known_to_be_faster(
    overrides: tuple[str, ...],
    vendor: str | None,
    by_taps: bool,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "read_cpu", {"vendor_id": vendor}.get)
    trainer = tiny.trainer(tmp_path, *WIDE, *overrides)
    assert any(getattr(layer, "by_taps", False) for layer in trainer.policy.modules()) is by_taps


def test_one_process_can_train_in_one_precision_after_another(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    for number, precision in enumerate(("no", "bf16", "no")):  # a sweep: -m hardware.mixed_precision=no,bf16
        more = (f"hardware.mixed_precision='{precision}'", "training.max_steps=2")
        tiny.train(tmp_path / str(number), *more)
    first, half, again = (helpers.losses(tmp_path / str(number)) for number in range(3))
    assert half != first == again


# --- parts left out ---------------------------------------------------------------------------------------------------


def test_without_averaging_the_raw_weights_are_the_policy(tiny: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path, "ema.enabled=false")
    raw, policy = weights_of(tmp_path), weights_of(tmp_path, "pretrained_model")
    assert raw.keys() == policy.keys()
    assert all(torch.equal(value, policy[key]) for key, value in raw.items())


def test_without_held_out_episodes_there_is_no_validation(tiny: Any, tmp_path: Path, drawn: None) -> None:
    metrics = tiny.train(tmp_path, "dataset.val_fraction=0")
    assert set(metrics) == {"loss"}
    assert not [line for line in read_metrics(tmp_path) if "val_loss" in line]
    assert (tmp_path / "curves.png").exists()


def test_one_episode_trains_without_validation(tiny: Any, tmp_path: Path) -> None:
    assert set(tiny.fit(tmp_path, "dataset.episodes=[1]")) == {"loss"}


def test_a_run_folder_that_is_not_there_is_made(tiny: Any, tmp_path: Path) -> None:
    from getiaction.train import train

    folder = tmp_path / "new" / "run"
    train(tiny.config(), folder)
    assert (folder / "checkpoints" / "last").exists()


# --- validation and metrics -------------------------------------------------------------------------------------------


def test_validation_is_the_same_twice(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, *helpers.WITH_PICTURES)
    first, second = trainer.validator(trainer.best), trainer.validator(trainer.best)
    assert first == second
    assert set(first) == {"val_loss", "val_action_error"}


def test_validating_more_often_changes_nothing(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "seldom", "ema.enabled=false")
    tiny.fit(tmp_path / "often", "ema.enabled=false", "validation.every=1")
    helpers.assert_same_bits(tmp_path / "seldom", tmp_path / "often", step=4)


def test_training_continues_in_training_mode_after_validation(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "ema.enabled=false")
    trainer.policy.train()
    trainer.validator(trainer.policy)
    assert trainer.policy.training


def test_metrics_have_the_documented_columns(tiny: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path, "validation.every=2", "training.batch_size=5")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged, validated = ([line for line in lines if key in line] for key in ("loss", "val_loss"))
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert [line["step"] for line in validated] == [2, 4]
    assert all(set(line) == LOG_COLUMNS for line in logged)
    assert all(set(line) == VALIDATION_COLUMNS for line in validated)
    assert [line["samples"] for line in logged] == [5, 10, 15, 20]
    assert [line["epoch"] for line in logged] == [0.263, 0.526, 0.789, 1.053]  # of 19 samples
    assert all(0 <= line["data_wait"] <= 1 for line in logged)
    assert all(line["samples_per_s"] > 0 for line in logged)


def test_a_logged_loss_is_the_mean_since_the_line_before(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "each", "training.max_steps=8", "training.save_every=null")
    tiny.fit(tmp_path / "fourth", "training.max_steps=8", "training.save_every=null", "training.log_every=4")
    each = helpers.losses(tmp_path / "each")
    means = [sum(each[:4]) / 4, sum(each[4:]) / 4]
    assert helpers.losses(tmp_path / "fourth") == pytest.approx(means)


def test_saving_between_two_lines_takes_nothing_out_of_the_mean(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "unsaved", "training.max_steps=8", "training.save_every=null", "training.log_every=4")
    tiny.fit(tmp_path / "saved", "training.max_steps=8", "training.save_every=3", "training.log_every=4")
    assert helpers.losses(tmp_path / "saved") == helpers.losses(tmp_path / "unsaved")


def test_the_last_step_is_always_logged_validated_and_saved(tiny: Any, tmp_path: Path) -> None:
    more = ("training.max_steps=5", "training.log_every=3", "training.save_every=3", "validation.every=3")
    tiny.fit(tmp_path, *more)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [3, 5]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 5]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000003", "000005", "last"]


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_number(tiny: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny.train(tmp_path, "tracker=tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert {"loss", "lr", "samples_per_s", "val_loss"} <= set(read.Tags()["scalars"])
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4]
    logged = [line["loss"] for line in train_lines(tmp_path)]
    assert [event.value for event in read.Scalars("loss")] == pytest.approx(logged, rel=1e-6)


def test_wandb_without_a_key_goes_offline(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("WANDB_MODE", "")  # so that what the run sets is undone here
    monkeypatch.delenv("WANDB_MODE")
    try:
        tiny.train(tmp_path / "run", "tracker=wandb", "tracker.group=friday")
    finally:
        wandb.teardown()  # its service would live, and spin, for as long as this process
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (written,) = offline.glob("run-*.wandb")
    assert b"friday" in written.read_bytes()
    assert len(train_lines(tmp_path / "run")) == 4


def test_a_tracker_changes_nothing_in_the_run(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "local")
    tiny.train(tmp_path / "tensorboard", "tracker=tensorboard")
    helpers.assert_same_bits(tmp_path / "local", tmp_path / "tensorboard", step=4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_train_alike(tiny: Any, tmp_path: Path) -> None:
    small = ("training.max_steps=2", "unet.down_dims=[16]")
    plain = tiny.fit(tmp_path / "plain", *small)
    compiled = tiny.fit(tmp_path / "compiled", *small, "hardware.compile=true")
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    weights = "checkpoints/last/pretrained_model/model.safetensors"
    assert load_file(tmp_path / "compiled" / weights).keys() == load_file(tmp_path / "plain" / weights).keys()


def test_what_is_saved_is_not_saved_again(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation saves before it begins; the checkpoint of its step may be there already."""
    trainer, saved = tiny.trainer(tmp_path, "training.save_every=2"), []
    save = trainer.store.save
    monkeypatch.setattr(trainer.store, "save", lambda policy, state: saved.append(state.step) or save(policy, state))
    trainer.evaluate = lambda policy, step, last, stopping: {"score": 0.5}
    monkeypatch.setattr(trainer, "plan", replace(trainer.plan, evaluate_every=1, evaluate_last=True))
    trainer.fit()
    assert saved == [1, 2, 3, 4]


def test_the_watchdog_looks_away_while_others_wait(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and saving are one process's work, and may take longer than a step ever should."""
    watched, seen = [False], []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: watched.append(True))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: watched.append(False))
    trainer = tiny.trainer(tmp_path, "validation.every=2")
    trainer.watchdog = Watchdog(60)

    def watch(what: str, does: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append((what, watched[-1]))
            return does(*arguments)

        return call

    monkeypatch.setattr(trainer, "validator", watch("validating", trainer.validator))
    monkeypatch.setattr(trainer.store, "save", watch("saving", trainer.store.save))
    monkeypatch.setattr(trainer, "_optimise", watch("a step", trainer._optimise))
    trainer.fit()
    assert seen == [
        *(("a step", True), ("a step", True), ("validating", False), ("saving", False)),
        *(("a step", True), ("a step", True), ("validating", False), ("saving", False)),
    ]
    assert watched[-1] is False
