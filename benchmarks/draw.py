"""Draw docs/speed.png, how many times LeRobot's rate each preset reaches: `python -m benchmarks.draw`.

It reads the logs that benchmarks/README.md quotes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "speed.png"
AVX512, AVX2, INTEL, H200 = "AMD EPYC, AVX-512", "AMD EPYC, AVX2", "Intel Xeon", "H200"
COLORS = {AVX512: "#c44e52", AVX2: "#dd8452", INTEL: "#4c72b0", H200: "#55a868"}
TICKS = (1, 2, 3, 5, 10, 20)

Ratios = dict[str, float]


class Series(NamedTuple):
    """Say what one kind of mark shows: what is read of which log, on which machine."""

    label: str
    machine: str
    marker: str
    log: str
    read: Callable[[Any], Ratios]


def trained(precision: str) -> Callable[[Any], Ratios]:
    """Return what reads a log of `benchmarks.train`."""
    return lambda log: {
        entry["preset"]: entry["ratio"] for entry in log["results"] if entry["precision"]["getiaction"] == precision
    }


def only(preset: str, read: Callable[[Any], Ratios]) -> Callable[[Any], Ratios]:
    """Return what reads one preset of a log."""
    return lambda log: {preset: read(log)[preset]}


def acted(how: str) -> Callable[[Any], Ratios]:
    """Return what reads a log of `benchmarks.inference`."""
    return lambda log: {entry["preset"]: entry["ratio"][how] for entry in log["results"] if how in entry["ratio"]}


def trained_on_gpu(log: Any) -> Ratios:
    """Read the H200's log: the run of both, or our step alone, of call 1, where ours was not reached in it."""
    ratios = {}
    for case, found in log["call_3"]["end_to_end"].items():
        preset, batch = case.split(", ")
        theirs, alone = found["lerobot"]["samples_per_s"][1], log["call_1"]["busy"][f"{case}, bf16"]["ms"]
        name = preset if batch == "64" else f"{preset}\nbatch {batch}"  # 64 is the presets' own
        ratios[name] = found.get("ratio", 1000 * int(batch) / alone / theirs)
    return ratios


def acted_on_gpu(log: Any) -> Ratios:
    """Read the H200's log: chunks in float32, the newest of each preset."""
    chunks = {**log["call_2"]["chunks"], **log["call_3"]["chunks"]}
    return {
        name: found["ratio"]["getiaction"]
        for name, found in chunks.items()
        if isinstance(found, dict) and "ratio" in found
    }


TRAINING = (
    Series("float32", AVX512, "o", "train_heap-2026-11-25.json", trained("no")),
    Series("bf16", AVX512, "D", "train_heap-2026-11-25.json", trained("bf16")),
    Series("float32", AVX2, "o", "train_pictures-2026-11-28.json", trained("no")),
    Series("float32", AVX2, "o", "train-2026-11-28.json", only("pusht_keypoints", trained("no"))),  # else disturbed
    Series("float32", INTEL, "o", "train_winograd_intel-2026-11-28.json", trained("no")),
    Series("bf16, both", H200, "D", "gpu_h200_streams-2026-11-27.json", trained_on_gpu),
)
ACTING = (
    Series("PyTorch", AVX512, "o", "inference-2026-11-25.json", acted("getiaction")),
    Series("exported", AVX512, "s", "inference-2026-11-25.json", acted("getiaction onnx")),
    Series("compiled", AVX2, "P", "inference_native-2026-11-27.json", acted("getiaction")),
    Series("exported", AVX2, "s", "inference_native-2026-11-27.json", acted("getiaction onnx")),
    Series("compiled", INTEL, "P", "inference_bf16_intel-2026-11-28.json", acted("getiaction")),
    Series("compiled, bf16", INTEL, "D", "inference_bf16_intel-2026-11-28.json", acted("getiaction bf16")),
    Series("exported", INTEL, "s", "inference_bf16_intel-2026-11-28.json", acted("getiaction onnx")),
    Series("PyTorch", H200, "o", "gpu_h200-2026-11-27.json", acted_on_gpu),
)


def draw(axes: Axes, title: str, series: tuple[Series, ...]) -> None:
    """Draw a row for each preset, a mark for each number."""
    found = [(one, one.read(json.loads((RESULTS / one.log).read_text()))) for one in series]
    presets = list(dict.fromkeys(preset for _, ratios in found for preset in ratios))
    for number, (one, ratios) in enumerate(found):
        places = [presets.index(preset) + 0.5 * (number + 0.5) / len(found) - 0.25 for preset in ratios]
        label = f"{one.machine}: {one.label}"
        known = label in axes.get_legend_handles_labels()[1]
        axes.plot([*ratios.values()], places, one.marker, color=COLORS[one.machine], label=None if known else label)
    for row in range(1, len(presets)):
        axes.axhline(row - 0.5, color="0.9", zorder=0)
    axes.axvline(1, color="0.3", linewidth=1, zorder=0)
    axes.set(title=title, xlabel="times LeRobot's rate", xscale="log", xlim=(0.8, 30), ylim=(len(presets) - 0.5, -0.5))
    axes.set_yticks(range(len(presets)), presets)
    axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def main() -> None:
    """Draw both panels side by side."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, "training, end to end", TRAINING)
    draw(right, "acting, one chunk of actions", ACTING)
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


if __name__ == "__main__":
    main()
