"""Put a run back into the queue of a cluster that reclaims its machine."""

from __future__ import annotations

import logging
import os
import signal
import subprocess

from getiaction.config.launch import LAUNCHED
from getiaction.signals import WARNINGS

log = logging.getLogger(__name__)


def requeue(number: int) -> None:
    """Start this job again later, if `number` is a signal by which a cluster warns; what was saved is on the disk.

    submitit, which runs the jobs of a sweep, has a handler of its own; else SLURM is asked.
    """
    if number not in WARNINGS or LAUNCHED in os.environ or int(os.environ.get("RANK", 0)) > 0:
        return
    if callable(signal.getsignal(number)):
        signal.raise_signal(number)
    elif job := os.environ.get("SLURM_JOB_ID"):
        log.info("back into the queue: scontrol requeue %s", job)
        subprocess.run(["scontrol", "requeue", job], check=True)
