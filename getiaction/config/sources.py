"""Read `dataset.sources`: several datasets to train on at once, and how often each is seen."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from getiaction.config.problems import Problem
from getiaction.config.schema import Config
from getiaction.config.value_checks import is_number, is_whole
from getiaction.data.metadata import find_dataset
from getiaction.data.mixture import Mixture, Source

OWN = ("root", "revision", "episodes", "val_episodes")  # what each source says for itself
KEYS = ("repo_id", "weight", *OWN)
LIKE = "[{root: /data/a, weight: 2}, {repo_id: me/b, weight: 1}]"


def find_data(config: Config) -> Mixture:
    """Find the datasets that a config names, checked by `check_sources`: metadata only.

    Raises:
        InputError: one is nowhere to be found, or its metadata are damaged.
    """
    dataset = config.dataset
    if dataset.sources is None:
        metadata = find_dataset(dataset.repo_id, dataset.root, dataset.revision)
        return Mixture.of(Source(metadata, "dataset", dataset.episodes, dataset.val_episodes))
    return Mixture.of(*(find_source(entry, number) for number, entry in enumerate(dataset.sources)))


def find_source(entry: dict[str, Any] | str, number: int) -> Source:
    """Find one dataset of a list."""
    given = as_entry(entry)
    root = given.get("root")
    metadata = find_dataset(given.get("repo_id") or Path(root or "").name, root, given.get("revision"))
    weight = given.get("weight")
    return Source(
        metadata,
        f"dataset.sources[{number}]",
        given.get("episodes"),
        given.get("val_episodes"),
        None if weight is None else float(weight),
    )


def as_entry(entry: dict[str, Any] | str) -> dict[str, Any]:
    """Return the long form of an entry: a mere name is a folder, or a dataset on the Hub."""
    if isinstance(entry, dict):
        return entry
    is_folder = Path(entry).expanduser().is_dir() or entry.count("/") != 1 or entry.startswith(("/", ".", "~"))
    return {"root": entry} if is_folder else {"repo_id": entry}


def check_sources(config: Config) -> Iterator[Problem]:
    """Check what `dataset.sources` says, before any of them is looked for."""
    dataset = config.dataset
    if dataset.sources is None:
        return
    if not dataset.sources:
        yield Problem("dataset.sources=[] names no dataset: use null to train on dataset.repo_id or dataset.root alone")
        return
    for key in OWN:
        if getattr(dataset, key) is not None:
            yield Problem(
                f"dataset.{key}={getattr(dataset, key)} says nothing where there are several dataset.sources: write it "
                f"into their entries, and dataset.{key}=null"
            )
    problems = [list(check_source(entry, f"dataset.sources[{n}]")) for n, entry in enumerate(dataset.sources)]
    yield from (problem for some in problems for problem in some)
    if any(problems):
        return
    weights = [as_entry(entry).get("weight") for entry in dataset.sources]
    if None in weights and any(weight is not None for weight in weights):
        yield Problem(
            f"dataset.sources have the weights {weights}: give each one, or none, which shows each as often as its "
            "size says"
        )


def check_source(entry: Any, key: str) -> Iterator[Problem]:
    """Check one entry of the list."""
    if not isinstance(entry, dict | str) or not entry:
        yield Problem(f"{key}={entry} must be a folder, a name on the Hub, or say more: {LIKE}")
        return
    given = as_entry(entry)
    for name in [name for name in given if name not in KEYS]:
        close = get_close_matches(str(name), KEYS, 1)
        yield Problem(
            f"{key}.{name} does not exist{f', did you mean {close[0]}' if close else ''}: it takes {', '.join(KEYS)}"
        )
    if not given.get("root") and not given.get("repo_id"):
        yield Problem(f"{key}={entry} names no dataset: give root=<folder> or repo_id=<name on the Hub>")
    for name in ("root", "repo_id", "revision"):
        if given.get(name) is not None and not isinstance(given[name], str):
            yield Problem(f"{key}.{name}={given[name]} must be text: put it in quotes")
    for name in ("episodes", "val_episodes"):
        if given.get(name) is not None and not (
            isinstance(given[name], list) and all(is_whole(index, 0) for index in given[name])
        ):
            yield Problem(f"{key}.{name}={given[name]} must be a list of whole numbers: [0,1,2]")
    weight = given.get("weight")
    if weight is not None and not (is_number(weight) and weight > 0):
        yield Problem(f"{key}.weight={weight} must be a positive number: 2 is seen twice as often as 1")


def without_roots(sources: list[Any]) -> list[dict[str, Any]]:
    """Return the sources without the folders where they lie, which may change from machine to machine."""
    return [{k: v for k, v in as_entry(entry).items() if k != "root" and v is not None} for entry in sources]
