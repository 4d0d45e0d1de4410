"""Whatever a policy folder says: it opens and acts, or one message says why not, and no memory is taken for it."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from getiaction.errors import InputError
from getiaction.interop.layout import CONFIG, EXTRA, POSTPROCESSOR, PREPROCESSOR, PREPROCESSOR_STATE, WEIGHTS
from getiaction.interop.lerobot import load_policy, write_policy
from getiaction.policy import ConditionalUnet1d, DiffusionPolicy, Features, Normalizer

BOUNDED = settings(
    max_examples=45,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = (None, -1, 0, 1, 3, 2.5, float("nan"), 10**9, 10**20, "x", "", [], [0], [2] * 40, {}, True, "UNetModel", "../x")
JSON = (EXTRA, CONFIG, f"{PREPROCESSOR}.json", f"{POSTPROCESSOR}.json")
FILES = (*JSON, WEIGHTS, PREPROCESSOR_STATE)
ROOM = 4 << 30  # bytes that opening a tiny policy may take at most
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return a policy folder of ours, and the same without our own file, as LeRobot writes it."""
    from diffusers import DDPMScheduler

    sizes = {"observation.state": 2, "observation.environment_state": 4, "action": 2}
    statistics = {
        key: {"min": -torch.ones(size), "max": torch.ones(size), "mean": torch.zeros(size), "std": torch.ones(size)}
        for key, size in sizes.items()
    }
    policy = DiffusionPolicy(
        Features(action_dim=2, state_dim=2, env_state_dim=4),
        normalizer=Normalizer(statistics, dict.fromkeys(("state", "env", "action", "visual"), "min_max")),
        noise_scheduler=DDPMScheduler(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2"),
        encoder=None,
        unet=lambda **given: ConditionalUnet1d(down_dims=(8, 16), n_groups=4, diffusion_step_embed_dim=8, **given),
        num_inference_steps=2,
    )
    folders = {ours: tmp_path_factory.mktemp("policy") / "folder" for ours in (True, False)}
    for folder in folders.values():
        write_policy(folder, policy)
    (folders[False] / EXTRA).unlink()
    return folders


@pytest.fixture(autouse=True)
def _silent_and_bounded() -> Iterator[None]:
    """Refuse the process memory that no tiny policy needs, so that a bomb is an error and not the machine's end."""
    logging.disable(logging.CRITICAL)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    logging.disable(logging.NOTSET)


def places_in(node: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) below a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *places_in(node[key])]]


def change_json(name: str, place: int, value: Any, *, remove: bool) -> Change:
    def change(folder: Path) -> None:
        if not (folder / name).exists():
            return
        content = json.loads((folder / name).read_text())
        places = places_in(content)
        container, key = places[place % len(places)]
        if remove:
            del container[key]
        else:
            container[key] = value
        (folder / name).write_text(json.dumps(content))

    return change


def change_bytes(name: str, place: int, value: bytes, *, cut: bool) -> Change:
    def change(folder: Path) -> None:
        if not (folder / name).exists():
            return
        content = (folder / name).read_bytes()
        at = place % len(content)
        (folder / name).write_bytes(content[:at] + (b"" if cut else value + content[at + len(value) :]))

    return change


def change_header(value: Any) -> Change:
    """Let the weights' file say something else of its tensors."""

    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        name = next(key for key in header if key != "__metadata__")
        header[name] |= value
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink(missing_ok=True)


CHANGE = st.one_of(
    st.builds(change_json, st.sampled_from(JSON), st.integers(0, 400), st.sampled_from(ODD), remove=st.booleans()),
    st.builds(
        change_bytes,
        st.sampled_from(FILES),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=9),
        cut=st.booleans(),
    ),
    st.builds(remove, st.sampled_from(FILES)),
)


def open_and_act(folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Open a policy and let it act; return the shape of its actions, and what it promises, (1, Ta, Da)."""
    policy = load_policy(folder)
    batch = {key: torch.zeros(1, policy.n_obs_steps, size) for key, size in policy.features.vectors.items()}
    generator = torch.Generator().manual_seed(0)
    actions = policy.predict_action_chunk(batch, generator=generator)
    return tuple(actions.shape), (1, policy.n_action_steps, policy.features.action_dim)


@BOUNDED
@given(ours=st.booleans(), changes=st.lists(CHANGE, min_size=1, max_size=2))
@example(ours=True, changes=[])
@example(ours=False, changes=[])
def test_any_policy_folder_opens_or_is_refused(
    ours: bool, changes: list[Change], policies: dict[bool, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(policies[ours], folder)
    for change in changes:
        change(folder)
    said = None
    try:
        shape, promised = open_and_act(folder)
        assert shape == promised
    except InputError as error:
        said = str(error)
    event("works" if said is None else "refused")
    assert said != ""
    assert said is None or changes, f"nothing is damaged, and yet: {said}"


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "LeRobot's"])
@pytest.mark.parametrize(
    "value",
    [
        {"shape": [10**6, 10**6]},
        {"shape": [-1]},
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [64, 0]},
        {"dtype": "F9"},
    ],
    ids=str,
)
def test_weights_that_lie_about_their_size_are_refused(
    ours: bool, value: dict[str, Any], policies: dict[bool, Path], tmp_path: Path
) -> None:
    shutil.copytree(policies[ours], tmp_path / "copy")
    change_header(value)(tmp_path / "copy")
    with pytest.raises(InputError, match="copy"):
        load_policy(tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        (EXTRA, ("unet", "down_dims"), [10**6, 10**6]),
        (EXTRA, ("unet", "kernel_size"), 10**9 + 1),
        (EXTRA, ("unet", "diffusion_step_embed_dim"), 10**8),
        (EXTRA, ("features", "action_dim"), 10**9),
        (EXTRA, ("scheduler", "config", "num_train_timesteps"), 10**11),
        (EXTRA, ("policy", "n_obs_steps"), 10**9),
        (CONFIG, ("down_dims",), [10**6, 10**6]),
        (CONFIG, ("num_train_timesteps",), 10**11),
        (CONFIG, ("horizon",), 2**40),
    ],
    ids=str,
)
def test_sizes_that_no_weights_back_take_no_memory(
    name: str, path: tuple[str, ...], value: Any, policies: dict[bool, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(policies[name == EXTRA], tmp_path / "copy")
    content = json.loads((folder / name).read_text())
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match="copy"):
        load_policy(folder)
