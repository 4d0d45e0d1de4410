"""Real processes on the CPU (gloo): the same run as one process with the same global batch."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from composing import compose
from safetensors.torch import load_file

from getiaction.config.launch import environment_for
from getiaction.config.resume import resumed_config
from getiaction.errors import InputError
from getiaction.training.metrics import read_metrics

TWO = ("hardware.num_processes=2", "hardware.num_threads=1", "training.batch_size=4", "training.max_steps=6")
LAUNCHERS = {
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "accelerate": (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=2"),
}


@pytest.fixture(scope="module")
def alone(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    tiny.fit(folder, "training.batch_size=8", "training.max_steps=6")
    return folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(tiny: Any, helpers: Any, tmp_path: Path, alone: Path, launcher: str) -> None:
    folder = tmp_path / "run"
    process = tiny.start(folder, *TWO, launcher=LAUNCHERS[launcher])
    assert helpers.finish(process) == 0, helpers.said(folder)
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert helpers.losses(folder) == pytest.approx(helpers.losses(alone), rel=1e-4)
    assert [line["step"] for line in read_metrics(folder) if "val_loss" in line] == [6]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"000002", "000004", "000006", "last"}
    assert_close_weights(folder, alone)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


@pytest.mark.parametrize(("device", "hidden"), [("cpu", ""), ("auto", None)])
def test_processes_on_the_cpu_see_no_gpu(monkeypatch: pytest.MonkeyPatch, device: str, hidden: str | None) -> None:
    """A barrier would take one for each, and there may be fewer."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hardware = compose(["+preset=pusht_cpu", *TWO, f"hardware.device={device}"]).hardware
    assert environment_for(hardware).get("CUDA_VISIBLE_DEVICES") == hidden


MULTIGPU = (  # the preset for four GPUs, reduced: batch norm over all processes, two micro-batches a step
    "+preset=pusht_multigpu",
    "backbone=resnet18",
    "backbone.norm=batch",
    "backbone.weights=null",
    "backbone.resize_shape=[40,40]",
    "backbone.crop_shape=[36,36]",
    "unet.down_dims=[16,32]",
    "lr_scheduler.num_warmup_steps=2",
    "training.save_every=3",
    "training.log_every=1",
    "validation.every=null",
    "validation.max_sampled=2",
    "hardware.device=cpu",
    "hardware.mixed_precision=no",
)


# Of a global batch of 16: whose run goes on, on how many processes. More of them are below, by their arithmetic alone.
SPLITS = (
    ("four", 1, "8 per device x 1 processes x 2"),
    ("one", 2, "4 per device x 2 processes x 2"),
)


def test_pusht_multigpu_on_four_processes_equals_one_and_goes_on_with_fewer_and_more(
    tiny: Any, helpers: Any, tmp_path: Path
) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    data = (*MULTIGPU, f"dataset.root={tiny.root}", "training.max_steps=6", "hardware.num_threads=1")
    started = [
        tiny.start_command(one, *data, f"output_dir={one}", "hardware.num_processes=1", "training.batch_size=8"),
        tiny.start_command(four, *data, f"output_dir={four}", "training.batch_size=2"),
    ]
    assert [helpers.finish(process) for process in started] == [0, 0], helpers.said(four)
    assert "batch: 2 per device x 4 processes x 2 accumulation = 16" in helpers.said(four)
    assert "learning rate 0.0002 (optimizer.scale_lr=none)" in helpers.said(four)
    assert helpers.losses(four) == pytest.approx(helpers.losses(one), rel=1e-3)  # batch norm amplifies rounding
    for run, processes, split in SPLITS:
        folder = shutil.copytree(tmp_path / run, tmp_path / f"on_{processes}", symlinks=True)
        helpers.remove_checkpoint(folder, 6)
        more = (f"hardware.num_processes={processes}", f"training.batch_size={8 // processes}")  # as batch norm saw it
        process = tiny.start_command(folder, f"training.resume={folder}", *more)
        assert helpers.finish(process) == 0, helpers.said(folder)
        assert f"batch: {split} accumulation = 16" in helpers.said(folder)
        assert helpers.losses(folder)[:3] == helpers.losses(tmp_path / run)[:3]
        assert helpers.losses(folder) == pytest.approx(helpers.losses(one), rel=1e-3)


@pytest.fixture
def saved_by_four(tmp_path: Path) -> Path:
    """Return what a run of pusht_multigpu on four processes says of itself: a global batch of 4 x 2 x 2."""
    state = tmp_path / "run/checkpoints/000003/training_state"
    state.mkdir(parents=True)
    (state / "training_step.json").write_text(json.dumps({"step": 3, "global_batch_size": 16}))
    config = compose([*MULTIGPU, "training.batch_size=2", f"output_dir={tmp_path / 'run'}"])
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(asdict(config)))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("processes", "given", "split", "warns"),
    [
        (1, (), (2, 8), True),
        (2, (), (2, 4), True),
        (4, (), (2, 2), False),
        (8, (), (2, 1), True),
        (16, (), (1, 1), True),
        (1, ("training.batch_size=8",), (8, 2), False),
        (2, ("++training.gradient_accumulation_steps=3",), (2, 3), False),  # as asked, and refused then
        (2, ("training.batch_size=3",), (3, 2), False),  # fits nothing: refused when the data are there
    ],
)
def test_the_global_batch_is_shared_anew(
    saved_by_four: Path,
    caplog: pytest.LogCaptureFixture,
    processes: int,
    given: tuple[str, ...],
    split: tuple[int, int],
    warns: bool,
) -> None:
    overrides = [f"training.resume={saved_by_four}", f"hardware.num_processes={processes}", *given]
    training = resumed_config(compose(overrides), overrides, saved_by_four).training
    assert (training.batch_size, training.gradient_accumulation_steps) == split
    assert ("batch norm" in caplog.text) == warns


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(saved_by_four: Path) -> None:
    overrides = [f"training.resume={saved_by_four}", "hardware.num_processes=3"]
    with pytest.raises(InputError, match="global batch of 16 cannot be shared by 3 processes"):
        resumed_config(compose(overrides), overrides, saved_by_four)


def test_two_machines_meet(tiny: Any, helpers: Any, tmp_path: Path, alone: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = ("hardware.num_nodes=2", "hardware.num_processes=1", f"hardware.rendezvous={place}")
    folder = tmp_path / "run"
    processes = [tiny.start(folder, *TWO, *nodes) for _ in range(2)]
    assert [helpers.finish(process) for process in processes] == [0, 0], helpers.said(folder)
    assert "starting 1 processes on each of 2 machines" in helpers.said(folder)
    assert helpers.losses(folder) == pytest.approx(helpers.losses(alone), rel=1e-4)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("sqrt", 2), ("linear", 4)])
def test_the_rate_follows_the_batch_by_the_rule(tiny: Any, tmp_path: Path, rule: str, factor: int) -> None:
    trainer = tiny.trainer(tmp_path, f"optimizer.scale_lr={rule}", "training.gradient_accumulation_steps=4")
    assert trainer.optimizer.param_groups[0]["initial_lr"] == pytest.approx(1e-3 * factor)


def test_processes_share_the_episodes_of_an_evaluation(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    tiny.train(tmp_path / "run", "training.batch_size=8")
    episodes = {}
    for processes in (1, 2):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"on_{processes}", symlinks=True)
        wanted = ("evaluation.final_episodes=5", "evaluation.videos=false", "env.max_steps=12")
        split = (f"hardware.num_processes={processes}", "hardware.num_threads=1")
        process = tiny.start_command(folder, f"training.resume={folder}", *wanted, *split)
        assert helpers.finish(process) == 0, helpers.said(folder)
        episodes[processes] = sorted((folder / "evaluation/000004/episodes.jsonl").read_text().splitlines()[1:])
    assert len(episodes[1]) == 5
    assert episodes[1] == episodes[2]
    (score,) = {line["score"] for run in (1, 2) for line in read_metrics(tmp_path / f"on_{run}") if "score" in line}
    assert 0 <= score <= 1


def assert_close_weights(folder: Path, other: Path) -> None:
    for kind in ("pretrained_model", "training_state"):
        mine, theirs = (load_file(run / "checkpoints/last" / kind / "model.safetensors") for run in (folder, other))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value.numpy() == pytest.approx(theirs[key].numpy(), abs=1e-4), key


def test_pictures_and_accumulation_in_two_processes(tiny: Any, helpers: Any, tmp_path: Path) -> None:
    more = (*helpers.WITH_PICTURES, "training.max_steps=3")
    tiny.fit(tmp_path / "alone", *more, "training.batch_size=8")
    folder = tmp_path / "run"
    split = ("training.batch_size=2", "training.gradient_accumulation_steps=2")
    process = tiny.start(folder, *more, *TWO, *split, "training.max_steps=3")
    assert helpers.finish(process) == 0, helpers.said(folder)
    assert helpers.losses(folder) == pytest.approx(helpers.losses(tmp_path / "alone"), rel=1e-4)


def test_a_process_that_dies_ends_the_run_with_an_error_and_it_can_go_on(
    tiny: Any, helpers: Any, tmp_path: Path
) -> None:
    length = ("training.max_steps=60", "training.save_every=4")
    process = tiny.start_command(tmp_path / "run", *tiny.overrides(*TWO, *length))
    runs = tmp_path / "outputs/pusht_cpu"
    helpers.wait_until(lambda: any(runs.glob("*/checkpoints/[0-9]*")), process, tmp_path / "run")
    workers = workers_of(process)
    workers["1"].kill()
    assert helpers.finish(process) != 0
    assert_all_end(list(workers.values()))
    (folder,) = runs.iterdir()
    assert helpers.steps_saved(folder)[-1] < 60
    resumed = tiny.start_command(tmp_path / "resumed", f"training.resume={folder.relative_to(tmp_path)}")
    assert helpers.finish(resumed) == 0, helpers.said(tmp_path / "resumed")
    tiny.fit(tmp_path / "alone", "training.batch_size=8", *length)
    assert helpers.losses(folder) == pytest.approx(helpers.losses(tmp_path / "alone"), rel=1e-3)
    assert list(runs.iterdir()) == [folder]


BROKEN = """
import os, time, torch


class Adam(torch.optim.Adam):
    def step(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and self.param_groups[0]["params"][0].numel() > 1:  # not at the check's trial step
            {accident}
        return super().step(*args, **kwargs)
"""


@pytest.mark.parametrize(
    ("accident", "said"),
    [
        ("raise RuntimeError('the second GPU has fallen off')", "RuntimeError: the second GPU has fallen off"),
        ("time.sleep(1000)", "Timeout (0:00:03)!"),
    ],
)
def test_a_process_that_fails_or_hangs_ends_the_run_and_shows_where(
    tiny: Any, helpers: Any, tmp_path: Path, accident: str, said: str
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN.format(accident=accident))  # where the run is started
    folder = tmp_path / "run"
    process = tiny.start(folder, *TWO, "optimizer._target_=broken.Adam", "hardware.hang_timeout=3")
    assert helpers.finish(process) != 0
    assert said in helpers.said(folder)
    assert re.search(r'broken.py", line 8', helpers.said(folder))


@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        ("command", signal.SIGTERM, 143),  # kill, a container that stops
        ("group", signal.SIGINT, 130),  # Ctrl-C reaches every process of the terminal
        ("rank 1", signal.SIGTERM, None),  # a scheduler that is about to take one machine back
    ],
)
def test_a_signal_stops_all_processes_at_one_step(
    tiny: Any, helpers: Any, tmp_path: Path, target: str, number: signal.Signals, code: int | None
) -> None:
    folder = tmp_path / "run"
    process = tiny.start(folder, *TWO, "training.max_steps=600", "training.save_every=null", "training.log_every=2")
    helpers.wait_until(lambda: len(helpers.losses(folder)) > 2, process, folder)
    workers = workers_of(process)
    send = {"command": process.send_signal, "rank 1": workers["1"].send_signal}
    send.get(target, lambda signum: os.killpg(process.pid, signum))(number)
    assert_all_end(list(workers.values()))
    returned = helpers.finish(process)
    assert returned in ((code,) if code else range(1, 256))
    (step,) = helpers.steps_saved(folder)
    assert step == read_metrics(folder)[-1]["step"] < 600
    assert f"to go on: python -m getiaction.train training.resume={folder}" in helpers.said(folder)


def workers_of(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Return the training processes that a command has started, by rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}


def assert_all_end(processes: list[psutil.Process]) -> None:
    """Wait until processes have ended; end those that hang."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    for process in alive:
        process.kill()
    assert not alive
