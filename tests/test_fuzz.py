"""Whatever a config or a dataset says of itself: it works, or one message says why not."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from composing import compose
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from getiaction.check import check
from getiaction.config.build import build_features, build_policy
from getiaction.config.compose import CONF_DIR, known_keys
from getiaction.config.data import load_data, make_windows
from getiaction.config.run import start_accelerator
from getiaction.config.schema import Config
from getiaction.config.sources import find_data
from getiaction.config.value_checks import CHOICES
from getiaction.data.statistics import compute_statistics
from getiaction.errors import InputError, TrainingError
from getiaction.train import train

FURTHER = int(os.environ.get("FUZZ", "0"))
"""Examples of a longer look: FUZZ=500 pytest tests/test_fuzz.py --hypothesis-seed=1 -k any_config, a second each."""
BOUNDED = settings(
    max_examples=FURTHER or 20,
    derandomize=not FURTHER,  # CI is the same each time
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NETWORK = ("dataset.repo_id", "dataset.revision", "dataset.root", "training.init_from")
LEAVES = sorted(
    key for key in known_keys() if key not in NETWORK and not any(other.startswith(f"{key}.") for other in known_keys())
)
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF_DIR.iterdir())
    if folder.is_dir() and folder.name not in ("preset", "lightning", "dataset")
}
VALUES = (
    *("null", "true", "false", "-1", "0", "1", "2", "3", "7", "16", "1000000000", "1000000000000000000000"),
    *("0.5", "-0.5", "1e-9", "1e30", ".nan", ".inf", "x", "''"),
    *("[]", "[0]", "[1,2]", "[96,96]", "[-1,5]", "[1.5,2]", "[a,b]", "{a:1}"),
)
LEAF = st.sampled_from(LEAVES).flatmap(
    lambda key: st.builds("{}={}".format, st.just(key), st.sampled_from([*VALUES, *CHOICES.get(key, ())]))
)
GROUP = st.sampled_from([f"{group}={choice}" for group, choices in GROUPS.items() for choice in choices])

ENOUGH = {  # what more of would only take longer, or more memory, which `check_memory` looks at
    **{"training.batch_size": 4, "training.gradient_accumulation_steps": 3, "training.max_steps": 2},
    "training.noise_draws": 3,
    **{"validation.max_samples": 8, "validation.max_sampled": 2, "hardware.num_threads": 2},
    **{"evaluation.episodes": 1, "evaluation.final_episodes": 1, "env.max_steps": 12},
    **{"evaluation.num_envs": 1, "evaluation.num_workers": 0},
}
WEIGHTS = "checkpoints/last/pretrained_model/model.safetensors"
LARGE = 50e6  # parameters that take minutes here


@pytest.fixture(scope="module")
def root(make_dataset: Callable[..., Path]) -> Path:
    """Return a tiny dataset with states and pictures."""
    return make_dataset(
        lengths=(20, 18, 19), cameras=("observation.image",), image_size=(48, 48), state_dim=2, action_dim=2
    )


@pytest.fixture(autouse=True)
def _silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # relative folders of a config
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


PICTURES = ("backbone=resnet18", "backbone.resize_shape=null", "backbone.crop_shape=null")


def tiny(root: Path, *more: str) -> list[str]:
    """Return overrides for a policy that sees states, on `root`."""
    small = ("dataset.episodes=null", "backbone=none", "unet.down_dims=[16,32]")
    return ["+preset=pusht_cpu", *small, f"dataset.root={root}", *more]


def shorten(config: Config) -> None:
    """Cap what only takes longer, and leave to other tests what starts processes, compilers or wandb."""
    for key, most in ENOUGH.items():
        group, name = key.split(".")
        values = getattr(config, group)
        values = values if isinstance(values, dict) else vars(values)
        if isinstance(values.get(name), int):  # where nothing is evaluated, nobody has looked at env
            values[name] = min(values[name], most)
    config.training.max_steps = config.training.max_steps or ENOUGH["training.max_steps"]  # null: epochs say
    config.hardware.num_processes, config.hardware.compile = 1, False
    if config.tracker.name == "wandb":
        config.tracker.name = "local"


def is_small(config: Config) -> bool:
    """Tell whether a test can wait for the policy."""
    features = build_features(config, find_data(config).metadata)
    policy = build_policy(config, features, {}, fetch_weights=False, device="meta")
    steps = config.policy.num_inference_steps or policy.num_train_timesteps
    return sum(weight.numel() for weight in policy.parameters()) <= LARGE and max(steps, policy.horizon) <= 100


def train_a_little(overrides: list[str], folder: Path) -> None:
    """Train two steps of what a command line says, as the command would, to the last checkpoint and picture."""
    config = compose([*overrides, "training.resume=null"])
    shorten(config)
    if is_small(config):
        metrics = train(config, folder)
        event("trained")
        assert (folder / WEIGHTS).exists()
        assert "loss" in metrics


@settings(BOUNDED, max_examples=FURTHER or 10)  # one in four trains, which takes a second
@given(overrides=st.lists(st.one_of(LEAF, GROUP), min_size=1, max_size=3), sees=st.booleans())
@example(overrides=["optimizer.lr=null", "optimizer.scale_lr=linear"], sees=False)
@example(overrides=["optimizer.scale_lr=null"], sees=False)
@example(overrides=["unet=3"], sees=False)
@example(overrides=["tracker=[16]"], sees=False)
@example(overrides=["unet.kernel_size=null"], sees=False)
@example(overrides=["lr_scheduler='${seed}'"], sees=False)
@example(overrides=["~policy.horizon"], sees=False)
@example(overrides=["dataset.observations=[[1]]"], sees=False)
@example(overrides=["optimizer.betas=[0.9,0.9,0.9]"], sees=False)
@example(overrides=["hardware.num_threads=1000000000"], sees=False)
@example(overrides=["training.batch_size=1000000000"], sees=False)
@example(overrides=["training.noise_draws=1000000000"], sees=False)
@example(overrides=["unet.diffusion_step_embed_dim=1000000000"], sees=False)
@example(overrides=["scheduler=flow_matching", "policy.loss_weighting=min_snr"], sees=False)
@example(overrides=["backbone.num_keypoints=1000000000"], sees=True)
@example(overrides=["scheduler.beta_schedule=linear", "scheduler.beta_end=2"], sees=False)
@example(overrides=["scheduler.beta_schedule=linear", "scheduler.beta_start=1e-9"], sees=False)
def test_any_config_works_or_says_why_not(root: Path, tmp_path: Path, overrides: list[str], sees: bool) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    given = tiny(root, *(PICTURES if sees else ()), *overrides)
    said, refused = None, False
    try:
        check(given)
        event("passed")
        train_a_little(given, folder)
    except InputError as error:
        event("refused")
        said, refused = str(error), True
    except TrainingError as error:
        event("ended with advice")
        said = str(error)
    assert said != ""
    assert not (refused and (folder / WEIGHTS).exists())  # it was refused before anything was trained


# --- datasets ---------------------------------------------------------------------------------------------------------

ODD = (None, -1, 0, 2.5, float("nan"), 10**20, "x", "", [], [0], {}, True, "../../../x", "/etc/x", "{chunk_index.real}")
Change = Callable[[Path], Any]


def places_in(node: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) below a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *places_in(node[key])]]


def change_info(place: int, value: Any, *, remove: bool) -> Change:
    def change(root: Path) -> None:
        file = root / "meta/info.json"
        content = json.loads(file.read_text())
        places = places_in(content)
        container, key = places[place % len(places)]
        if remove:
            del container[key]
        else:
            container[key] = value
        file.write_text(json.dumps(content))

    return change


def change_table(part: str, column: int, what: str) -> Change:
    def change(root: Path) -> None:
        (file,) = (root / part).rglob("*.parquet")
        table = pq.read_table(file)
        name = table.column_names[column % table.num_columns]
        at, count = table.column_names.index(name), len(table)
        others = {
            "null": lambda: pa.nulls(count, table.schema.field(name).type),
            "text": lambda: pa.array(["x"] * count),
            "negative": lambda: pa.array([-1] * count),
            "huge": lambda: pa.array([2**40] * count),
            "nan": lambda: pa.array([np.nan] * count),
        }
        if what in others:
            table = table.set_column(at, name, others[what]())
        else:
            table = {"drop": lambda: table.drop([name]), "cut": lambda: table.slice(0, count // 2)}.get(
                what, lambda: pa.concat_tables([table, table.slice(0, 1)])
            )()
        pq.write_table(table, file)

    return change


CHANGE = st.one_of(
    st.builds(change_info, st.integers(0, 200), st.sampled_from(ODD), remove=st.booleans()),
    st.builds(
        change_table,
        st.sampled_from(["meta/episodes", "data"]),
        st.integers(0, 40),
        st.sampled_from(["null", "text", "negative", "huge", "nan", "drop", "cut", "twice"]),
    ),
)


@BOUNDED
@given(changes=st.lists(CHANGE, min_size=1, max_size=2), sees=st.booleans())
@example(changes=[change_table("meta/episodes", 0, "twice")], sees=False)
def test_any_dataset_is_read_or_refused(root: Path, tmp_path: Path, changes: list[Change], sees: bool) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    for change in changes:
        change(copy)
    overrides = tiny(copy, f"dataset.cache_dir={tmp_path / 'cache'}", *(PICTURES if sees else ()))
    said = None
    try:
        check(overrides)
        config = compose(overrides)
        episodes = load_data(config, find_data(config), start_accelerator(config, tmp_path))
        make_windows(config, episodes)
        statistics = compute_statistics(episodes, config.dataset.image_stats)
        assert statistics
        assert all(np.isfinite(value.numpy()).all() for of in statistics.values() for value in of.values())
    except InputError as error:
        said = str(error)
    event("works" if said is None else "refused")
    assert said != ""
