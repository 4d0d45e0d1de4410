"""Policies go to the Hub and come back, by the real client against a stand-in for its network side."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub as stand_in
import pytest
import torch
import warm
from safetensors.torch import load_file

from getiaction.errors import InputError
from getiaction.interop.hub import is_repo_id
from getiaction.interop.layout import EXTRA, WEIGHTS
from getiaction.push import parser, push

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Any]:
    hub, server = stand_in.start()
    yield hub
    server.shutdown()


@pytest.fixture
def run(hub: Any, tmp_path: Path) -> Run:
    """Return a function that runs a `getiaction` command against the stand-in."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1", **environment}
        return warm.run("-m", "getiaction.cli", *arguments, env=env, cwd=tmp_path)

    return run


EVALUATE = ("env=pusht", "env.max_steps=10", "device=cpu", "num_threads=1", "num_workers=0", "episodes=3")


def test_a_policy_is_pushed_with_its_card_and_comes_back(
    keypoints_run: Path, run: Run, hub: Any, tmp_path: Path
) -> None:
    source = shutil.copytree(keypoints_run, tmp_path / "run", symlinks=True)
    described = {"command": ["train.py", "+preset=pusht_keypoints"], "commit": "abc", "device": "a CPU", "versions": {}}
    (source / "run.json").write_text(json.dumps(described))
    (source / "checkpoints/last/pretrained_model/.env").write_text("SECRET=1")
    cold = {"PYTHONHASHSEED": "0"}  # see warm.py
    evaluated = run("evaluate", f"checkpoint={source}", *EVALUATE, f"output_dir={tmp_path / 'evaluated'}", **cold)
    assert evaluated.returncode == 0, evaluated.stderr

    kept = ("--evaluation", str(tmp_path / "evaluated"))
    pushed = run("push", str(source), "--repo-id", "me/policy", *kept, "--private", **cold)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{hub.endpoint}/me/policy/commit/{stand_in.SHA}"
    files, folder = hub.repos["models/me/policy"], source / "checkpoints/last/pretrained_model"
    assert "me/policy" in hub.private
    assert ".env" not in files
    for path in (path for path in folder.iterdir() if path.name != ".env"):
        assert files[path.name] == path.read_bytes()
    assert {"evaluation/evaluation.json", "evaluation/contact_sheet.png", "config.yaml"} <= files.keys()
    assert sum(name.endswith(".mp4") for name in files) == 3

    card = files["README.md"].decode()
    numbers = json.loads((tmp_path / "evaluated/evaluation.json").read_text())
    score = numbers["score"]
    assert f"reward | {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}] |" in card
    assert "3 episodes (PushT, at most 10 steps; seeds 1000 to 1002), 4 denoising steps" in card
    assert "| preset | pusht_keypoints |" in card
    assert "python -m getiaction.train +preset=pusht_keypoints\n" in card
    assert "- lerobot/pusht_keypoints" in card
    assert "library_name: lerobot" in card

    again = run("evaluate", "checkpoint=me/policy@main", *EVALUATE, f"output_dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again/evaluation.json").read_text())["rows"] == numbers["rows"]
    asked = len(hub.asked)
    offline = run("import", "me/policy@main", "--output-dir", "kept", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.asked) == asked  # from the cache
    ours, theirs = load_file(folder / WEIGHTS), load_file(tmp_path / "kept" / WEIGHTS)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_policy_of_lerobots_is_imported_from_the_hub(keypoints_run: Path, run: Run, hub: Any, tmp_path: Path) -> None:
    source = shutil.copytree(keypoints_run / "checkpoints/last/pretrained_model", tmp_path / "policy")
    (source / EXTRA).unlink()
    hub.add("models/lerobot/diffusion", source)
    imported = run("import", "lerobot/diffusion")
    assert imported.returncode == 0, imported.stderr
    folder = "outputs/imported/lerobot--diffusion"
    assert f"LeRobot opens it: --policy.path={folder}" in imported.stdout
    assert "unet.down_dims='[16,32]'" in imported.stdout
    assert (tmp_path / folder / EXTRA).exists()
    again = run("import", "lerobot/diffusion")
    assert again.returncode == 2
    assert f"{folder} exists already: give another one" in again.stderr


def test_a_dataset_comes_from_the_hub_and_then_from_the_cache(
    run: Run, hub: Any, tmp_path: Path, tiny_data: Path
) -> None:
    hub.add("datasets/me/data", tiny_data)
    small = [
        "backbone=none",
        "unet=small",
        "unet.down_dims=[16,32]",
        "training.max_steps=1",
        "lr_scheduler.num_warmup_steps=0",
    ]
    train = ["train", *small, "env=none", "hardware=cpu", "dataset.repo_id=me/data", "training.batch_size=4"]
    for name, offline in (("first", "0"), ("second", "1")):
        asked = len(hub.asked)
        done = run(*train, f"output_dir={name}", HF_HUB_OFFLINE=offline)
        assert done.returncode == 0, done.stderr
        assert (len(hub.asked) > asked) == (offline == "0")


def test_a_revision_that_is_given_is_the_one_that_is_fetched(
    keypoints_run: Path, run: Run, hub: Any, tiny_data: Path
) -> None:
    hub.add("models/me/policy", keypoints_run / "checkpoints/last/pretrained_model")
    hub.add("datasets/me/data", tiny_data)
    train = [
        "train",
        "backbone=none",
        "unet.down_dims=[16,32]",
        "training.max_steps=1",
        "lr_scheduler.num_warmup_steps=0",
    ]
    train += ["env=none", "hardware=cpu", "dataset.repo_id=me/data", "dataset.revision=branch", "output_dir=run"]
    train += ["training.batch_size=4", "validation.max_sampled=0"]
    for command in (["import", "me/policy@older"], train):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    described = [line for line in hub.asked if "/revision/" in line]
    assert {line.rsplit("/", 1)[1] for line in described if "models/" in line} == {"older"}
    assert {line.rsplit("/", 1)[1] for line in described if "datasets/" in line} == {"branch"}
    resolved = {re.search(r"/resolve/([^/]+)/", line)[1] for line in hub.asked if "/resolve/" in line}  # type: ignore[index]
    assert resolved <= {stand_in.SHA, "older", "branch"}


@pytest.fixture(scope="session")
def tiny_data(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(lengths=(14, 12, 13), cameras=(), state_dim=2, action_dim=2, fps=10)


def test_what_the_hub_refuses_is_one_line(keypoints_run: Path, run: Run, tmp_path: Path) -> None:
    refused = run("push", str(keypoints_run), "--repo-id", "me/policy", HF_TOKEN="hf_other")
    assert refused.returncode == 2
    assert "log in with `hf auth login`, or set HF_TOKEN" in refused.stderr
    assert "Traceback" not in refused.stderr
    offline = run("push", str(keypoints_run), "--repo-id", "me/policy", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "could not be pushed to the Hugging Face Hub (OfflineModeIsEnabled" in offline.stderr
    missing = run("import", "me/nothing")
    assert missing.returncode == 2
    assert "source=me/nothing is no folder here, not in" in missing.stderr
    assert "(RepositoryNotFoundError" in missing.stderr


def test_bad_arguments_are_refused_before_anything_is_sent(keypoints_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "evaluation.json").write_text(json.dumps({"weights": "of another"}))
    for arguments, said in {
        ("me",): "--repo-id me must be <owner>/<name>",
        ("me/policy", "--evaluation", "nowhere"): "--evaluation nowhere holds no evaluation.json",
        ("me/policy", "--evaluation", str(other)): "is of other weights than",
    }.items():
        with pytest.raises(InputError, match=said):
            push(parser().parse_args([str(keypoints_run), "--repo-id", *arguments]))
    shown = push(parser().parse_args([str(keypoints_run), "--repo-id", "me/policy", "--dry-run"]))
    assert "Not evaluated in a simulator." in shown
    assert shown.splitlines()[-1] == "  README.md"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("me/policy", True),
        ("me/policy@v1.0", True),
        ("policy", False),
        ("a/b/c", False),
        ("../x", False),
        ("/x/y", False),
    ],
)
def test_names_on_the_hub(source: str, expected: bool) -> None:
    assert is_repo_id(source) == expected


def test_a_mistyped_local_folder_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lerobot").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_repo_id("outputs/pusht_cpu")
    assert is_repo_id("lerobot/diffusion_pusht")  # beside a clone of LeRobot
