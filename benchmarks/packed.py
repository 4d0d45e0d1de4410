"""Measure encoding pictures with packed weights on this CPU, against the layers: `python -m benchmarks.packed`.

The encoders of the presets, without gradients, for one robot and for many: the same module with the weights packed
(getiaction/policy/fast/packed.py) and by its layers takes turns, each call with cold caches, as between two chunks.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.taps import median_ms
from getiaction.config.record import describe_machine
from getiaction.policy import ImageEncoder
from getiaction.policy.fast.packed import packed_for

RESULTS = Path(__file__).parent / "results"
CASES = [  # whose pictures, norm, side, how many
    ("pusht_fast", "batch", 64, 1),
    ("pusht_cpu", "batch", 64, 2),
    ("pusht_cpu, 20 robots", "batch", 64, 40),
    ("pusht_basic", "group", 84, 2),
    ("pusht_basic, 20 robots", "group", 84, 40),
    ("a camera of 224x224", "batch", 224, 2),
]


def measure(norm: str, side: int, count: int, rounds: int, cold: Tensor) -> dict[str, Any]:
    """Return milliseconds of both for `count` pictures of side x side, and how far apart their features are."""
    torch.manual_seed(0)
    encoder = ImageEncoder((3, side, side), norm=norm).eval()
    pictures = torch.rand(count, 3, side, side)
    assert packed_for(encoder.backbone, pictures) is not None, "nothing is packed on this machine"

    def layers() -> Tensor:
        with patch("getiaction.policy.fast.packed.packed_for", lambda *_: None):
            return encoder(pictures)  # type: ignore[no-any-return]

    apart = float((encoder(pictures) - layers()).abs().max() / layers().abs().max())
    ms = median_ms({"layers": layers, "packed": lambda: encoder(pictures)}, rounds, cold=cold)
    return {"ms": ms, "ratio": round(ms["layers"] / ms["packed"], 2), "apart": apart}


@torch.inference_mode()
def main() -> None:
    """Measure, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/packed-<date>.json")
    arguments = parser.parse_args()
    cold, found = torch.zeros(2**25), {}
    print("| encoder of | pictures | by layers, ms | packed, ms | ratio |\n| --- | --- | --- | --- | --- |")
    for name, norm, side, count in CASES:
        found[name] = entry = measure(norm, side, count, arguments.rounds, cold)
        ms = entry["ms"]
        print(
            f"| {name} | {count} of {side}x{side} | {ms['layers']} | {ms['packed']} | **{entry['ratio']}** |",
            flush=True,
        )
    path = arguments.result or RESULTS / f"packed-{datetime.now(UTC):%Y-%m-%d}.json"
    machine = describe_machine(torch.device("cpu"))
    path.write_text(json.dumps({"date": datetime.now(UTC).isoformat(), **machine, "encoders": found}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
