"""Share what the sections of `benchmarks.gpu` need: a folder, a device, and training as users do."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from getiaction.training.metrics import read_metrics

WARM = 0.3  # share of the steps that are left out of a rate
QUIET = ["validation.every=null", "validation.max_samples=1", "validation.max_sampled=0", "training.save_every=null"]


@dataclass
class Bench:
    """Hold what all sections share."""

    device: str
    small: bool
    pictures: str | None
    folder: Path
    keep: Path | None = None
    cases: tuple[str, ...] = ()
    """What the names of cases begin with, of sections that have several; all, if nothing is said."""
    found: dict[str, Any] = field(default_factory=dict)
    """What the section under way has measured: it is kept where the section does not come to its end."""

    def steps(self, count: int) -> int:
        """Return how many steps to take: few in a rehearsal."""
        return min(count, 4) if self.small else count

    def wants(self, case: str) -> bool:
        """Tell whether a case was asked for."""
        return not self.cases or case.startswith(self.cases)

    def train(self, name: str, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Train as users do, in a process of its own, into the folder `name`."""
        command = [sys.executable, "-m", "getiaction.train", f"hardware.device={self.device}", *overrides]
        command += [f"output_dir={self.folder / name}"] if not any("resume" in one for one in overrides) else []
        return subprocess.run(command, check=check, capture_output=True, text=True)

    def rate(self, name: str) -> dict[str, Any]:
        """Return the rate of a run after its first steps, and its last loss."""
        lines = [line for line in read_metrics(self.folder / name) if "samples_per_s" in line]
        warm = lines[int(len(lines) * WARM) :]
        rates = [line["samples_per_s"] for line in warm]
        return {
            "samples_per_s": round(statistics.median(rates), 1),
            "range": [min(rates), max(rates)],
            "data_wait": round(statistics.mean(line["data_wait"] for line in warm), 4),
            "loss": lines[-1]["loss"],
            "precision": json.loads((self.folder / name / "run.json").read_text())["mixed_precision"],
        }
