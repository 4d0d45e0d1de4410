"""A checkpoint that is written while training goes on: what it holds, when it is there, what a failure becomes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from getiaction.errors import TrainingError
from getiaction.training import background, loop
from getiaction.training.background import Background, policy_on_host, state_on_host
from getiaction.training.checkpoint import CheckpointStore, find_damage


def test_a_checkpoint_holds_its_step_though_training_goes_on(
    tiny: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = threading.Event()
    save, optimise = CheckpointStore.save, loop.Trainer._optimise

    def save_late(store: CheckpointStore, *saved: Any) -> Path:
        assert trained.wait(60), "training stood still"
        return save(store, *saved)

    def optimise_and_tell(trainer: loop.Trainer, batches: Any) -> None:
        optimise(trainer, batches)
        if trainer.step == 3:  # after the checkpoint of step 2
            trained.set()

    tiny.fit(tmp_path / "plain")
    monkeypatch.setattr(CheckpointStore, "save", save_late)
    monkeypatch.setattr(loop.Trainer, "_optimise", optimise_and_tell)
    trainer = tiny.trainer(tmp_path / "aside")
    trainer.saves_aside = True
    trainer.fit()
    for step in (2, 4):
        helpers.assert_same_bits(tmp_path / "aside", tmp_path / "plain", step=step)
    assert helpers.losses(tmp_path / "aside") == helpers.losses(tmp_path / "plain")


@pytest.mark.parametrize("ema", ["true", "false"])
def test_copies_are_equal_and_share_nothing(tiny: Any, tmp_path: Path, ema: str) -> None:
    trainer = tiny.trainer(tmp_path, f"ema.enabled={ema}", "training.save_every=null")
    trainer.fit()
    state = trainer._state()
    policy, copied = policy_on_host(trainer.best), state_on_host(state)
    pairs = [
        *zip(trainer.best.state_dict().values(), policy.state_dict().values(), strict=True),
        *((value, copied.weights[key]) for key, value in state.weights.items()),
        *(
            (value, copied.optimizer["state"][index][name])
            for index, entry in state.optimizer["state"].items()
            for name, value in entry.items()
        ),
    ]
    assert len(pairs) > 100
    assert all(torch.equal(one, other) and one.data_ptr() != other.data_ptr() for one, other in pairs if one.numel())
    assert (copied.step, copied.data, copied.lr_scheduler) == (state.step, state.data, state.lr_scheduler)
    assert copied.optimizer["param_groups"] == state.optimizer["param_groups"]


def test_a_failure_ends_the_run_with_what_it_says(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = tiny.trainer(tmp_path)
    trainer.saves_aside = True
    monkeypatch.setattr(trainer.store, "write_policy", fail)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert not list(tmp_path.glob("checkpoints/*"))


def test_without_room_on_the_host_training_waits(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    save = CheckpointStore.save
    monkeypatch.setattr(
        CheckpointStore, "save", lambda *saved: (threads.append(threading.current_thread().name), save(*saved))[1]
    )
    monkeypatch.setattr(background, "SPARE", 1e9)
    trainer = tiny.trainer(tmp_path)
    trainer.saves_aside = True
    trainer.fit()
    assert threads == [threading.main_thread().name] * 2


def test_the_error_of_a_loss_names_the_checkpoint_that_was_on_its_way(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "optimizer.lr=1e30", "lr_scheduler.num_warmup_steps=0", "training.save_every=1")
    trainer.saves_aside = True
    with pytest.raises(TrainingError) as error:
        trainer.fit()
    kept = trainer.store.steps()
    assert (f"step {kept[-1]}" if kept else "No checkpoint") in str(error.value)


def test_one_call_at_a_time_in_order_and_errors_come_out() -> None:
    running, seen = threading.Lock(), []

    def work(number: int) -> None:
        assert running.acquire(blocking=False)
        seen.append(number)
        running.release()
        if number == 2:
            raise ValueError("two")

    with Background() as aside:
        for number in (0, 1, 2):
            aside.start(work, number)
        with pytest.raises(ValueError, match="two"):
            aside.start(work, 3)
        aside.wait()
        aside.start(work, 4)
    assert seen == [0, 1, 2, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_run_saves_aside_and_nothing_of_the_copy_is_on_the_device(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "hardware.device=cuda", "hardware.mixed_precision=no")
    assert trainer.saves_aside
    trainer.fit()
    policy, state = policy_on_host(trainer.best), state_on_host(trainer._state())
    kept = [*policy.parameters(), *policy.buffers(), *background.tensors_of(state)]
    assert {tensor.device.type for tensor in kept} == {"cpu"}
    assert [find_damage(tmp_path / "checkpoints" / f"{step:06d}") for step in (2, 4)] == [None, None]
