"""`python -m getiaction.evaluate`: the same episodes however it runs or is stopped, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import psutil
import pytest
import torch
import warm
from diffusers import DDPMScheduler
from PIL import Image

from getiaction.config.sampling import change_scheduler, find_scheduler
from getiaction.errors import InputError
from getiaction.evaluate import main
from getiaction.interop.lerobot import load_policy

SHORT = ("env=pusht", "env.max_steps=20", "device=cpu", "num_threads=1", "videos=false", "num_workers=0")
SLOW = (*SHORT[:1], "env.max_steps=120", *SHORT[2:], "num_envs=1")
ENDLESS = (*SLOW, "episodes=500")  # a minute and more
PATIENCE = 300  # seconds until a test gives up waiting for a process

Command = Callable[..., int]


@pytest.fixture(scope="module", autouse=True)
def _own_threads() -> Iterator[None]:
    """Leave the number of threads, which the command sets, as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs the command in this process; it returns the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["getiaction.evaluate", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def episodes(folder: Path) -> list[dict[str, Any]]:
    """Return what the log holds, actions too, by seed."""
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()[1:]]
    return sorted(lines, key=lambda line: line["seed"])


# --- the same episodes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_by_one(keypoints_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an evaluation of five episodes, one at a time."""
    folder = tmp_path_factory.mktemp("one_by_one")
    with pytest.MonkeyPatch.context() as patch:
        overrides = [f"checkpoint={keypoints_run}", *SHORT, "episodes=5", "num_envs=1", f"output_dir={folder}"]
        patch.setattr(sys, "argv", ["getiaction.evaluate", *overrides])
        main()
    return folder


@pytest.mark.parametrize("crowd", [("num_envs=3",), ("num_envs=5", "num_workers=2")], ids=["here", "in workers"])
def test_how_many_run_at_once_changes_nothing(
    keypoints_run: Path, one_by_one: Path, tmp_path: Path, command: Command, crowd: tuple[str, ...]
) -> None:
    short = [argument for argument in SHORT if argument != "num_workers=0" or len(crowd) == 1]
    assert command(f"checkpoint={keypoints_run}", *short, "episodes=5", *crowd, f"output_dir={tmp_path}") == 0
    assert episodes(tmp_path) == episodes(one_by_one)
    assert read(tmp_path)["rows"] == read(one_by_one)["rows"]
    assert (tmp_path / "episodes.csv").read_text() == (one_by_one / "episodes.csv").read_text()


def test_more_episodes_go_on_from_those_that_are_there(
    keypoints_run: Path, one_by_one: Path, tmp_path: Path, command: Command
) -> None:
    folder = shutil.copytree(one_by_one, tmp_path / "more")
    before = (folder / "episodes.jsonl").read_text()
    assert command(f"checkpoint={keypoints_run}", *SHORT, "episodes=6", "num_envs=1", f"output_dir={folder}") == 0
    assert (folder / "episodes.jsonl").read_text().startswith(before)
    assert [row["seed"] for row in read(folder)["rows"]] == list(range(1000, 1006))
    rate = read(folder)["episodes_per_minute"]
    assert command(f"checkpoint={keypoints_run}", *SHORT, "episodes=6", f"output_dir={folder}") == 0
    assert read(folder)["episodes_per_minute"] == rate > 0  # there was nothing left to run


# --- stopped and gone on ----------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    words = ("-m", "getiaction.evaluate", *arguments, f"output_dir={folder}")
    with folder.with_suffix(".log").open("a") as said:
        return warm.start(*words, stdout=said, stderr=subprocess.STDOUT, cwd=folder.parent, start_new_session=True)


def wait_for_lines(log: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a running process has written so many lines."""
    deadline = time.monotonic() + PATIENCE
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert process.poll() is None, log.parent.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_interrupted_and_gone_on_equals_uninterrupted(
    keypoints_run: Path, tmp_path: Path, command: Command
) -> None:
    """The stopped runs ask for far more episodes than they get to: a busy machine may look away for seconds."""
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    log = folder / "episodes.jsonl"

    def run_until(count: int, number: int) -> int:
        """Run until `count` episodes are there, and stop by a signal; return the exit code."""
        process = start(folder, f"checkpoint={keypoints_run}", *ENDLESS)
        wait_for_lines(log, count + 1, process)  # and a line that says whose they are
        process.send_signal(number)
        return process.wait(PATIENCE)

    assert run_until(2, signal.SIGKILL) == -signal.SIGKILL
    killed = len(episodes(folder))
    with log.open("a") as file:
        file.write('{"seed": 1999, "success": fa')  # a line that the kill cut short
    assert run_until(killed + 2, signal.SIGINT) == 130
    said = folder.with_suffix(".log").read_text()
    assert f"To go on: python -m getiaction.evaluate checkpoint={keypoints_run}" in said
    assert "Traceback" not in said
    assert killed < len(episodes(folder)) < 500
    assert not (folder / "evaluation.json").exists()
    enough = (*SLOW, f"episodes={len(episodes(folder)) + 2}")
    assert command(f"checkpoint={keypoints_run}", *enough, f"output_dir={folder}") == 0
    assert command(f"checkpoint={keypoints_run}", *enough, f"output_dir={whole}") == 0
    assert episodes(folder) == episodes(whole)
    assert read(folder)["rows"] == read(whole)["rows"]
    assert read(folder)["score"] == read(whole)["score"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("env.max_steps=21", "env"),
        ("num_inference_steps=3", "num_inference_steps"),
        ("batch_size=32", "batch_size"),
        ("n_action_steps=4", "policy"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(
    keypoints_run: Path, one_by_one: Path, command: Command, capsys: pytest.CaptureFixture[str], change: str, key: str
) -> None:
    short = [argument for argument in SHORT if argument.split("=")[0] != change.split("=")[0]]
    before = (one_by_one / "episodes.jsonl").read_text()
    assert command(f"checkpoint={keypoints_run}", *short, change, "episodes=5", f"output_dir={one_by_one}") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"holds episodes of another evaluation ({key} was" in line
    assert (one_by_one / "episodes.jsonl").read_text() == before


def test_a_folder_of_another_checkpoint_is_refused(
    make_run: Callable[..., Path], one_by_one: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run("policy.n_action_steps=7")
    weights = other / "checkpoints/000001/pretrained_model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert command(f"checkpoint={other}", *SHORT, "episodes=5", f"output_dir={one_by_one}") == 2
    assert "holds episodes of another evaluation (" in capsys.readouterr().err


def test_a_killed_worker_ends_the_evaluation_with_one_message(keypoints_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    arguments = [argument for argument in ENDLESS if argument != "num_workers=0"]
    process = start(folder, f"checkpoint={keypoints_run}", *arguments, "num_workers=1")
    wait_for_lines(folder / "episodes.jsonl", 2, process)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 1
    workers[0].kill()
    assert process.wait(PATIENCE) == 1
    said = folder.with_suffix(".log").read_text()
    assert "error: a simulator's process ended by itself: out of memory, or killed" in said
    assert "Traceback" not in said


# --- what is written --------------------------------------------------------------------------------------------------


def test_numbers_sheet_and_films_tell_the_same(keypoints_run: Path, tmp_path: Path, command: Command) -> None:
    arguments = [argument for argument in SHORT if argument != "videos=false"]
    assert command(f"checkpoint={keypoints_run}", *arguments, "episodes=4", f"output_dir={tmp_path}") == 0
    found = read(tmp_path)
    rows = found["rows"]
    assert [row["seed"] for row in rows] == [1000, 1001, 1002, 1003]
    assert found["episodes"] == 4
    for value in (found["score"], found["success"], found["length"], found["largest"]["coverage"]):
        assert value["low"] <= value["mean"] <= value["high"]
    assert found["score"]["mean"] == pytest.approx(sum(row["score"] for row in rows) / 4)
    assert found["success"]["mean"] == sum(row["success"] for row in rows) / 4
    assert found["length"]["mean"] == 20
    assert found["checkpoint"].startswith(str(keypoints_run))
    assert found["env"]["max_steps"] == 20
    assert {"torch", "lerobot", "gym-pusht"} <= found["versions"].keys()
    assert found["latency_ms"] > 0
    with (tmp_path / "episodes.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == table
    sheet = Image.open(tmp_path / "contact_sheet.png")
    sheet.load()
    assert sheet.size == (4 * 128, 128)
    films = sorted((tmp_path / "videos").iterdir())
    assert [film.name.split("_")[0] for film in films] == ["best", "median", "worst"]
    ranked = sorted(rows, key=lambda row: (-row["score"], row["length"], row["seed"]))
    assert int(films[0].stem.rsplit("_", 1)[1]) == ranked[0]["seed"]
    for film in films:
        with av.open(film) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 10
        assert len(frames) == 20
        assert frames[0].shape == (384, 384, 3)
        assert (frames[0] != frames[-1]).any()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(make_run: Callable[..., Path], keypoints_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    bare = tmp_path_factory.mktemp("bare") / "policy"
    shutil.copytree(keypoints_run / "checkpoints/000001/pretrained_model", bare)
    return {
        "run": keypoints_run,
        "bare": bare,
        "empty": tmp_path_factory.mktemp("empty"),
        "real": make_run("env=none", "evaluation.final_episodes=null"),
        "aloha": make_run(**{"images.top": (3, 48, 48)}),
        "small": make_run(image=(3, 48, 48)),
        "three": make_run(action_dim=3),
    }


MISTAKES = [
    ("", [], "checkpoint= is needed: A run folder"),
    ("nowhere", [], "nowhere is no folder: give a run folder"),
    ("empty", [], "holds no policy (no model.safetensors): give a run folder with checkpoints"),
    ("bare", [], "belongs to no run that names its simulator: say which, env=pusht"),
    ("real", [], "env=none: there is no simulator for this data"),
    ("run", ["env=none"], "env=none: there is no simulator for this data"),
    ("aloha", ["env=pusht"], "the policy needs observation.images.top, env=pusht shows observation.state, "),
    ("small", ["env=pusht"], "(3, 96, 96) in env=pusht, the policy needs (3, 48, 48): use env.image_size=[48, 48]"),
    ("three", [], "env=pusht takes actions of 2 numbers, the policy makes 3"),
    ("run", ["episodes=0"], "episodes=0 must be a whole number of at least 1"),
    ("run", ["batch_size=10"], "batch_size=10 must be a multiple of 16"),
    ("run", ["num_inference_steps=21"], "num_inference_steps=21 must be between 1 and 20"),
    ("run", ["num_inference_steps=1"], "num_inference_steps=1 starts DDPMScheduler where 99% of the noise is gone"),
    ("run", ["n_action_steps=0"], "n_action_steps=0 must be between 1 and the policy's horizon - n_obs_steps + 1 = "),
    ("run", ["n_action_steps=17"], "n_action_steps=17 must be between 1 and the policy's horizon - n_obs_steps + 1 = "),
    ("run", ["device=gpu"], "device=gpu is not here: use "),
    ("run", ["episode=5"], "episode does not exist: did you mean episodes?"),
    ("run", ["env=pushy"], "env=pushy does not exist: did you mean pusht?"),
    (
        "run",
        ["env.max_steps=5"],
        "env.max_steps is not in the env that is chosen: choose one that has it, env=<",
    ),
    ("run", ["env=pusht", "env.max_steps=0"], "env.max_steps=0 must be a whole number of at least 1"),
    ("run", ["env=pusht", "env.image_size=[96]"], "env.image_size=[96] must be two positive numbers"),
    ("run", ["env=pusht", "+env.speed=2"], "env cannot be built: "),
]


@pytest.mark.parametrize(("place", "overrides", "message"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_one_line_and_exit_code_2(
    folders: dict[str, Path],
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    place: str,
    overrides: list[str],
    message: str,
) -> None:
    chosen = [f"checkpoint={folders.get(place, tmp_path / place)}"] if place else []
    assert command(*chosen, *overrides, f"output_dir={tmp_path / 'out'}") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert message in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".log"]


def test_a_folder_that_cannot_be_made_is_one_line(
    keypoints_run: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command(f"checkpoint={keypoints_run}", f"output_dir={tmp_path / 'file' / 'run'}") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("error: output_dir cannot be made")
    assert str(tmp_path / "file") in line


def test_a_device_that_is_not_here_is_refused(
    keypoints_run: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "mps" if torch.cuda.is_available() else "cuda"
    assert command(f"checkpoint={keypoints_run}", f"device={missing}", f"output_dir={tmp_path}") == 2
    assert f"error: device={missing} is not here: use " in capsys.readouterr().err


def test_the_environment_of_the_run_is_found_in_its_config(
    make_run: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    run = make_run("env.max_steps=9")
    assert command(f"checkpoint={run}", "episodes=1", "videos=false", "num_workers=0", f"output_dir={tmp_path}") == 0
    assert read(tmp_path)["length"]["mean"] == 9


def test_a_simulator_of_somebody_elses_is_not_run(
    keypoints_run: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(keypoints_run, tmp_path / "run", symlinks=True)
    (run / "config.yaml").write_text("env: {_target_: os.getcwd}")
    assert command(f"checkpoint={run}", "device=cpu", f"output_dir={tmp_path / 'out'}") == 2
    assert "names the simulator os.getcwd, which is not ours: say which, env=pusht" in capsys.readouterr().err


def test_a_policy_folder_without_a_run_asks_for_the_simulator(
    keypoints_run: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(keypoints_run / "checkpoints/last/pretrained_model", tmp_path / "policy")
    (tmp_path.parent.parent / "config.yaml").write_text("- nothing of ours")  # where a run's would lie
    try:
        assert command(f"checkpoint={tmp_path / 'policy'}", "device=cpu", f"output_dir={tmp_path / 'out'}") == 2
    finally:
        (tmp_path.parent.parent / "config.yaml").unlink()
    assert "belongs to no run that names its simulator: say which, env=pusht" in capsys.readouterr().err


# --- another sampler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddim", "DDIMScheduler"), ("dpm_solver", "DPMSolverMultistepScheduler"), ("ddpm", "DDPMScheduler")],
)
def test_another_sampler_is_one_override_away(
    keypoints_run: Path, tmp_path: Path, command: Command, name: str, kind: str
) -> None:
    more = ("episodes=1", "env.max_steps=4", f"scheduler={name}", "num_inference_steps=2", f"output_dir={tmp_path}")
    assert command(f"checkpoint={keypoints_run}", *SHORT[:1], *SHORT[2:], *more) == 0
    assert read(tmp_path)["scheduler"]["class"] == kind
    assert read(tmp_path)["scheduler"]["config"]["num_train_timesteps"] == 20  # as it was trained


def test_it_may_look_again_sooner(keypoints_run: Path, one_by_one: Path, tmp_path: Path, command: Command) -> None:
    """The first actions come from the same chunk; then it has looked again, and goes another way."""
    more = ("n_action_steps=4", "episodes=1", f"output_dir={tmp_path}")
    assert command(f"checkpoint={keypoints_run}", *SHORT, *more) == 0
    assert read(tmp_path)["policy"]["n_action_steps"] == 4
    (sooner,), usual = episodes(tmp_path), episodes(one_by_one)[0]
    assert sooner["actions"][:4] == usual["actions"][:4]
    assert sooner["actions"][4:8] != usual["actions"][4:8]


def test_a_sampler_of_other_noise_is_refused(keypoints_run: Path) -> None:
    policy = load_policy(keypoints_run / "checkpoints/last/pretrained_model")
    with pytest.raises(InputError, match=r"cannot change after training|adds noise in another way"):
        change_scheduler(policy, {"_target_": "diffusers.DDIMScheduler", "beta_start": 0.1})


def test_a_flow_keeps_to_flow_matching(make_run: Callable[..., Path]) -> None:
    policy = load_policy(make_run("scheduler=flow_matching", "scheduler.prediction_type=sample"))
    assert policy.prediction_type == "sample"
    change_scheduler(policy, find_scheduler("flow_matching") | {"prediction_type": "sample"})
    change_scheduler(policy, find_scheduler("flow_matching"))  # what the leaf says is not asked for
    assert type(policy.noise_scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(InputError, match=r"adds noise in another way .* use flow_matching"):
        change_scheduler(policy, find_scheduler("ddim"))
    with pytest.raises(InputError, match=r"scheduler\.shift=3\.0 cannot change after training, where it was 1\.0"):
        change_scheduler(policy, find_scheduler("flow_matching") | {"shift": 3.0})


def test_acting_in_bf16_is_another_evaluation(keypoints_run: Path, tmp_path: Path, command: Command) -> None:
    more = ("episodes=2", "env.max_steps=30", f"output_dir={tmp_path}")
    short = (f"checkpoint={keypoints_run}", *SHORT[:1], *SHORT[2:])
    assert command(*short, *more, "mixed_precision=bf16", "tf32=false") == 0
    assert read(tmp_path)["mixed_precision"] == "bf16"
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is False
    half = episodes(tmp_path)
    assert command(*short, *more) == 2  # the folder holds episodes of the other
    assert command(*short, *more[:2], f"output_dir={tmp_path / 'full'}") == 0
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is True
    full = episodes(tmp_path / "full")
    assert [row["actions"] for row in half] != [row["actions"] for row in full]
    assert half[0]["actions"][0] == pytest.approx(full[0]["actions"][0], abs=5)  # pixels
    assert command(*short, *more[:2], "mixed_precision=int8", f"output_dir={tmp_path / 'int8'}") == 2


def test_the_policys_own_settings_hold_unless_others_are_asked_for(keypoints_run: Path) -> None:
    policy = load_policy(keypoints_run / "checkpoints/last/pretrained_model")
    policy.noise_scheduler = DDPMScheduler.from_config(
        policy.noise_scheduler.config, clip_sample=False, timestep_spacing="trailing"
    )
    change_scheduler(policy, find_scheduler("ddim"))
    config = policy.noise_scheduler.config
    assert (config.clip_sample, config.timestep_spacing, config.num_train_timesteps) == (False, "trailing", 20)
    change_scheduler(policy, find_scheduler("ddim") | {"clip_sample_range": 0.5})
    assert policy.noise_scheduler.config.clip_sample_range == 0.5
    with pytest.raises(InputError, match=r"scheduler\.prediction_type=v_prediction cannot change after training"):
        change_scheduler(policy, find_scheduler("ddim") | {"prediction_type": "v_prediction"})
