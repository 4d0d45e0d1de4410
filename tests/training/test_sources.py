"""Train on several datasets at once, for real."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from getiaction.errors import InputError

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
