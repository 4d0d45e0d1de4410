"""Train on several datasets at once, for real."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from getiaction.config.data import load_data, make_windows
from getiaction.config.sources import find_data
from getiaction.data.gather import Gatherer
from getiaction.data.mixture import Mixture
from getiaction.errors import InputError
from getiaction.random import Purpose, generator
from getiaction.training.metrics import read_metrics
from getiaction.training.validation import draw_noise, evaluating, sources_of

SHAPE = {"cameras": ("observation.image",), "image_size": (48, 48), "state_dim": 2, "action_dim": 2, "fps": 10}


@pytest.fixture(scope="module")
def roots(make_dataset) -> tuple[Path, Path]:
    """Return two datasets that agree."""
    return make_dataset(lengths=(17, 15, 16), **SHAPE), make_dataset(lengths=(12, 14), **SHAPE)


def mixed(one: Path, other: Path, weights: tuple[int, int] | None = (1, 3)) -> tuple[str, ...]:
    """Return the overrides that train on both."""
    said = [f", weight: {weight}" for weight in weights] if weights else ["", ""]
    return "dataset.root=null", f"dataset.sources=[{{root: '{one}'{said[0]}}}, {{root: '{other}'{said[1]}}}]"


def test_one_source_trains_as_the_dataset_alone(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.fit(tmp_path / "alone")
    tiny.fit(tmp_path / "listed", "dataset.root=null", f"dataset.sources=[{tiny.root}]")
    helpers.assert_same_bits(tmp_path / "alone", tmp_path / "listed", 4)


def test_weights_decide_what_is_learned(tiny: Any, helpers: Any, tmp_path: Path, roots: tuple[Path, Path]) -> None:
    for name, weights in (("none", None), ("some", (1, 3))):
        tiny.fit(tmp_path / name, *mixed(*roots, weights))
    one, other = (helpers.final_state(tmp_path / name, 4) for name in ("none", "some"))
    assert any((one[key] != other[key]).any() for key in one)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_pictures_of_both_train_wherever_they_lie(
    placement: str, tiny: Any, helpers: Any, tmp_path: Path, roots: tuple[Path, Path]
) -> None:
    pictures = helpers.WITH_PICTURES
    trainer = tiny.trainer(tmp_path, *mixed(*roots), *pictures, f"hardware.data_placement={placement}")
    batches = list(trainer.batches.iterate(0, 3))
    expected = [trainer.batches.step(step) for step in range(3)]
    for got, wanted in zip(batches, expected, strict=True):
        assert all((got[0][key] == wanted[0][key]).all() for key in wanted[0])
    trainer.fit()


def test_a_killed_run_goes_on_exactly_and_its_data_may_move(
    tiny: Any, helpers: Any, tmp_path: Path, roots: tuple[Path, Path]
) -> None:
    tiny.train(tmp_path / "whole", *mixed(*roots))
    tiny.train(tmp_path / "run", *mixed(*roots))
    helpers.remove_checkpoint(tmp_path / "run", 4)
    elsewhere = [shutil.copytree(root, tmp_path / f"moved {number}") for number, root in enumerate(roots)]
    with pytest.raises(InputError, match="cannot change in a run that resumes"):
        tiny.resumed_config(tmp_path / "run", mixed(*elsewhere, (1, 2))[1])
    tiny.resume(tmp_path / "run", mixed(*elsewhere)[1])
    helpers.assert_same_bits(tmp_path / "whole", tmp_path / "run", 4)


def test_other_data_in_the_same_place_are_refused(tiny: Any, tmp_path: Path, roots: tuple[Path, Path]) -> None:
    tiny.train(tmp_path / "run", *mixed(*roots), "training.max_steps=2")
    with pytest.raises(InputError, match="same data"):
        tiny.resume(tmp_path / "run", mixed(roots[1], roots[0])[1], "training.max_steps=4")


# --- the validation loss of each --------------------------------------------------------------------------------------


def alone(trainer: Any, config: Any, source: int, part: slice) -> float:
    """Return the loss of one source's held-out episodes, computed without the other's.

    Args:
        part: where its samples lie among those of the validation loss: their noise is drawn in that order.
    """
    validator, mixture = trainer.validator, find_data(config)
    held_out = mixture.splits(config.dataset.val_fraction, config.seed)[source][1]
    lone = Mixture.of(replace(mixture.sources[source], episodes=held_out, weight=None))
    episodes = load_data(config, lone, trainer.accelerator)
    windows = make_windows(config, episodes)
    gatherer = Gatherer(
        episodes,
        windows,
        device=trainer.accelerator.device,
        resident=True,
        observations=trainer.policy.features.observation_keys,
        crop_shape=validator.gatherer.crop_shape,
    )
    noise, timesteps = draw_noise(trainer.best, len(validator.ids), generator(config.seed, Purpose.VALIDATION))
    with torch.no_grad(), evaluating(trainer.best):
        losses = [
            float(trainer.best(gatherer.gather(np.array([place])), noise[at : at + 1], timesteps[at : at + 1]))
            for place, at in enumerate(range(part.start, part.stop))
        ]
    assert len(losses) == len(windows)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("pictures", [False, True], ids=["states", "pictures"])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_each_source_has_a_validation_loss_of_its_own(
    batch_size: int, pictures: bool, tiny: Any, helpers: Any, tmp_path: Path, roots: tuple[Path, Path]
) -> None:
    more = (*mixed(*roots), f"training.batch_size={batch_size}", *(helpers.WITH_PICTURES if pictures else ()))
    trainer, config = tiny.trainer(tmp_path, *more), tiny.config(*more)
    measured, sources = trainer.validator(trainer.best), trainer.validator.sources
    assert list(measured) == ["val_loss", "val_loss_0", "val_loss_1", "val_action_error"]
    for source, part in sources.items():
        assert measured[f"val_loss_{source}"] == pytest.approx(alone(trainer, config, source, part), rel=1e-5)
    counts = [part.stop - part.start for part in sources.values()]
    assert sum(counts) == len(trainer.validator.ids)
    mean = np.average([measured["val_loss_0"], measured["val_loss_1"]], weights=counts)
    assert measured["val_loss"] == pytest.approx(mean, rel=1e-6)
    assert measured == trainer.validator(trainer.best)


def test_the_loss_over_all_is_what_it_was(tiny: Any, tmp_path: Path, roots: tuple[Path, Path]) -> None:
    trainer = tiny.trainer(tmp_path, *mixed(*roots))
    with_each = trainer.validator(trainer.best)
    trainer.validator.sources = {}
    without = trainer.validator(trainer.best)
    assert list(without) == ["val_loss", "val_action_error"]
    assert without == {name: with_each[name] for name in without}  # bit by bit


def test_a_source_that_holds_nothing_out_has_no_number(
    tiny: Any, tmp_path: Path, roots: tuple[Path, Path], capsys: pytest.CaptureFixture[str], drawn: None
) -> None:
    one, other = roots
    sources = f"dataset.sources=[{{root: '{one}', val_episodes: []}}, {{root: '{other}', val_episodes: [1]}}]"
    metrics = tiny.train(tmp_path, "dataset.root=null", sources)
    assert {name for name in metrics if name.startswith("val_loss")} == {"val_loss", "val_loss_1"}
    assert metrics["val_loss_1"] == metrics["val_loss"]
    lines = [line for line in read_metrics(tmp_path) if "val_loss" in line]
    assert [set(line) for line in lines] == [{"step", "time", "val_loss", "val_loss_1", "val_action_error"}]
    assert f"val_loss_1 {metrics['val_loss_1']:.4f}" in capsys.readouterr().out
    assert (tmp_path / "curves.png").exists()


def test_samples_are_told_apart_by_source() -> None:
    assert sources_of(np.array([0, 4, 9, 10, 14]), (10, 5)) == {0: slice(0, 3), 1: slice(3, 5)}
    assert sources_of(np.array([0, 4, 9]), (10, 0)) == {0: slice(0, 3)}
    assert sources_of(np.array([0, 9]), (3, 4, 3)) == {0: slice(0, 1), 2: slice(1, 2)}
