"""A checkpoint that is written while training goes on: what it holds, when it is there, what a failure becomes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch

from getiaction.errors import TrainingError
from getiaction.training import background, loop
from getiaction.training.background import Background, policy_on_host, state_on_host
from getiaction.training.checkpoint import CheckpointStore, find_damage
from getiaction.training.metrics import read_metrics
from getiaction.training.ranks import Watchdog


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


def test_a_failure_ends_the_run_at_the_next_step(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = tiny.trainer(tmp_path, "training.max_steps=100")
    trainer.saves_aside = True
    monkeypatch.setattr(trainer.store, "write_policy", fail)
    monkeypatch.setattr(trainer, "_optimise", waiting_before(trainer, step=2))
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert trainer.step == 3
    assert not list(tmp_path.glob("checkpoints/*"))


def waiting_before(trainer: loop.Trainer, *, step: int) -> Callable[..., None]:
    """Return `_optimise`, which before this step waits until all is written, whatever comes of it."""
    optimise = trainer._optimise

    def wait_and_optimise(batches: Any) -> None:
        if trainer.step == step:
            futures.wait([trainer.background._running])
        optimise(batches)

    return wait_and_optimise


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


def test_the_error_of_a_loss_waits_for_the_checkpoint_that_is_on_its_way(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.trainer(tmp_path, "training.save_every=1")
    trainer.saves_aside = True
    save, optimise, saved = trainer.store.save, trainer._optimise, threading.Event()

    def save_late(*arguments: Any) -> None:
        assert saved.wait(60)
        time.sleep(0.3)  # nobody reads the folder before
        save(*arguments)

    def break_and_optimise(batches: Any) -> None:
        if trainer.step == 1:
            next(trainer.policy.parameters()).data.fill_(float("nan"))
            saved.set()
        optimise(batches)

    monkeypatch.setattr(trainer.store, "save", save_late)
    monkeypatch.setattr(trainer, "_optimise", break_and_optimise)
    with pytest.raises(TrainingError, match="The last good checkpoint is step 1"):
        trainer.fit()


def test_the_watchdog_looks_away_from_every_wait(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, seen = [False], []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: watched.append(True))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: watched.append(False))
    wait = Background.wait
    monkeypatch.setattr(Background, "wait", lambda aside: (seen.append(watched[-1]), wait(aside))[1])
    trainer = tiny.trainer(tmp_path)
    trainer.watchdog, trainer.saves_aside = Watchdog(60), True
    trainer.fit()
    assert True in watched
    assert set(seen) == {False}


ASIDE = """
import threading, time, torch
from getiaction.training.checkpoint import CheckpointStore
from getiaction.training.loop import Trainer

fit, save = Trainer.fit, CheckpointStore.save


def fit_aside(trainer):
    trainer.saves_aside = True
    return fit(trainer)


def save_slowly(store, *saved):
    time.sleep(0.5)  # for some steps, and the end
    print("saved in", threading.current_thread().name, flush=True)
    return save(store, *saved)


Trainer.fit, CheckpointStore.save = fit_aside, save_slowly


class Adam(torch.optim.Adam):
    pass
"""


def test_processes_wait_for_what_one_of_them_saves_aside(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    (tmp_path / "aside.py").write_text(ASIDE)  # where the runs are started
    two = ("hardware.num_processes=2", "hardware.num_threads=1", "training.max_steps=6")
    process = tiny.start(tmp_path / "aside", *two, "optimizer._target_=aside.Adam")
    assert helpers.finish(process) == 0, helpers.said(tmp_path / "aside")
    assert helpers.said(tmp_path / "aside").count("saved in saving") == 3
    process = tiny.start(tmp_path / "waiting", *two, "optimizer._target_=torch.optim.Adam")
    assert helpers.finish(process) == 0, helpers.said(tmp_path / "waiting")
    assert helpers.steps_saved(tmp_path / "aside") == [2, 4, 6]
    for step in (2, 4, 6):
        assert find_damage(tmp_path / "aside/checkpoints" / f"{step:06d}") is None
        one, other = (helpers.final_state(tmp_path / name, step) for name in ("aside", "waiting"))
        assert one.keys() == other.keys()
        assert not [key for key, value in one.items() if not torch.equal(value, other[key])]
    assert helpers.losses(tmp_path / "aside") == helpers.losses(tmp_path / "waiting")


def test_a_signal_to_processes_ends_after_what_is_saved_aside(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    (tmp_path / "aside.py").write_text(ASIDE)
    two = ("hardware.num_processes=2", "hardware.num_threads=1", "training.max_steps=600", "training.save_every=3")
    folder = tmp_path / "run"
    process = tiny.start(folder, *two, "optimizer._target_=aside.Adam", "training.keep_checkpoints=null")
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 3, process, folder)  # the first is on its way
    assert helpers.kill(process, signal.SIGTERM) == 143
    assert "saved in saving" in helpers.said(folder)
    last = helpers.steps_saved(folder)[-1]
    assert last == read_metrics(folder)[-1]["step"] < 600
    assert all(find_damage(path) is None for path in folder.glob("checkpoints/[0-9]*"))


def test_one_call_at_a_time_in_order_and_errors_come_out() -> None:
    running, seen = threading.Lock(), []

    def work(number: int) -> None:
        assert running.acquire(blocking=False), "two at once"
        time.sleep(0.02)
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
        aside.check()
        aside.start(work, 4)
    assert seen == [0, 1, 2, 4]


def test_ctrl_c_does_not_leave_a_call_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, interrupts = threading.Event(), [KeyboardInterrupt, KeyboardInterrupt]
    wait = Background.wait

    def interrupted(aside: Background) -> None:
        if interrupts:
            raise interrupts.pop()
        ended.set()
        wait(aside)

    def work() -> None:
        assert ended.wait(60)

    with Background() as aside:
        aside.start(work)
        monkeypatch.setattr(Background, "wait", interrupted)
    assert aside._running is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_run_saves_aside_what_one_that_waits_saves(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    for name in ("aside", "waiting"):
        trainer = tiny.trainer(
            tmp_path / name,
            "hardware.device=cuda",
            "training.max_steps=40",
            "training.save_every=10",
            "training.keep_checkpoints=4",
        )
        assert trainer.saves_aside
        trainer.saves_aside = name == "aside"
        trainer.fit()
    for step in (10, 20, 30, 40):
        helpers.assert_same_bits(tmp_path / "aside", tmp_path / "waiting", step=step)
    policy, state = policy_on_host(trainer.best), state_on_host(trainer._state())
    kept = [*policy.parameters(), *policy.buffers(), *background.tensors_of(state)]
    assert {tensor.device.type for tensor in kept} == {"cpu"}
