"""Check `dataset.sources`: what it may say, what it may not, and that it is said before anything is decoded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from composing import compose

from getiaction.config.checks import check_config
from getiaction.config.dataset_checks import check_dataset
from getiaction.config.sources import find_data
from getiaction.errors import InputError

STATES = ["+preset=pusht_cpu", "backbone=none", "dataset.episodes=null", "policy.drop_n_last_frames=1"]

ERRORS = [
    ("[]", "dataset.sources=[] names no dataset"),
    ("[3]", "dataset.sources[0]=3 must be a folder, a name on the Hub"),
    ("['']", "dataset.sources[0]= must be a folder"),
    ("[{weight: 2}]", "names no dataset: give root=<folder> or repo_id"),
    ("[{root: /a, wieght: 2}]", "dataset.sources[0].wieght does not exist, did you mean weight"),
    ("[/a, {root: 5}]", "dataset.sources[1].root=5 must be text"),
    ("[{root: /a, episodes: 3}]", "dataset.sources[0].episodes=3 must be a list of whole numbers"),
    ("[{root: /a, val_episodes: [-1]}]", "dataset.sources[0].val_episodes=[-1] must be a list of whole numbers"),
    ("[{root: /a, weight: 0}]", "dataset.sources[0].weight=0 must be a positive number"),
    ("[{root: /a, weight: .nan}]", "must be a positive number"),
    ("[{root: /a, weight: true}]", "must be a positive number"),
    ("[{root: /a, weight: 2}, /b]", "have the weights [2, None]: give each one, or none"),
]


@pytest.mark.parametrize(("sources", "message"), ERRORS, ids=lambda value: value)
def test_what_means_nothing_is_an_error(sources: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_config(compose([*STATES, f"dataset.sources={sources}"]))
    assert message in str(raised.value)


@pytest.mark.parametrize("override", ["dataset.root=/a", "dataset.episodes=[0]", "dataset.val_episodes=[0]"])
def test_what_each_source_says_for_itself_is_not_said_for_all(override: str) -> None:
    with pytest.raises(InputError, match="write it into their entries") as raised:
        check_config(compose([*STATES, "dataset.sources=[/a, /b]", override]))
    assert override in str(raised.value).replace("'", "")


def test_a_folder_that_is_not_there_is_an_error(make_dataset) -> None:
    with pytest.raises(InputError, match=r"/nowhere/at/all does not exist"):
        find_data(compose([*STATES, f"dataset.sources=[{make_dataset()}, /nowhere/at/all]"]))


def test_entries_may_be_short_or_long(make_dataset) -> None:
    root, other = make_dataset(), make_dataset(lengths=(5, 6, 7))
    short = find_data(compose([*STATES, f"dataset.sources=[{root}, {other}]"]))
    entries = f"[{{root: {root}, weight: 1}}, {{root: {other}, weight: 3, episodes: [0, 2], val_episodes: [2]}}]"
    long = find_data(compose([*STATES, f"dataset.sources={entries}"]))
    assert [source.metadata.root for source in short.sources] == [root, other]
    assert short.weights == ()
    assert long.weights == (1, 3)
    assert long.sources[1].chosen == [0, 2]
    assert long.split(0.5, seed=0)[1][-1] == 2 + 2


def test_a_weight_can_be_set_alone(make_dataset) -> None:
    sources = f"dataset.sources=[{{root: {make_dataset()}, weight: 1}}, {{root: {make_dataset()}, weight: 3}}]"
    assert find_data(compose([*STATES, sources, "dataset.sources.1.weight=5"])).weights == (1, 5)


def check(*overrides: str) -> None:
    config = compose([*STATES, *overrides])
    check_config(config)
    check_dataset(config, find_data(config))


def test_sources_that_disagree_are_refused_by_name(make_dataset) -> None:
    root, other = make_dataset(), make_dataset(action_dim=2)
    with pytest.raises(InputError, match=r"disagree about action: 3 and 2") as raised:
        check(f"dataset.sources=[{root}, {other}]")
    assert f"dataset.sources[0] ({root}) and dataset.sources[1] ({other})" in str(raised.value)


def test_what_all_have_is_offered(make_dataset) -> None:
    both, one = make_dataset(), make_dataset(cameras=("observation.images.top",))
    see = ["backbone=resnet18", "backbone.resize_shape=null", "backbone.crop_shape=null"]
    with pytest.raises(InputError, match=r"observation\.images\.wrist: .* and missing") as raised:
        check(*see, f"dataset.sources=[{both}, {one}]")
    offered = "dataset.observations='[observation.state,observation.images.top]'"
    assert offered in str(raised.value)
    check(*see, f"dataset.sources=[{both}, {one}]", offered.replace("'", ""))


def test_the_same_episodes_twice_are_refused(make_dataset, tmp_path: Path) -> None:
    root = make_dataset()
    (tmp_path / "again").symlink_to(root)
    with pytest.raises(InputError, match="share 2 episodes"):
        check(f"dataset.sources=[{root}, {tmp_path / 'again'}]")
    check(f"dataset.sources=[{{root: {root}, episodes: [0]}}, {{root: {root}, episodes: [1]}}]")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{{root: {0}, episodes: [7]}}, {1}]", r"dataset.sources\[0\].episodes=\[7\] do not exist"),
        ("[{0}, {{root: {1}, val_episodes: [1, 1]}}]", r"dataset.sources\[1\].val_episodes names \[1\] twice"),
        ("[{0}, {{root: {1}, episodes: []}}]", r"dataset.sources\[1\].episodes=\[\] leaves nothing"),
    ],
)
def test_episodes_are_checked_in_each(sources: str, message: str, make_dataset) -> None:
    with pytest.raises(InputError, match=message):
        check(f"dataset.sources={sources.format(make_dataset(), make_dataset())}")


@pytest.mark.parametrize(
    ("held_out", "message"), [(0, "held out of dataset"), (1, "to train on of dataset")], ids=["held out", "training"]
)
def test_episodes_that_are_all_too_short_are_refused_before_decoding(held_out: int, message: str, make_dataset) -> None:
    root = make_dataset(lengths=(3, 20))
    with pytest.raises(InputError, match=message):
        check(f"dataset.root={root}", f"dataset.val_episodes=[{held_out}]", "policy.drop_n_last_frames=5")


def test_other_names_are_a_warning(make_dataset, caplog: pytest.LogCaptureFixture) -> None:
    import json

    roots = [make_dataset(), make_dataset()]
    for root, names in zip(roots, (["x", "y", "z"], ["a", "b", "c"]), strict=True):
        info = json.loads((root / "meta/info.json").read_text())
        info["features"]["action"]["names"] = names
        (root / "meta/info.json").write_text(json.dumps(info))
    with caplog.at_level(logging.WARNING):
        check(f"dataset.sources=[{roots[0]}, {roots[1]}]")
    assert "name the numbers of action differently" in caplog.text
    with pytest.raises(InputError, match="differently"):
        check(f"dataset.sources=[{roots[0]}, {roots[1]}]", "strict=true")


def test_a_source_that_validation_would_not_see_is_a_warning(make_dataset, caplog: pytest.LogCaptureFixture) -> None:
    large, little = make_dataset(lengths=(200, 200)), make_dataset(lengths=(5, 5))
    sources = f"dataset.sources=[{large}, {little}, {large.parent / 'again'}]"
    (large.parent / "again").symlink_to(make_dataset(lengths=(200, 200)))
    with caplog.at_level(logging.WARNING):
        check(sources, "validation.max_samples=10")
    assert (
        "validation.max_samples=10 of the 402 held-out samples leave none of the 4 of dataset.sources[1]" in caplog.text
    )
    assert "so there is no val_loss_1: use validation.max_samples=101, or more" in caplog.text
    caplog.clear()
    check(sources, "validation.max_samples=101")
    assert not caplog.text
