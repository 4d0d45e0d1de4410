"""Measure what the loop in an exported ONNX file costs: `python -m benchmarks.onnx_loop`.

For each preset and number of denoising steps a policy of drawn weights is exported, and the loop's body written out
once for each step, with the same weights. Both files must act the same to 1e-4. ONNX Runtime then runs them alternately
in one thread; what counts is the processor's time, which others on the machine disturb least. Medians and quartiles
go to benchmarks/results/onnx_loop-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from tqdm import tqdm

from benchmarks.inference import features_of, statistics_of
from getiaction.config.build import build_policy
from getiaction.config.compose import compose
from getiaction.config.record import describe_machine
from getiaction.interop.onnx_file import example
from getiaction.interop.onnx_graph import CHUNK, PARTS, ChunkGraph, to_onnx

RESULTS = Path(__file__).parent / "results"
PRESETS = ("pusht_laptop", "pusht_keypoints", "pusht_cpu", "pusht_fast")
STEPS = (5, 10, 20)
WARM_UP = 2


def written_out(model: Any, steps: int) -> Any:
    """Return a model whose steps come one after the other, as many as its loop takes."""
    nodes = list(model.graph.node)
    (at,) = (number for number, node in enumerate(nodes) if node.op_type == "Scan")
    loop = nodes[at]
    (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
    state, *slices = (value.name for value in body.input)
    constant, copies, sample = {weights.name for weights in body.initializer}, [], loop.input[0]
    unrolled = onnx.ModelProto()
    unrolled.CopyFrom(model)
    unrolled.graph.initializer.extend(body.initializer)
    for number in range(steps):
        unrolled.graph.initializer.append(numpy_helper.from_array(np.array(number), f"step.{number}"))
        names = {state: sample} | {name: f"{number}/{name}" for name in slices}
        for whole, name in zip(loop.input[1:], slices, strict=True):
            copies.append(helper.make_node("Gather", [whole, f"step.{number}"], [names[name]], axis=0))
        for node in body.node:
            names |= {name: f"{number}/{name}" for name in node.output}
            copies.append(onnx.NodeProto())
            copies[-1].CopyFrom(node)
            copies[-1].name = f"{number}/{node.name}"
            copies[-1].input[:] = [name if name in constant or not name else names[name] for name in node.input]
            copies[-1].output[:] = [names[name] for name in node.output]
        sample = names[body.output[0].name]
    del unrolled.graph.node[:]
    last = helper.make_node("Identity", [sample], [loop.output[0]])
    unrolled.graph.node.extend([*nodes[:at], *copies, last, *nodes[at + 1 :]])
    return unrolled


def measure(preset: str, steps: int, rounds: int) -> dict[str, Any]:
    """Return the quartiles of both files' milliseconds, and the seconds of processor that the export took."""
    config = compose([f"+preset={preset}", "hardware.num_processes=1"])
    features = features_of(config)
    policy = build_policy(config, features, statistics_of(features), fetch_weights=False).eval()
    graph = ChunkGraph(policy, steps).eval()
    inputs = example(policy, graph)
    begin = time.process_time()
    with tqdm(total=PARTS, desc=f"{preset} {steps}", leave=False) as bar:
        model = to_onnx(graph, inputs, bar)
    row: dict[str, Any] = {"preset": preset, "steps": steps, "export_s": round(time.process_time() - begin, 1)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    models = {"loop": model, "written_out": written_out(model, steps)}
    sessions = {name: onnxruntime.InferenceSession(it.SerializeToString(), options) for name, it in models.items()}
    fed = {name: value.numpy() for name, value in inputs.items()}
    one, other = (session.run([CHUNK], fed)[0] for session in sessions.values())
    np.testing.assert_allclose(one, other, atol=1e-4)
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(WARM_UP + rounds):
        for name in list(sessions)[:: 1 if number % 2 else -1]:
            begin = time.process_time()
            sessions[name].run([CHUNK], fed)
            taken[name].append((time.process_time() - begin) * 1e3)
    quartiles = {name: np.percentile(times[WARM_UP:], [50, 25, 75]).round(2).tolist() for name, times in taken.items()}
    return row | quartiles | {"ratio": round(quartiles["loop"][0] / quartiles["written_out"][0], 3)}


def main() -> None:
    """Measure the presets that were asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--steps", nargs="*", type=int, default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/onnx_loop-<date>.json")
    arguments = parser.parse_args()
    rows = []
    for preset in arguments.presets:
        for steps in arguments.steps:
            rows.append(measure(preset, steps, arguments.rounds))
            print(rows[-1], flush=True)
    path = arguments.result or RESULTS / f"onnx_loop-{datetime.now(UTC):%Y-%m-%d}.json"
    described = {"date": datetime.now(UTC).isoformat(), **describe_machine(torch.device("cpu"))}
    path.write_text(json.dumps({**described, "rounds": arguments.rounds, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
