"""Measure how long training stands still for a checkpoint: `python -m benchmarks.saving`.

A run of each preset takes one step, so that the optimiser has its moments, and is saved a few times, each time into a
new folder: weights, their average, moments, checksums, everything brought to the disk. Once training waits for all of
that, and once, turn by turn, for the copy alone, as it does on a GPU. Where it is saved matters as much as what
computes: `--folder` names the disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import QUIET
from getiaction.config.compose import compose
from getiaction.config.record import describe_machine
from getiaction.training.clock import Clock

RESULTS = Path(__file__).parent / "results"
PRESETS = ("pusht_pictures", "pusht_basic", "pusht_advanced")


def measure(preset: str, device: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the seconds of each save, and the gigabytes of one; the first also makes the system find memory."""
    from getiaction.config.run import build_trainer, start_accelerator
    from getiaction.config.sources import find_data

    short = [f"+preset={preset}", f"hardware.device={device}", "training.batch_size=2", "training.max_steps=1", *QUIET]
    config = compose([*short, "dataset=pusht_demo", "dataset.episodes=[0,1]", "evaluation.final_episodes=null"])
    with tempfile.TemporaryDirectory(dir=folder) as place:
        trainer = build_trainer(config, find_data(config), start_accelerator(config, Path(place)), Path(place))
        trainer.model.train()
        coming = trainer.batches.iterate(0, 1)
        trainer._optimise(next(coming))
        coming.close()
        found: dict[str, Any] = {"waiting_s": [], "aside_s": [], "aside_until_written_s": []}
        for number in range(2 * rounds):
            trainer.store.folder = Path(place) / f"checkpoints_{number}"
            trainer.saved, trainer.saves_aside = None, number % 2 == 1
            begin = time.perf_counter()
            trainer._save(Clock())
            found["aside_s" if trainer.saves_aside else "waiting_s"].append(round(time.perf_counter() - begin, 2))
            assert not trainer.saves_aside or trainer.background._running is not None, "no memory for a copy"
            trainer.background.wait()
            if trainer.saves_aside:
                found["aside_until_written_s"].append(round(time.perf_counter() - begin, 2))
            saved = [path for path in trainer.store.folder.glob("0*/**/*") if path.is_file()]
            found["GB"] = round(sum(path.stat().st_size for path in saved) / 1e9, 2)
            for path in saved:
                path.unlink()
    return found


def main() -> None:
    """Measure each preset, print a line for it, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk that is to be measured")
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    now, found = datetime.now(UTC), {}
    for preset in asked.presets:
        found[preset] = measure(preset, asked.device, asked.folder, asked.rounds)
        print(f"{preset}: {found[preset]}", flush=True)
    machine = describe_machine(torch.device(asked.device))
    path = RESULTS / f"saving-{now:%Y-%m-%d}.json"
    kept = {"measured": now.isoformat(timespec="seconds"), "machine": machine, "saves": found}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
