"""`python -m getiaction.demonstrate`: what it records, that it repeats itself, what it refuses, how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import warm

from getiaction.data.writer import write_dataset
from getiaction.demonstrate import main
from getiaction.machine import scheduling
from getiaction.simulation.demonstrations import DONE, REWARD, SUCCESS, Attempts, collect, demonstrate
from getiaction.simulation.environment import Step
from getiaction.simulation.pusht import OBS_IMAGE, OBS_STATE, PushT

PATIENCE = 240  # seconds


def command(folder: Path, *overrides: str) -> list[str]:
    return ["-m", "getiaction.demonstrate", f"output_dir={folder}", *overrides]


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return warm.run(*command(folder, *overrides), cwd=folder.parent, timeout=PATIENCE)


def rows(folder: Path) -> dict[str, np.ndarray]:
    """Return what a dataset holds besides its pictures."""
    table = pq.read_table(folder / "dataset" / "data" / "chunk-000" / "file-000.parquet")
    keys = (OBS_STATE, "observation.environment_state", "action", REWARD, SUCCESS, DONE, "episode_index")
    return {key: np.array(table[key].to_pylist()) for key in keys}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two demonstrations, made in this machine's processes."""
    folder = tmp_path_factory.mktemp("demonstrate") / "run"
    finished = run(folder, "episodes=2", "seed=3", "midway=0.5", "num_workers=2")
    assert finished.returncode == 0, finished.stderr
    assert "dataset.root=" in finished.stderr + finished.stdout
    return folder


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_undisturbed_actions_played_again_bring_the_recorded_rewards() -> None:
    frames = demonstrate(PushT(), 5, 0)
    assert frames is not None
    environment = PushT()
    environment.reset(5)
    for action, reward, state in zip(frames["action"], frames[REWARD], frames[OBS_STATE], strict=True):
        assert (environment.observe([OBS_STATE])[OBS_STATE] == state).all()
        assert environment.step(action).reward == pytest.approx(float(reward), abs=1e-6)
    assert frames[SUCCESS].any()
    assert frames[OBS_IMAGE].shape == (len(frames["action"]), 3, 96, 96)
    assert frames[DONE].tolist() == [False] * (len(frames["action"]) - 1) + [True]


def test_writing_leaves_this_process_its_place_among_others(tmp_path: Path) -> None:
    """The video encoder takes real time from root, and would keep it."""
    before = scheduling()
    frames = demonstrate(PushT(), 5, 0)
    assert frames is not None
    short = {key: value[:3] for key, value in frames.items()}
    write_dataset(tmp_path / "dataset", [short], repo_id="me/pushes", fps=10, task="push", readme="")
    assert scheduling() == before


def test_it_goes_on_after_success_while_it_improves() -> None:
    frames = demonstrate(PushT(), 5, 0)
    assert frames is not None
    first = int(frames[SUCCESS].argmax())
    assert first < len(frames[SUCCESS]) - 1
    assert frames[SUCCESS][-1]


def test_a_disturbed_expert_comes_back_and_its_wish_is_what_is_recorded() -> None:
    calm, disturbed = demonstrate(PushT(), 5, 0), demonstrate(PushT(), 5, 0, disturbance=0.4)
    assert calm is not None
    assert disturbed is not None
    assert (calm["action"][0] == disturbed["action"][0]).all()  # the same start, the same wish
    assert (calm[OBS_STATE][1] != disturbed[OBS_STATE][1]).any()
    again = demonstrate(PushT(), 5, 0, disturbance=0.4)
    assert again is not None
    assert (again["action"] == disturbed["action"]).all()


def test_a_share_of_the_episodes_starts_midway() -> None:
    """There the agent is at the block: within 70 pixels of it, where gym-pusht's own starts seldom put it."""
    own, midway = (demonstrate(PushT(), 7, 0, midway=share) for share in (0.0, 1.0))
    assert own is not None
    assert midway is not None
    assert (own[OBS_STATE][0] != midway[OBS_STATE][0]).any()
    environment = PushT()
    environment.reset_midway(7)
    assert (environment.observe([OBS_STATE])[OBS_STATE] == midway[OBS_STATE][0]).all()
    half = [np.random.default_rng([start, 1]).random() < 0.5 for start in range(12)]
    assert 0 < sum(half) < 12
    for start, expected in enumerate(half):
        frames = demonstrate(StartOnly(), start, 0, midway=0.5)
        assert frames is not None
        environment.reset_midway(start) if expected else environment.reset(start)
        assert (frames[OBS_STATE][0] == environment.observe([OBS_STATE])[OBS_STATE]).all()


class StartOnly(PushT):
    """Succeeds at once."""

    def __init__(self) -> None:
        super().__init__(max_steps=1)
        self.observation_shapes = {OBS_STATE: (2,)}

    def step(self, action: np.ndarray) -> Step:
        return Step(1.0, True, {"coverage": 1.0})


def test_an_attempt_that_runs_out_of_time_is_none() -> None:
    assert demonstrate(PushT(max_steps=5), 5, 0) is None


def test_the_first_that_succeed_are_taken_whoever_is_faster(tmp_path: Path) -> None:
    make = partial(PushT, max_steps=50)  # some starts are too far for that
    found = {}
    for workers in (0, 2):
        attempts = Attempts(tmp_path / str(workers), {"workers": workers})
        found[workers] = collect(
            make,
            attempts,
            episodes=3,
            seeds=lambda number: (number, 0),
            midway=0.0,
            disturbance=0.0,
            num_workers=workers,
        )
        assert not any(
            attempts.succeeded(number) for number in range(found[workers][1]) if number not in found[workers][0]
        )
    assert found[0] == found[2]
    assert found[0][1] > 3  # some failed


def test_lerobot_opens_the_dataset_and_sees_what_was_recorded(recorded: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("getiaction/demo", root=recorded / "dataset")
    assert dataset.meta.total_episodes == 2
    assert dataset.fps == 10
    item, stored = dataset[3], rows(recorded)
    assert item["task"].startswith("Push the T")
    assert item[OBS_IMAGE].shape == (3, 96, 96)
    assert np.allclose(item["action"].numpy(), stored["action"][3])
    assert float(item[OBS_IMAGE].mean()) > 0.5  # a white world


def test_the_folder_says_what_made_it(recorded: Path) -> None:
    text = (recorded / "dataset" / "README.md").read_text()
    assert "python -m getiaction.demonstrate env=pusht episodes=2 seed=3 midway=0.5" in text
    assert "asked for, and what was done" in text  # nothing disturbed it
    assert not (recorded / "attempts").exists()


# --- stopped ----------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_ends_with_the_same_data(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (tmp_path / "said.log").open("w") as said:
        asked = command(folder, "episodes=2", "seed=3", "midway=0.5", "num_workers=0")
        process = warm.start(*asked, stdout=said, stderr=said)
    deadline = time.monotonic() + PATIENCE
    while not (folder / "attempts" / "000000.npz").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "dataset").exists()
    kept = (folder / "attempts" / "000000.npz").stat().st_mtime_ns
    other = run(folder, "episodes=2", "seed=4", "midway=0.5", "num_workers=0")
    assert other.returncode == 2
    assert "give another output_dir" in other.stderr
    attempts = Attempts(folder / "attempts", json.loads((folder / "attempts" / "about.json").read_text()))
    assert attempts.path(0).stat().st_mtime_ns == kept
    assert run(folder, "episodes=2", "seed=3", "midway=0.5", "num_workers=0").returncode == 0
    once, again = rows(recorded), rows(folder)
    assert all((once[key] == again[key]).all() for key in once)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("episodes=0", "episodes=0 must be a whole number of at least 1"),
        ("midway=1.5", "midway=1.5 must be between 0 and 1"),
        ("disturbance=-1", "disturbance=-1.0 must be 0 or more"),
        ("env=none", "there is no simulator"),
        ("env=pushy", "env=pushy does not exist: did you mean pusht?"),
        ("episode=5", "episode does not exist: did you mean episodes?"),
    ],
)
def test_mistakes_get_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["demonstrate", f"output_dir={tmp_path / 'run'}", override])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in line
    assert not (tmp_path / "run/dataset").exists()


def test_a_dataset_is_never_overwritten(recorded: Path) -> None:
    finished = run(recorded, "episodes=1", "seed=9")
    assert finished.returncode == 2
    assert "give another output_dir" in finished.stderr


def test_an_expert_that_always_fails_ends_the_run(tmp_path: Path) -> None:
    words = [sys.executable, *command(tmp_path / "run", "episodes=1", "env.max_steps=1", "num_workers=0")]  # cold
    finished = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, check=False)
    assert finished.returncode == 1
    assert "only 0 of 50 attempts succeeded" in finished.stderr
