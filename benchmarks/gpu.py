"""Check, measure and record everything about one accelerator in one call; a section that fails is recorded as such.

python -m benchmarks.gpu --pictures ../shared/data/pusht                              # one CUDA GPU
python -m benchmarks.gpu --device cpu --small --result /tmp/gpu.json                  # a rehearsal without one

Keypoints come from the demonstrations in the box. Pictures do, too, or from where `--pictures` says: PushT's dataset,
which `end_to_end` needs, or a frame cache that was made elsewhere.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_checks import out_of_memory, parity, resumed, rows, updates
from benchmarks.gpu_kernels import acting, busy
from benchmarks.gpu_rates import (
    chunks,
    compute,
    encoder,
    end_to_end,
    evaluation,
    precisions,
    presets,
    record,
    saving,
    ways,
)
from benchmarks.gpu_variants import variants
from getiaction.config.record import describe_machine

RESULTS = Path(__file__).parent / "results"
LIMIT = 120  # seconds of a section: the device is there for minutes


SECTIONS: tuple[Callable[[Bench], dict[str, Any]], ...] = (
    parity,
    updates,
    encoder,
    record,
    chunks,
    end_to_end,
    compute,
    busy,
    variants,
    acting,
    precisions,
    rows,
    resumed,
    evaluation,
    presets,
    ways,
    saving,
    out_of_memory,
)


def give_up(*_: object) -> None:
    """End a section that takes too long."""
    raise TimeoutError("this section took longer than --limit")


def main() -> None:
    """Run all sections and write what they found, after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pictures", help="a frame cache of PushT, for a machine that cannot decode videos")
    parser.add_argument("--keep", type=Path, help="where the record's run stays, to evaluate it elsewhere")
    parser.add_argument("--small", action="store_true", help="a rehearsal: few steps, small batches")
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument(
        "--sections", nargs="*", choices=names, default=names, help="`rows` and `evaluation` use `precisions`"
    )
    parser.add_argument(
        "--cases", nargs="*", default=[], help='what `busy`, `variants` and `end_to_end` take: "pusht_basic, 64", say'
    )
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds after which a section is given up")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/gpu-<date>.json")
    arguments = parser.parse_args()
    path = arguments.result or RESULTS / f"gpu-{datetime.now(UTC):%Y-%m-%d}.json"
    signal.signal(signal.SIGALRM, give_up)
    result: dict[str, Any] = {"machine": describe_machine(torch.device(arguments.device)), "small": arguments.small}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            arguments.device, arguments.small, arguments.pictures, Path(folder), arguments.keep, tuple(arguments.cases)
        )
        for section in [one for one in SECTIONS if one.__name__ in arguments.sections]:
            begin, bench.found = time.perf_counter(), {}
            signal.alarm(0 if arguments.small else arguments.limit)
            try:
                found = section(bench)
            except subprocess.CalledProcessError as error:
                found = bench.found | {"failed": error.cmd, "stderr": error.stderr.splitlines()[-12:]}
            except Exception:  # the other sections go on
                found = bench.found | {"failed": traceback.format_exc().splitlines()[-6:]}
            signal.alarm(0)
            result[section.__name__] = found | {"section_seconds": round(time.perf_counter() - begin, 1)}
            print(section.__name__, json.dumps(result[section.__name__]), flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
