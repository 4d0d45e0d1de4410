"""Rollouts during training: when, what they leave, and that they change nothing else."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import compose

from getiaction.config.checks import check_config
from getiaction.errors import InputError
from getiaction.interop.lerobot import load_policy
from getiaction.training.metrics import read_metrics

COLUMNS = {"score", "score_low", "score_high", "success", "success_low", "success_high"}
ROLLOUTS = (
    "policy.num_inference_steps=2",
    "env.max_steps=16",
    "evaluation.episodes=2",
    "evaluation.num_workers=0",
    "evaluation.videos=false",
)


@pytest.fixture(scope="module")
def states(tiny: Any, make_dataset: Any) -> Any:
    """Return a way to start tiny runs on data that PushT can show: the agent's position."""
    root = make_dataset(
        lengths=(17, 15, 16), cameras=("observation.image",), image_size=(96, 96), state_dim=2, action_dim=2, fps=10
    )
    return type(tiny)(root)


def scores(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if "score" in line]


def evaluated(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "evaluation").iterdir())


def test_rollouts_come_on_time_and_leave_numbers(states: Any, tmp_path: Path) -> None:
    metrics = states.train(tmp_path, *ROLLOUTS, "evaluation.every=2", "evaluation.final_episodes=3")
    assert evaluated(tmp_path) == ["000002", "000004"]
    lines = scores(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert all(set(line) >= COLUMNS for line in lines)
    assert all(line["score_low"] <= line["score"] <= line["score_high"] for line in lines)
    assert all(line["success_low"] <= line["success"] <= line["success_high"] for line in lines)
    places = [tmp_path / "evaluation" / name for name in evaluated(tmp_path)]
    numbers = [json.loads((place / "evaluation.json").read_text()) for place in places]
    assert [found["episodes"] for found in numbers] == [2, 3]
    assert [found["score"]["mean"] for found in numbers] == [line["score"] for line in lines]
    assert [row["seed"] for row in numbers[1]["rows"]] == [500000, 500001, 500002]
    assert metrics["score"] == lines[-1]["score"]  # what sweep_metric=score returns
    assert metrics["success"] == lines[-1]["success"]


def test_every_alone_evaluates_the_last_step_too_and_final_alone_only_that(states: Any, tmp_path: Path) -> None:
    states.fit(tmp_path / "every", *ROLLOUTS, "evaluation.every=3")
    assert evaluated(tmp_path / "every") == ["000003", "000004"]
    states.fit(tmp_path / "final", *ROLLOUTS, "evaluation.final_episodes=1")
    assert evaluated(tmp_path / "final") == ["000004"]
    states.fit(tmp_path / "none", *ROLLOUTS)
    assert not (tmp_path / "none/evaluation").exists()


def test_rollouts_change_nothing_else(states: Any, helpers: Any, tmp_path: Path) -> None:
    states.fit(tmp_path / "without")
    states.fit(tmp_path / "with", "env.max_steps=8", *ROLLOUTS[2:], "evaluation.every=1", "ema.enabled=true")
    helpers.assert_same_bits(tmp_path / "without", tmp_path / "with", step=4)
    assert helpers.losses(tmp_path / "without") == helpers.losses(tmp_path / "with")


def test_raw_weights_go_on_training_after_a_rollout(states: Any, helpers: Any, tmp_path: Path) -> None:
    more = ("ema.enabled=false", *helpers.WITH_PICTURES, "backbone.norm=batch", "training.max_steps=2")
    states.fit(tmp_path / "without", *more)
    states.fit(tmp_path / "with", *more, *ROLLOUTS[1:], "env.max_steps=1", "evaluation.every=1")
    helpers.assert_same_bits(tmp_path / "without", tmp_path / "with", step=2)


# --- the best ---------------------------------------------------------------------------------------------------------


def test_the_best_is_kept_and_opens(states: Any, tmp_path: Path) -> None:
    trainer = states.trainer(
        tmp_path,
        *ROLLOUTS,
        "evaluation.every=1",
        "evaluation.keep_best=true",
        "training.keep_checkpoints=null",
    )
    given = iter([0.2, 0.7, 0.7, 0.4])
    real = trainer.evaluate
    trainer.evaluate = lambda *arguments: {**real(*arguments), "score": next(given)}
    trainer.fit()
    best = tmp_path / "checkpoints/best"
    assert json.loads((best / "score.json").read_text()) == {"step": 2, "score": 0.7}
    kept, second = load_policy(best), load_policy(tmp_path / "checkpoints/000002")
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in kept.state_dict().items())
    assert trainer.store.steps() == [1, 2, 3, 4]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_kill_before_the_best_is_kept_is_made_up_for(
    states: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("getiaction.training.checkpoint.CheckpointStore.save_best", killed)
        with pytest.raises(KeyboardInterrupt):
            states.train(tmp_path, *ROLLOUTS, "evaluation.final_episodes=1", "evaluation.keep_best=true")
    states.resume(tmp_path)
    assert json.loads((tmp_path / "checkpoints/best/score.json").read_text())["step"] == 4
    assert len(scores(tmp_path)) == 1


def test_the_best_can_be_evaluated_and_knows_its_simulator(states: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from getiaction import evaluate

    run = tmp_path / "run"
    states.train(run, *ROLLOUTS, "evaluation.final_episodes=1", "evaluation.keep_best=true")
    words = [f"checkpoint={run}/checkpoints/best", "episodes=1", "seed=500000", "videos=false", "num_workers=0"]
    monkeypatch.setattr("sys.argv", ["getiaction.evaluate", *words, f"output_dir={tmp_path / 'out'}"])
    evaluate.main()
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["rows"] == json.loads((run / "evaluation/000004/evaluation.json").read_text())["rows"]


# --- stopped ----------------------------------------------------------------------------------------------------------


def test_stopped_in_the_last_evaluation_and_gone_on_equals_uninterrupted(
    states: Any, helpers: Any, tmp_path: Path
) -> None:
    more = (*ROLLOUTS[:1], "env.max_steps=120", *ROLLOUTS[3:], "evaluation.num_envs=1")
    more = (*more, "hardware.num_threads=1", "evaluation.keep_best=true")
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    process = states.start(folder, *more, "evaluation.final_episodes=500")  # a minute and more: see the other such test
    log = folder / "evaluation/000004/episodes.jsonl"
    helpers.wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 2, process, folder)
    process.send_signal(signal.SIGTERM)
    assert helpers.finish(process) == 128 + signal.SIGTERM
    assert "Traceback" not in helpers.said(folder)
    assert not scores(folder)
    before = log.read_text()
    enough = len(before.splitlines()) + 1  # the first line says whose episodes they are
    assert 4 <= enough < 500
    gone_on = states.resume(folder, f"evaluation.final_episodes={enough}")
    uninterrupted = states.train(whole, *more, f"evaluation.final_episodes={enough}")
    assert log.read_text().startswith(before)
    helpers.assert_same_bits(folder, whole, step=4)
    assert gone_on == pytest.approx(uninterrupted)  # with its losses, which were measured before it was stopped
    assert {"loss", "val_loss", "score"} <= set(gone_on)
    results = [json.loads((run / "result.json").read_text()) for run in (folder, whole)]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"])
    wanted = [{key: line[key] for key in COLUMNS} for line in scores(whole)]
    assert [{key: line[key] for key in COLUMNS} for line in scores(folder)] == wanted
    numbers = [json.loads((run / "evaluation/000004/evaluation.json").read_text())["rows"] for run in (folder, whole)]
    assert numbers[0] == numbers[1]
    assert (folder / "checkpoints/best/score.json").read_text() == (whole / "checkpoints/best/score.json").read_text()


def test_a_finished_run_can_be_asked_for_more_episodes(states: Any, tmp_path: Path) -> None:
    first = states.train(tmp_path, *ROLLOUTS, "evaluation.final_episodes=1")
    again = states.resume(tmp_path, "evaluation.final_episodes=3")
    numbers = json.loads((tmp_path / "evaluation/000004/evaluation.json").read_text())
    assert numbers["episodes"] == 3
    assert again["score"] == numbers["score"]["mean"]
    assert {key: again[key] for key in ("loss", "val_loss")} == {key: first[key] for key in ("loss", "val_loss")}
    kept = states.resume(tmp_path, "hardware.num_threads=1")  # what leaves the result as it is
    assert kept == again == json.loads((tmp_path / "result.json").read_text())["metrics"]


def test_an_evaluation_stopped_under_other_rules_begins_anew(states: Any, tmp_path: Path) -> None:
    states.train(tmp_path, *ROLLOUTS, "evaluation.final_episodes=2")
    log = tmp_path / "evaluation/000004/episodes.jsonl"
    before = log.read_text()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    unevaluated = [line for line in lines if "score" not in line]  # as if a kill had come before the last episode
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in unevaluated))
    states.resume(tmp_path, "env.max_steps=8")
    assert log.with_name("episodes.jsonl.1").read_text() == before
    assert [json.loads(line)["length"] for line in log.read_text().splitlines()[1:]] == [8, 8]
    assert len(scores(tmp_path)) == 1


def test_an_evaluation_that_a_kill_skipped_is_made_up_for(states: Any, tmp_path: Path) -> None:
    more = (*ROLLOUTS, "evaluation.every=2", "training.max_steps=6")
    states.train(tmp_path / "whole", *more)
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True)
    for step in ("000004", "000006"):
        shutil.rmtree(folder / "evaluation" / step)
    shutil.rmtree(folder / "checkpoints/000006")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 4 or '"loss"' in line]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    states.resume(folder)
    wanted = [(line["step"], line["score"], line["success"]) for line in scores(tmp_path / "whole")]
    assert [(line["step"], line["score"], line["success"]) for line in scores(folder)] == wanted
    assert evaluated(folder) == ["000002", "000004", "000006"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep_metric=score"], "sweep_metric=score needs rollouts: use evaluation.final_episodes=50"),
        (["sweep_metric=success"], "sweep_metric=success needs rollouts"),
        (["evaluation.keep_best=true"], "evaluation.keep_best=true needs rollouts to know the best"),
        (["env=none", "evaluation.every=5"], "env=none has no simulator to evaluate in"),
        (["env=none", "evaluation.final_episodes=5"], "env=none has no simulator to evaluate in"),
        (["evaluation.every=0"], "evaluation.every=0 must be a whole number of at least 1"),
        (["evaluation.episodes=0"], "evaluation.episodes=0 must be a whole number of at least 1"),
        (["evaluation.num_workers=-1"], "evaluation.num_workers=-1 must be a whole number of at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rollouts_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_config(compose(overrides))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_data_that_the_simulator_does_not_show_are_refused_before_training(
    tiny: Any, tmp_path: Path, helpers: Any
) -> None:
    wanted = r"observation\.image is \(3, 96, 96\) in env=pusht, the policy needs \(3, 48, 48\): use env\.image_size"
    with pytest.raises(InputError, match=wanted):
        tiny.train(tmp_path, *helpers.WITH_PICTURES, *ROLLOUTS, "evaluation.every=2")
    assert not (tmp_path / "checkpoints").exists()
