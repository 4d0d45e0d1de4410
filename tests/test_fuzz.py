"""Whatever a config or a dataset says of itself: it works, or one message says why not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from getiaction.check import check
from getiaction.config.compose import CONF_DIR, compose, known_keys
from getiaction.config.data import load_data, make_windows
from getiaction.config.run import start_accelerator
from getiaction.config.sources import find_data
from getiaction.data.statistics import compute_statistics
from getiaction.errors import InputError

BOUNDED = settings(
    max_examples=40,
    derandomize=True,  # CI is the same each time; `--hypothesis-seed` and more examples look further
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
LEAF = st.builds("{}={}".format, st.sampled_from(LEAVES), st.sampled_from(VALUES))
GROUP = st.sampled_from([f"{group}={choice}" for group, choices in GROUPS.items() for choice in choices])


@pytest.fixture(scope="module")
def root(make_dataset: Callable[..., Path]) -> Path:
    """Return a tiny dataset with states and pictures."""
    return make_dataset(
        lengths=(20, 18, 19), cameras=("observation.image",), image_size=(48, 48), state_dim=2, action_dim=2
    )


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def tiny(root: Path, *more: str) -> list[str]:
    """Return overrides for a policy that sees states, on `root`."""
    small = ("dataset.episodes=null", "backbone=none", "unet.down_dims=[16,32]")
    return ["+preset=pusht_cpu", *small, f"dataset.root={root}", *more]


@BOUNDED
@given(overrides=st.lists(st.one_of(LEAF, GROUP), min_size=1, max_size=3))
@example(overrides=["optimizer.lr=null", "optimizer.scale_lr=linear"])
@example(overrides=["optimizer.scale_lr=null"])
@example(overrides=["unet=3"])
@example(overrides=["tracker=[16]"])
@example(overrides=["unet.kernel_size=null"])
@example(overrides=["lr_scheduler='${seed}'"])
@example(overrides=["~policy.horizon"])
@example(overrides=["dataset.observations=[[1]]"])
def test_any_config_works_or_says_why_not(root: Path, overrides: list[str]) -> None:
    try:
        event("works" if check(tiny(root, *overrides)) else "")
    except InputError:
        event("refused")


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
    pictures = ("backbone=resnet18", "backbone.resize_shape=null", "backbone.crop_shape=null") if sees else ()
    overrides = tiny(copy, f"dataset.cache_dir={tmp_path / 'cache'}", *pictures)
    try:
        check(overrides)
        config = compose(overrides)
        episodes = load_data(config, find_data(config), start_accelerator(config, tmp_path))
        make_windows(config, episodes)
        compute_statistics(episodes, config.dataset.image_stats)
        event("works")
    except InputError:
        event("refused")
