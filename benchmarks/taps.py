"""Measure where this CPU learns faster by taps, and in C, than by PyTorch's layers: `python -m benchmarks.taps`.

Layers of the presets' networks alone, forward and backward, with cold caches, as they are in a step: the library's
convolution and `convolve_by_taps` (getiaction/policy/fast/taps.py) take turns. Then convolutions of pictures, by oneDNN
and by tiles in C (native_winograd.py), the gradient of a convolution's weights alone, by oneDNN and in C
(native_pictures.py), and residual blocks of the U-Net, by layers, taps among them, and in C (native_blocks.py). Then
whole steps without their data, with `hardware.convolutions=library`, and `taps` without C and with it, turn by turn in
one process.
`hardware.convolutions=auto` should take them on a CPU where this says so: `learns_by_taps`
(getiaction/config/placement.py) and the bounds in getiaction/policy/fast/convolution.py and native_blocks.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.compute import our_step
from benchmarks.train import QUIET
from getiaction.config.compose import compose
from getiaction.config.record import describe_machine
from getiaction.policy.fast import native_blocks, native_pictures, native_winograd
from getiaction.policy.fast.convolution import Conv2d, use_taps
from getiaction.policy.fast.native_layers import use_native
from getiaction.policy.fast.taps import convolve_by_taps
from getiaction.policy.unet import ResidualBlock
from getiaction.training.heap import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
LAYERS = [  # channels, channels that come out, kernel (h, w), stride, sides (h, w)
    *[(512, 512, (3, 3), 1, (side, side)) for side in (2, 3, 4, 6)],
    *[(256, 256, (3, 3), 1, (side, side)) for side in (3, 4, 6)],
    *[(256, 512, (3, 3), 2, (side, side)) for side in (4, 6)],
    (128, 128, (3, 3), 1, (8, 8)),
    *[(1024, 1024, (1, 5), 1, (1, moments)) for moments in (4, 8)],
    *[(512, 512, (1, 5), 1, (1, moments)) for moments in (4, 8)],
    *[(256, 256, (1, 5), 1, (1, moments)) for moments in (4, 8, 16)],
    (128, 128, (1, 5), 1, (1, 8)),
]
TILED = [  # channels, channels that come out, side
    (64, 64, 21), (128, 128, 11), (256, 256, 6), (64, 64, 14), (128, 128, 7), (256, 256, 4), (128, 128, 3),
    (512, 512, 6), (32, 32, 21),
]  # fmt: skip
GRADIENTS = [  # channels, channels that come out, taps a side, stride, side
    (64, 64, 3, 1, 21), (64, 128, 3, 2, 21), (64, 128, 1, 2, 21), (128, 128, 3, 1, 11), (128, 256, 3, 2, 11),
    (128, 256, 1, 2, 11), (256, 256, 3, 1, 6), (512, 512, 3, 1, 3), (64, 64, 3, 1, 16), (32, 32, 3, 1, 21),
]  # fmt: skip
BLOCKS = [  # channels, channels that come out, moments
    (2, 32, 16), (32, 32, 16), (32, 64, 8), (64, 64, 8), (128, 128, 4), (256, 64, 4), (128, 256, 4), (256, 256, 4),
    (256, 256, 8), (512, 128, 8), (256, 512, 4), (512, 512, 4),
]  # fmt: skip
STEPS = {  # preset: batch size
    "pusht_laptop": 96,
    "pusht_keypoints": 128,
    "pusht_pictures": 48,
    "pusht_cpu": 16,
    "pusht_fast": 128,
    "pusht_basic": 64,
}
BOXED = "pusht_laptop", "pusht_keypoints"  # which see keypoints
WAYS = "library", "taps without C", "taps"
Passes = Callable[[], None]


def median_ms(calls: dict[str, Passes], rounds: int, *, cold: Tensor | None = None) -> dict[str, float]:
    """Return the median milliseconds of each call; they take turns, each with what is in the caches pushed out."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            if cold is not None:
                cold.add_(1)
            begin = time.perf_counter()
            calls[name]()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: round(statistics.median(ms), 3) for name, ms in taken.items()}


def measure_layer(layer: tuple[Any, ...], batch: int, rounds: int, cold: Tensor) -> dict[str, Any]:
    """Return milliseconds of both, forward and backward."""
    channels, out, kernel, stride, sides = layer
    strides, padding = (stride if kernel[0] > 1 else 1, stride), (kernel[0] // 2, kernel[1] // 2)
    last = torch.channels_last
    x = torch.randn(batch, channels, *sides).contiguous(memory_format=last).requires_grad_()
    weight = torch.randn(out, channels, *kernel).contiguous(memory_format=last).requires_grad_()
    rows = kernel[0] == 1  # along time, the library is faster with the channels first

    def library() -> None:
        if rows:
            made = functional.conv1d(first, plain, None, strides[1], padding[1])
            torch.autograd.grad(made, [first, plain], torch.ones_like(made))
        else:
            made = functional.conv2d(x, weight, None, strides, padding)
            torch.autograd.grad(made, [x, weight], torch.ones_like(made))

    def taps() -> None:
        made = convolve_by_taps(x, weight, None, strides, padding).contiguous(memory_format=last)
        torch.autograd.grad(made, [x, weight], torch.ones_like(made))

    if rows:
        first, plain = (one.detach()[:, :, 0].contiguous().requires_grad_() for one in (x, weight))
    found = median_ms({"library": library, "taps": taps}, rounds, cold=cold)
    shape = f"{channels} -> {out}, k {'x'.join(map(str, kernel))}, stride {stride}, {'x'.join(map(str, sides))}"
    return {"layer": shape, "batch": batch, "ms": found, "ratio": round(found["library"] / found["taps"], 2)}


def measure_tiles(shape: tuple[int, int, int], batch: int, rounds: int, cold: Tensor) -> dict[str, Any]:
    """Return milliseconds of a convolution of 3x3 taps, forward and backward, by oneDNN and by tiles in C."""
    channels, out, side = shape
    layer = Conv2d(channels, out, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    assert use_native(layer), "there is no C compiler"
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(batch, out, side, side).contiguous(memory_format=torch.channels_last)
    assert native_winograd.takes(x, layer.weight, None, 1, 1), "oneDNN takes it"

    def by(convolve: Callable[[Conv2d, Tensor], Tensor]) -> Passes:
        return lambda: torch.autograd.grad(convolve(layer, x), [x, layer.weight], gradient)

    library = by(lambda layer, x: functional.conv2d(x, layer.weight, None, 1, 1))
    found = median_ms({"oneDNN": library, "C": by(native_pictures.convolve)}, rounds, cold=cold)
    shapes = f"{channels} -> {out}, {side}x{side}"
    return {"tiles": shapes, "batch": batch, "ms": found, "ratio": round(found["oneDNN"] / found["C"], 2)}


def measure_gradient(shape: tuple[int, ...], batch: int, rounds: int, cold: Tensor) -> dict[str, Any]:
    """Return milliseconds of the gradient of a convolution's weights, by oneDNN and in C."""
    channels, out, kernel, stride, side = shape
    weigher, last, padding = native_pictures.find_pictures(), torch.channels_last, kernel // 2
    assert weigher is not None, "there is no C compiler"
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=last)
    weight = torch.randn(out, channels, kernel, kernel).contiguous(memory_format=last)
    gradient = torch.randn_like(functional.conv2d(x, weight, None, stride, padding))
    how = None, (stride, stride), (padding, padding), (1, 1), False, (0, 0), 1, (False, True, False)
    calls: dict[str, Passes] = {
        "oneDNN": lambda: torch.ops.aten.convolution_backward(gradient, x, weight, *how),
        "C": lambda: weigher.weigh(x, gradient, weight, stride, padding),
    }
    found = median_ms(calls, rounds, cold=cold)
    billions = 2 * gradient.numel() * channels * kernel**2 / 1e6
    rates = {name: round(billions / ms, 1) for name, ms in found.items()}
    shapes = f"{channels} -> {out}, k {kernel}x{kernel}, stride {stride}, {side}x{side}"
    ratio = round(found["oneDNN"] / found["C"], 2)
    return {"gradient": shapes, "batch": batch, "ms": found, "gflops": rates, "ratio": ratio}


def measure_block(shape: tuple[int, int, int], batch: int, rounds: int, cold: Tensor) -> dict[str, Any]:
    """Return milliseconds of a residual block of the U-Net, forward and backward, by layers and in C."""
    channels, out, moments = shape
    by_layers = ResidualBlock(channels, out, cond_dim=8, kernel_size=5, n_groups=8, film_scale=True)
    use_taps(by_layers)
    in_c = copy.deepcopy(by_layers)
    assert use_native(in_c), "there is no C compiler"
    x = torch.randn(batch, channels, 1, moments).contiguous(memory_format=torch.channels_last).requires_grad_()
    film, weights = torch.randn(batch, 2 * out, requires_grad=True), torch.randn(batch, out, 1, moments)

    def by(block: ResidualBlock) -> Passes:
        numbers = [weight for name, weight in block.named_parameters() if "cond_encoder" not in name]

        def call() -> None:
            torch.autograd.grad(block.modulate(x, film), [x, film, *numbers], weights)

        return call

    with patch.multiple(native_blocks, WIDEST=1024, LARGEST=2**20):
        found = median_ms({"layers": by(by_layers), "C": by(in_c)}, rounds, cold=cold)
    shapes = f"{channels} -> {out}, {moments} moments"
    return {"block": shapes, "batch": batch, "ms": found, "ratio": round(found["layers"] / found["C"], 2)}


TABLES: dict[str, tuple[list[Any], Callable[..., dict[str, Any]], tuple[str, str]]] = {
    "layer": (LAYERS, measure_layer, ("library", "taps")),
    "tiles": (TILED, measure_tiles, ("oneDNN", "C")),
    "gradient": (GRADIENTS, measure_gradient, ("oneDNN", "C")),
    "block": (BLOCKS, measure_block, ("layers", "C")),
}


def measure_step(preset: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return milliseconds of a whole step without its data, each way."""
    data = ["dataset=pusht_demo_keypoints" if preset in BOXED else "dataset=pusht_demo"]
    data += ["dataset.episodes=[0,1,2,3]", f"training.batch_size={batch}", *QUIET, "evaluation.final_episodes=null"]
    data += ["hardware.device=cpu", "hardware.mixed_precision=no"]
    with tempfile.TemporaryDirectory() as place:
        steps: dict[str, Any] = {}
        for way in WAYS:
            overrides = [f"+preset={preset}", *data, f"hardware.convolutions={way.split()[0]}"]
            without = patch("getiaction.config.placement.use_native", lambda _: False)
            with without if way == "taps without C" else contextlib.nullcontext():
                steps[way] = our_step(compose(overrides), Path(place) / way)
        found = median_ms(steps, rounds)
    ratios = {way: round(found["library"] / found[way], 2) for way in WAYS[1:]}
    return {"preset": preset, "batch": batch, "ms": found, "ratios": ratios}


def main() -> None:
    """Measure, print the tables and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="*", type=int, default=[16, 64, 128], help="of layers and blocks")
    parser.add_argument("--presets", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/taps-<date>.json")
    arguments = parser.parse_args()
    keep_freed_memory()  # as in a run
    cold, steps, tables = torch.zeros(2**25), [], dict[str, list[dict[str, Any]]]()
    for name, (shapes, measure, (one, other)) in TABLES.items():
        print(f"\n| {name} | batch | {one}, ms | {other}, ms | ratio |\n| --- | --- | --- | --- | --- |")
        for shape, batch in product(shapes, arguments.batches):
            found = measure(shape, batch, arguments.rounds, cold)
            tables.setdefault(name if name == "tiles" else f"{name}s", []).append(found)
            ms = found["ms"]
            print(f"| {found[name]} | {batch} | {ms[one]} | {ms[other]} | **{found['ratio']}** |", flush=True)
    print("\n| preset | batch | library, ms a step | taps without C, ms | ratio | taps, ms | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for preset in arguments.presets:
        steps.append(found := measure_step(preset, STEPS[preset], arguments.rounds))
        ms, ratios = found["ms"], found["ratios"]
        columns = " | ".join(f"{ms[way]} | **{ratios[way]}**" for way in WAYS[1:])
        print(f"| `{preset}` | {found['batch']} | {ms['library']} | {columns} |", flush=True)
    path = arguments.result or RESULTS / f"taps-{datetime.now(UTC):%Y-%m-%d}.json"
    machine = describe_machine(torch.device("cpu"))
    result = {"date": datetime.now(UTC).isoformat(), **machine, **tables, "steps": steps}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
