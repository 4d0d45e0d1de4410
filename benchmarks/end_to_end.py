"""Train beside `lerobot-train` on one GPU, in one process: the imports of a process take longer than the steps here.

A section of `benchmarks.gpu`. Both start from the same weights, with the same data, batch and precision, each with its
own loader; LeRobot goes first, so that nothing that ours asks of the process is there yet. Rates are medians after
warm-up of what each reports, waiting for data included: LeRobot's of each step, in all of which it waits for the loss
whether it logs it or not; ours of 50 steps, after which it logs, and waits for losses, if nobody says otherwise.
`benchmarks.train` gives each a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.train import commands_of, write_start
from getiaction.config.compose import compose
from getiaction.training.metrics import read_metrics

WARM_UP = 0.34  # of the steps
OURS = ("training.max_steps=400", "training.log_every=50")  # more steps: they are shorter


def measure_lerobot(preset: str, root: Path, start: Path, folder: Path, how: argparse.Namespace) -> dict[str, Any]:
    """Return LeRobot's samples/s, quartiles after warm-up, and the seconds of the whole."""
    from lerobot.scripts.lerobot_train import train

    command, before, said = commands_of(preset, root, start, folder, how)["lerobot"], sys.argv, io.StringIO()
    begin, sys.argv = time.perf_counter(), command[2:]
    os.environ["ACCELERATE_MIXED_PRECISION"] = how.precision
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train()
    finally:
        sys.argv = before
        del os.environ["ACCELERATE_MIXED_PRECISION"]
    times = re.findall(r"updt_s:([\d.]+) data_s:([\d.]+)", said.getvalue())
    rates = [how.batch / (float(update) + float(data)) for update, data in times]
    waits = statistics.median(float(data) for _, data in times[len(times) // 3 :])
    assert len(rates) == how.steps, f"{len(rates)} of {how.steps} steps were reported"
    return summary(rates, begin) | {"waits_for_data_ms": round(waits * 1e3, 1), "argv": command[2:]}


def measure_ours(preset: str, root: Path, start: Path, folder: Path, how: argparse.Namespace) -> dict[str, Any]:
    """Return the same of ours."""
    from getiaction.train import train

    command, begin = commands_of(preset, root, start, folder, how)["getiaction"], time.perf_counter()
    folder.mkdir(parents=True)
    overrides = [*command[3:], *OURS]
    train(compose(overrides), folder)
    rates = [line["samples_per_s"] for line in read_metrics(folder) if "samples_per_s" in line]
    return summary(rates, begin) | {"argv": overrides}


def summary(rates: list[float], begin: float) -> dict[str, Any]:
    """Return quartiles after warm-up; let the device's memory go."""
    warm = rates[int(len(rates) * WARM_UP) :]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    quartiles = [round(one, 1) for one in statistics.quantiles(warm, n=4)]
    return {"samples_per_s": quartiles, "wall_s": round(time.perf_counter() - begin, 1)}


def compare(
    wanted: list[tuple[str, int, int]], root: Path, found: dict[str, Any], folder: Path, precision: str
) -> None:
    """Fill `found` with the rates of both, and their ratio, for each (preset, batch size, steps)."""
    threads = torch.get_num_threads()
    cases = {
        f"{preset}, {batch}": (
            preset,
            root,
            write_start(preset, folder / f"{preset}_{batch}"),
            argparse.Namespace(batch=batch, steps=steps, threads=threads, workers=4, precision=precision),
        )
        for preset, batch, steps in wanted
    }
    for name, measure in {"lerobot": measure_lerobot, "getiaction": measure_ours}.items():
        for number, (case, (preset, data, start, how)) in enumerate(cases.items()):
            entry = found.setdefault(case, {"precision": precision})
            entry[name] = measure(preset, data, start, folder / f"{name}_{number}", how)
            print(case, name, json.dumps(entry[name]), flush=True)
            if len(entry) == 3:
                medians = [entry[one]["samples_per_s"][1] for one in ("getiaction", "lerobot")]
                entry["ratio"] = round(medians[0] / medians[1], 2)
