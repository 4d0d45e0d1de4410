"""Measure how far apart rounding alone puts a policy's gradients: `python -m benchmarks.rounding`.

PyTorch computes the gradients of the same weights and samples three times on this CPU, with oneDNN's convolutions,
channels last and first, and with its own. All three are right. What they differ by is what any other way of computing
them, a GPU's or ours, may differ by: see `benchmarks.gpu_checks.parity`. Only the encoder's pictures have an order.
"""

from __future__ import annotations

import argparse
import itertools
import json
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.gpu_checks import Gradients, gradient_gaps, loss_and_gradients
from getiaction.config.record import describe_machine

RESULTS = Path(__file__).parent / "results"
WAYS = {  # name: does oneDNN convolve, and in which order do pictures lie
    "oneDNN, channels last": (True, torch.channels_last),
    "oneDNN, channels first": (True, torch.contiguous_format),
    "PyTorch's own": (False, torch.contiguous_format),
}


def gradients_by(way: str, seed: int) -> Gradients:
    """Return the gradients of the samples of a seed, computed in one of the ways."""
    library, order = WAYS[way]
    with torch.backends.mkldnn.flags(enabled=library):
        return loss_and_gradients("cpu", seed, order)[1]


def main() -> None:
    """Measure, print a table, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12, help="sets of samples")
    asked = parser.parse_args()
    rows = []
    for seed in tqdm(range(asked.seeds), desc="seeds"):
        found = {way: gradients_by(way, seed) for way in WAYS}
        for one, other in itertools.combinations(WAYS, 2):
            rows.append({"seed": seed, "ways": [one, other], **gradient_gaps(found[one], found[other])})
    print(f"{'seed':4}  {'ways':50}  encoder  U-Net")
    for row in rows:
        print(
            f"{row['seed']:4}  {' and '.join(row['ways']):50}  {row['encoder_gradient_gap']:.1e}  "
            f"{row['unet_gradient_gap']:.1e}"
        )
    now, machine = datetime.now(UTC), describe_machine(torch.device("cpu"))
    kept = {"measured": now.isoformat(timespec="seconds"), "machine": machine, "gaps": rows}
    path = RESULTS / f"rounding-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
