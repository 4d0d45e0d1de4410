"""Start the processes of data-parallel training, by torch's own launcher, when a plain command asks for several.

On several machines the same plain command runs on each; the launchers meet at `hardware.rendezvous`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil
from hydra.core.hydra_config import HydraConfig

from getiaction.config.overrides import key_of, quote
from getiaction.config.schema import Config, HardwareConfig
from getiaction.config.sweep import in_sweep
from getiaction.errors import TrainingError
from getiaction.machine import count_cores
from getiaction.signals import STOPPING, WARNINGS
from getiaction.training.metrics import read_metrics

log = logging.getLogger(__name__)
LAUNCHED = "GETIACTION_LAUNCHED"
"""Set in the processes that `launch_processes` starts."""


def must_launch(config: Config) -> bool:
    """Tell whether several processes are wanted and no launcher (torchrun, accelerate) has started them."""
    return config.hardware.num_processes * config.hardware.num_nodes > 1 and "WORLD_SIZE" not in os.environ


def launch_processes(config: Config, folder: Path) -> dict[str, float]:
    """Run this command again under torchrun, `hardware.num_processes` times; return the last metrics.

    Raises:
        SystemExit: a process failed; its traceback has been printed.
        TrainingError: the same in a sweep, which goes on.
    """
    from getiaction.config.prepare import find_checked_data

    find_checked_data(config)
    hardware = config.hardware
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={hardware.num_processes}"),
        *meeting(hardware),
        *("-m", "getiaction.train", *overrides_for(config, folder)),
    ]
    elsewhere = f" on each of {hardware.num_nodes} machines" if hardware.num_nodes > 1 else ""
    log.info("starting %d processes%s", hardware.num_processes, elsewhere)
    if code := run_and_forward_signals(command, environment_for(hardware)):
        if in_sweep() and code < 128:
            raise TrainingError(f"a process of {folder} ended with {code}; what it said is above")
        sys.exit(code)
    return {key: value for line in read_metrics(folder) for key, value in line.items()}


def environment_for(hardware: HardwareConfig) -> dict[str, str]:
    """Return the environment of the processes: this one's, and where they compute."""
    threads = max(count_cores() // hardware.num_processes, 1)  # torchrun's choice is 1
    # torch.distributed's barrier takes the GPU of each process's rank, even on the CPU; there may be fewer
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if hardware.device == "cpu" else {}
    return {"OMP_NUM_THREADS": str(threads), **os.environ, LAUNCHED: "1", **hidden}


def overrides_for(config: Config, folder: Path) -> list[str]:
    """Return this command's overrides, which say what each process trains, and where it goes on."""
    typed = HydraConfig.get().overrides.task
    places = {"output_dir": str(folder)} | ({"training.resume": str(folder)} if config.resumes else {})
    kept = [override for override in typed if key_of(override) not in ("output_dir", "training.resume")]
    return kept + [f"{key}={quote(value)}" for key, value in places.items()]


def meeting(hardware: HardwareConfig) -> list[str]:
    """Return the arguments of torchrun that say where the processes meet."""
    if hardware.num_nodes == 1:
        return ["--standalone"]
    return [
        f"--nnodes={hardware.num_nodes}",
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={hardware.rendezvous}", "--rdzv-id=getiaction"),
    ]


def run_and_forward_signals(command: list[str], env: dict[str, str]) -> int:
    """Run a command, passing on to it what asks to stop; return its exit code, or 128 + the signal that ended it."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in STOPPING}
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)  # torchrun inherits that: a cluster may send them to every process
    process = subprocess.Popen(command, env=env, start_new_session=True)  # Ctrl-C reaches it through us, once

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        for worker in find_workers(process.pid) or [psutil.Process(process.pid)]:  # torchrun would kill them in 30 s
            worker.send_signal(number)

    for number in STOPPING:
        signal.signal(number, forward)
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + received[0] if received and code else code


def find_workers(launcher: int) -> list[psutil.Process]:
    """Return the training processes that a launcher has started; not those that they have started for themselves."""
    workers = []
    for child in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error):
            if "RANK" in child.environ():
                workers.append(child)
    return workers
