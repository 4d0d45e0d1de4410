"""Run a training again and again, each time until an accident: `python -m torture PLAN.json`. See test_torture.py.

Each run is a fork of this process, which has imported and composed everything: a start takes no time, not five seconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import getiaction.config.run  # noqa: F401
from getiaction.config.compose import compose
from getiaction.config.resume import can_go_on, resumed_config
from getiaction.config.schema import Config
from getiaction.errors import TrainingError
from getiaction.report import run as report
from getiaction.train import train
from getiaction.training.checkpoint import find_damage
from getiaction.training.loop import Trainer

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "shutil.rmtree"}
FULL_DISK, DONE = 28, 0


def run_once(config: Config, resuming: Config | None, folder: Path, accident: dict[str, Any]) -> None:
    """Train, or go on; end this process as the accident says, or with its exit code."""
    os.chdir(folder.parent)
    report.draw_report = lambda *_: []  # pictures take longer than all the rest
    if accident.get("aside"):
        save_aside()
    arrange(accident, folder)
    if resuming is not None:
        config = resumed_config(resuming, [f"training.resume='{folder}'"], folder)
    try:
        train(config, folder)
    except TrainingError as error:
        print(error, flush=True)
        os._exit(FULL_DISK)
    os._exit(DONE)


def save_aside() -> None:
    """Let a run train on while it saves, as on a GPU."""
    fit = Trainer.fit

    def fit_aside(trainer: Trainer) -> dict[str, float]:
        trainer.saves_aside = True
        return fit(trainer)

    Trainer.fit = fit_aside  # type: ignore[method-assign]


def arrange(accident: dict[str, Any], folder: Path) -> None:
    """Let the accident happen just before the given number of writes in the folder."""
    left = accident.get("writes")
    if left is None:
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # here: a thread may not
    if accident["what"] == "full disk":
        nowhere = os.open(os.devnull, os.O_WRONLY)  # what the run says may go to a file, which would be full as well
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event in WRITES or (
            event == "open" and isinstance(arguments[1], str) and set("wxa+") & set(arguments[1])
        )
        if not writes or not str(arguments[0]).startswith(str(folder)):
            return
        left -= 1
        if left == 0 and accident["what"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # as a quota that is used up

    sys.addaudithook(hook)


def wait(process: int, accident: dict[str, Any]) -> int:
    """Wait for the end of a run, or end it in time; return its exit code."""
    if "seconds" in accident:
        time.sleep(accident["seconds"])
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def look(folder: Path) -> dict[str, Any]:
    """Return what is saved, and what of it is damaged: nothing ever is."""
    saved = sorted(folder.glob("checkpoints/[0-9]*"))
    return {"saved": [int(path.name) for path in saved], "damaged": [str(path) for path in saved if find_damage(path)]}


def main() -> None:
    """Run the plan, and print what became of each run, a line each."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(plan["folder"])
    config = compose([*plan["overrides"], f"output_dir='{folder}'"])
    resuming = None
    for accident in plan["accidents"]:
        if resuming is None and can_go_on(folder):
            resuming = compose([f"training.resume='{folder}'"])
        process = os.fork()
        if process == 0:
            run_once(config, resuming, folder, accident)
        print(json.dumps({"code": wait(process, accident), **look(folder)}), flush=True)


if __name__ == "__main__":
    main()
