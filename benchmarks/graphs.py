"""Measure what a CUDA graph of a whole action chunk gains: `python -m benchmarks.graphs --presets pusht_basic`.

A chunk of ten denoising steps launches some 1,200 kernels, which at batch 1 takes longer than they run. Captured once
and replayed, they are one launch. This is a prototype, to decide with: nothing in the package captures a chunk yet.
`python -m benchmarks.gpu` runs it as its section `graphs`. On a CPU the plain calls stand in for the replay.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inference import PRESETS, alternate, features_of, statistics_of
from getiaction.config.build import build_policy
from getiaction.config.compose import compose
from getiaction.interop.onnx_file import example
from getiaction.interop.onnx_graph import ChunkGraph, in_order

WARM_UP = 3  # calls before the capture: cuDNN and cuBLAS choose, and allocate, what they need


def captured(call: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """Return what does `call` again, whose inputs stay where they lie, as one launch."""
    if device == "cpu":
        return call
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@torch.no_grad()
def measure(preset: str, device: str, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of a chunk, plain and replayed, in float32 and bf16, and how far the two are apart."""
    config = compose([f"+preset={preset}", "hardware.num_processes=1"])
    features = features_of(config)
    torch.manual_seed(0)
    policy = build_policy(config, features, statistics_of(features), fetch_weights=False).eval()
    plain = ChunkGraph(policy, policy.num_inference_steps)
    inputs = [None if value is None else value.to(device) for value in in_order(plain, example(policy, plain))]
    plain.to(device)
    plain.timesteps = plain.timesteps.to(device)  # a copy from the host cannot be captured

    def act() -> Tensor:
        return plain(*inputs)

    def act_in_bf16() -> Tensor:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):  # a cache would not outlive the capture
            return act()

    calls: dict[str, Callable[[], Tensor]] = {"plain": act, "plain bf16": act_in_bf16}
    calls |= {f"graph{name[5:]}": captured(call, device) for name, call in dict(calls).items()}
    exact = {name: calls[name]().float().clone() for name in calls}
    taken = alternate(calls, rounds, torch.cuda.synchronize if device == "cuda" else lambda: None, 0.0)
    return {
        "ms": {name: [round(float(q), 3) for q in np.quantile(ms, (0.25, 0.5, 0.75))] for name, ms in taken.items()},
        "apart": float((exact["plain"] - exact["graph"]).abs().max()),
        "apart bf16": float((exact["plain bf16"] - exact["graph bf16"]).abs().max()),
    }


def main() -> None:
    """Measure and print, a preset a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    for preset in arguments.presets:
        print(preset, json.dumps(measure(preset, arguments.device, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
