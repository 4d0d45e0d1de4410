"""Checkpoints: what they hold, where, how many stay, and that a failed save harms nothing."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from torch import nn

from getiaction.errors import InputError
from getiaction.training.checkpoint import (
    CheckpointStore,
    TrainingState,
    find_damage,
    read_state,
    write_state,
)

PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".dill"}


def make_parts(steps: int) -> tuple[nn.Linear, torch.optim.AdamW, Any]:
    """Return a model, AdamW and a schedule, `steps` steps into their training."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.95, 0.999))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
    for _ in range(steps):
        train_once(model, optimizer, schedule)
    return model, optimizer, schedule


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    model(torch.arange(12.0).reshape(4, 3)).square().mean().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def state_of(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> TrainingState:
    return TrainingState(
        step=step,
        global_batch_size=4,
        data="0123456789abcdef",
        weights=model.state_dict(),
        optimizer=optimizer.state_dict(),
        lr_scheduler=schedule.state_dict(),
    )


def write_policy(folder: Path, policy: nn.Module) -> None:
    folder.mkdir()
    save_file(policy.state_dict(), folder / "model.safetensors")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., CheckpointStore]:
    """Return a function that saves checkpoints of the given steps."""

    def save_steps(*steps: int, keep: int | None = None) -> CheckpointStore:
        store = CheckpointStore(tmp_path / "checkpoints", write_policy=write_policy, keep=keep)
        for step in steps:
            parts = make_parts(steps=1)
            store.save(parts[0], state_of(step, *parts))
        return store

    return save_steps


def test_training_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    model, optimizer, schedule = make_parts(steps=3)
    (tmp_path / "training_state").mkdir()
    write_state(tmp_path / "training_state", state_of(3, model, optimizer, schedule))
    state = read_state(tmp_path)
    assert state.step == 3
    assert all(torch.equal(state.weights[key], value) for key, value in model.state_dict().items())
    assert state.optimizer["param_groups"] == optimizer.state_dict()["param_groups"]
    assert state.lr_scheduler == schedule.state_dict()
    assert state.grad_scaler is None
    for index, entry in optimizer.state_dict()["state"].items():
        assert state.optimizer["state"][index].keys() == entry.keys()
        assert all(torch.equal(state.optimizer["state"][index][name], value) for name, value in entry.items())


def test_training_goes_on_exactly_from_a_state_read_back(tmp_path: Path) -> None:
    uninterrupted = make_parts(steps=6)
    parts = make_parts(steps=3)
    (tmp_path / "training_state").mkdir()
    write_state(tmp_path / "training_state", state_of(3, *parts))
    state, (model, optimizer, schedule) = read_state(tmp_path), make_parts(steps=0)
    model.load_state_dict(state.weights)
    optimizer.load_state_dict(state.optimizer)
    schedule.load_state_dict(state.lr_scheduler)
    for _ in range(3):
        train_once(model, optimizer, schedule)
    assert torch.equal(model.weight, uninterrupted[0].weight)
    assert schedule.get_last_lr() == uninterrupted[2].get_last_lr()


def test_saving_does_not_touch_what_it_saves(tmp_path: Path) -> None:
    model, optimizer, schedule = make_parts(steps=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "training_state").mkdir()
    write_state(tmp_path / "training_state", state_of(2, model, optimizer, schedule))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())


def test_layout(save: Callable[..., CheckpointStore]) -> None:
    store = save(5, 10)
    checkpoint = store.folder / "000010"
    assert sorted(path.name for path in store.folder.iterdir()) == ["000005", "000010", "last"]
    assert sorted(path.name for path in checkpoint.iterdir()) == ["manifest.json", "pretrained_model", "training_state"]
    assert (store.folder / "last").is_symlink()
    assert (store.folder / "last").readlink() == Path("000010")
    assert store.steps() == [5, 10]
    assert store.newest() == checkpoint


def test_manifest_lists_every_file(save: Callable[..., CheckpointStore]) -> None:
    checkpoint = save(5).folder / "000005"
    listed = json.loads((checkpoint / "manifest.json").read_text())
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(listed) == there - {"manifest.json"}
    assert find_damage(checkpoint) is None


def test_keep_leaves_the_newest(save: Callable[..., CheckpointStore]) -> None:
    store = save(5, 10, 15, 20, keep=2)
    assert store.steps() == [15, 20]
    assert (store.folder / "last").resolve().name == "000020"


def test_a_damaged_one_that_was_passed_over_takes_nobodys_place(save: Callable[..., CheckpointStore]) -> None:
    store = save(5, 10, 20, keep=2)
    truncate(store.folder / "000020/training_state/model.safetensors")
    assert store.newest(str).name == "000010"
    save(12, 14, keep=2)  # a resumed run, on its way to step 20
    assert store.steps() == [12, 14, 20]
    assert store.newest(str).name == (store.folder / "last").resolve().name == "000014"
    save(20, keep=2)
    assert store.steps() == [14, 20]
    assert find_damage(store.folder / "000020") is None


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_others_may_read_what_the_umask_lets_them(save: Callable[..., CheckpointStore], mask: int) -> None:
    before = os.umask(mask)
    try:
        store = save(5)
        store.save_best(make_parts(steps=1)[0], step=5, score=0.5)
    finally:
        os.umask(before)
    for folder in (store.folder / "000005", store.folder / "best"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


def test_without_keep_all_stay(save: Callable[..., CheckpointStore]) -> None:
    assert save(1, 2, 3, 4, 5).steps() == [1, 2, 3, 4, 5]


def test_steps_past_a_million_sort_as_numbers(save: Callable[..., CheckpointStore]) -> None:
    store = save(999_999, 1_000_000, keep=1)
    assert store.steps() == [1_000_000]
    assert store.newest().name == "1000000"


def test_a_whole_checkpoint_of_the_same_step_stays(save: Callable[..., CheckpointStore]) -> None:
    store = save(5)
    before = read_state(store.newest()).weights["weight"]
    model, optimizer, schedule = make_parts(steps=4)
    store.save(model, state_of(5, model, optimizer, schedule))
    assert torch.equal(read_state(store.newest()).weights["weight"], before)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(save: Callable[..., CheckpointStore]) -> None:
    store = save(5)
    truncate(store.folder / "000005/training_state/model.safetensors")
    model, optimizer, schedule = make_parts(steps=4)
    store.save(model, state_of(5, model, optimizer, schedule))
    assert torch.equal(read_state(store.newest()).weights["weight"], model.weight)
    assert sorted(path.name for path in store.folder.iterdir()) == ["000005", "last"]


def test_a_save_that_fails_half_way_leaves_the_earlier_ones(save: Callable[..., CheckpointStore]) -> None:
    store = save(5, 10)

    def fail_half_way(folder: Path, policy: nn.Module) -> None:
        write_policy(folder, policy)
        raise OSError("No space left on device")

    store.write_policy = fail_half_way
    parts = make_parts(steps=1)
    with pytest.raises(OSError, match="No space left"):
        store.save(parts[0], state_of(15, *parts))
    assert sorted(path.name for path in store.folder.iterdir()) == ["000005", "000010", "last"]
    assert [find_damage(store.folder / name) for name in ("000005", "000010")] == [None, None]
    assert store.newest().name == "000010"
    assert (store.folder / "last").readlink() == Path("000010")


def test_what_a_killed_save_left_is_ignored_and_cleaned(save: Callable[..., CheckpointStore]) -> None:
    store = save(5)
    (store.folder / ".writing-abc" / "000099" / "pretrained_model").mkdir(parents=True)
    (store.folder / ".writing-abc" / "000099" / "pretrained_model" / "model.safetensors").write_bytes(b"half")
    assert store.newest().name == "000005"
    assert store.steps() == [5]
    save(10)
    assert sorted(path.name for path in store.folder.iterdir()) == ["000005", "000010", "last"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {"truncated": truncate, "a byte flipped": flip_a_byte, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(
    "file", ["pretrained_model/model.safetensors", "training_state/scheduler_state.json", "manifest.json"]
)
def test_damage_is_found_and_the_one_before_is_used(
    save: Callable[..., CheckpointStore], damage: Callable[[Path], None], file: str
) -> None:
    store = save(5, 10)
    damage(store.folder / "000010" / file)
    said: list[str] = []
    assert store.newest(said.append).name == "000005"
    assert len(said) == 1
    assert str(store.folder / "000010") in said[0]
    assert "damaged" in said[0]


def test_any_flipped_bit_of_the_manifest_is_damage(save: Callable[..., CheckpointStore]) -> None:
    checkpoint = save(5).folder / "000005"
    whole = (checkpoint / "manifest.json").read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 7):
            (checkpoint / "manifest.json").write_bytes(
                whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
            )
            assert find_damage(checkpoint), f"bit {bit} of byte {place}, {whole[place : place + 1]}"


@pytest.mark.parametrize("content", ["[]", "null", "1"])
def test_a_manifest_that_says_something_else_is_damage(save: Callable[..., CheckpointStore], content: str) -> None:
    store = save(5, 10)
    (store.folder / "000010" / "manifest.json").write_text(content)
    assert store.newest([].append).name == "000005"


def test_a_link_or_a_name_that_leads_out_of_a_checkpoint_is_damage(
    save: Callable[..., CheckpointStore], tmp_path: Path
) -> None:
    store = save(1, 2, 3)
    weights = store.folder / "000003/training_state/model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")  # the same content
    manifest = store.folder / "000002/manifest.json"
    content = json.loads(manifest.read_text())
    elsewhere = tmp_path / "elsewhere.safetensors"
    manifest.write_text(json.dumps({**content, "../../elsewhere.safetensors": [elsewhere.stat().st_size, "0"]}))
    said: list[str] = []
    assert store.newest(said.append).name == "000001"
    assert [line.count("leads out of the checkpoint") for line in said] == [1, 1]


def test_without_a_whole_checkpoint_there_is_one_message(save: Callable[..., CheckpointStore]) -> None:
    store = save(5)
    (store.folder / "000005" / "manifest.json").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        store.newest([].append)


def test_a_run_folder_holds_no_pickle(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.train(tmp_path / "run", *helpers.WITH_PICTURES, "training.max_steps=2", "training.save_every=1")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if path.suffix in PICKLES]
    for path in files:
        head = path.read_bytes()[:2]
        assert not (head[:1] == b"\x80" and head[1:2] <= b"\x05"), f"{path} starts like a pickle"
        assert head != b"PK", f"{path} is an archive, as torch.save writes"


def test_a_run_saves_the_average_for_use_and_the_raw_weights_beside_it(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.fit()
    checkpoint = trainer.store.newest()
    average, raw = (
        load_file(checkpoint / kind / "model.safetensors") for kind in ("pretrained_model", "training_state")
    )
    assert average.keys() == raw.keys() == trainer.policy.state_dict().keys()
    assert all(torch.equal(value, raw[key]) for key, value in trainer.policy.state_dict().items())
    assert all(torch.equal(value, average[key]) for key, value in trainer.ema.average.state_dict().items())
    assert any(not torch.equal(average[key], raw[key]) for key in raw)
