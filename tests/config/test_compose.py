"""Composing: mistakes get one message with the nearest name; the environment does not matter."""

from __future__ import annotations

from pathlib import Path

import composing
import pytest

from getiaction.config.compose import ALIASES, compose, known_keys
from getiaction.config.folders import run_folder
from getiaction.errors import InputError

MISTAKES = [
    (["+preset=pusht_fst"], "preset=pusht_fst does not exist: did you mean pusht_fast?"),
    (["preset=pusht_fast"], "preset= needs a plus: +preset=<choice>"),
    (["unet=lrge"], "did you mean large?"),
    (["training.max_stepz=3"], "training.max_stepz does not exist: did you mean training.max_steps?"),
    (["+training.max_stepz=3"], "did you mean training.max_steps?"),
    (["max_steps=3"], "did you mean training.max_steps?"),
    (["optimizer.learning_rate=3"], "did you mean optimizer.lr?"),
    (["training.train_batch_size=3"], "did you mean training.batch_size?"),
    (["training.max_steps=soon"], "training.max_steps: Value 'soon' of type 'str' could not be converted to Integer"),
    (["dataset.episodes=[one]"], "dataset.episodes[0]: Value 'one'"),
    (["training.resume=nowhere"], "training.resume=nowhere is no run folder"),
    (["backbone=none", "backbone.norm=group"], "choose one that has it, backbone=<resnet18"),
    (
        ["mirror=pusht", "mirror.features.observation.state.order=[0,1]"],
        "write 'mirror.features={observation.state: {order: ...}}'",
    ),
    (["training.max_steps="], "training.max_steps"),
    (["a=[1"], "a=[1"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_a_mistake_is_answered_with_the_nearest_name(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        compose(overrides)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["output_dir=/run"],
        ["+preset=pusht_pictures", "seed=3", "backbone=none", "output_dir=/run", "unet.down_dims=[16,32]", "seed=4"],
        ["optimizer.lr=1e-3", "+preset=pusht_cpu", "env=none", "+scheduler.more={a: [1]}", "dataset.root='/a b'"],
        ["+preset=aloha", "~unet.n_groups", "++policy.horizon=32", "training.max_steps=null", "output_dir=/run"],
    ],
)
def test_what_tests_compose_in_a_third_of_the_time_is_the_same(overrides: list[str]) -> None:
    overrides = [*overrides, "output_dir=/run"]
    first = composing.compose(overrides)
    assert first == composing.compose(overrides) == compose(overrides)
    first.optimizer["lr"] = None  # somebody's own
    assert composing.compose(overrides) == compose(overrides)


@pytest.mark.parametrize("overrides", [overrides for overrides, _ in MISTAKES], ids=str)
def test_what_tests_compose_has_the_same_mistakes(overrides: list[str]) -> None:
    said = []
    for one in (composing.compose, compose):
        with pytest.raises(InputError) as raised:
            one(overrides)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_an_entry_whose_name_has_a_dot_can_be_set_as_the_message_says() -> None:
    config = compose(["mirror=pusht", "mirror.features={observation.state: {order: [0,1]}}"])
    assert config.mirror["features"]["observation.state"] == {"order": [0, 1], "scale": -1.0, "offset": 512.0}


def test_the_issues_example_composes() -> None:
    config = compose(
        ["+preset=pusht_basic", "unet=large", "backbone=resnet50", "dataset.episodes=[0,1,2]", "optimizer.lr=5e-4"]
    )
    assert config.unet["down_dims"] == [512, 1024, 2048]
    assert config.backbone["resnet"] == "resnet50"
    assert config.dataset.episodes == [0, 1, 2]
    assert config.optimizer["lr"] == 5e-4


@pytest.mark.parametrize("preset", ["pusht_fast", "pusht_advanced", "pusht_multigpu"])
def test_a_group_on_the_command_line_wins_over_the_preset(preset: str) -> None:
    config = compose([f"+preset={preset}", "unet=base", "backbone=resnet34", "hardware=cpu", "tracker=wandb"])
    assert config.unet["down_dims"] == [256, 512, 1024]
    assert config.backbone["resnet"] == "resnet34"
    assert config.hardware.device == "cpu"
    assert config.hardware.num_processes == 1
    assert config.tracker.name == "wandb"


def test_aliases_lead_to_keys_that_exist() -> None:
    groups = {key.split(".")[0] for key in known_keys()}
    assert all(target in known_keys() or target in groups for target in ALIASES.values())


def test_every_field_of_lerobots_config_has_a_place() -> None:
    from dataclasses import fields

    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    not_of_training = {"input_features", "output_features", "device", "use_amp", "use_peft", "push_to_hub", "repo_id"}
    not_of_training |= {"private", "tags", "license", "pretrained_path", "pretrained_revision"}
    leaves = {key.rsplit(".", 1)[-1] for key in known_keys()}
    names = {field.name for field in fields(DiffusionConfig)} - not_of_training
    assert {name for name in names if name not in leaves and name not in ALIASES} == set()


def test_run_folders_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = tmp_path / run_folder("pusht_cpu", None)
    first.mkdir(parents=True)
    assert run_folder("pusht_cpu", None) != str(first.relative_to(tmp_path))
