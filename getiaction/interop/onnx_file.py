"""Write a policy as one ONNX file: observations and noise in, an action chunk out, the sampler inside.

Everything is in the graph: resizing, cropping and normalising, the encoder, the observations' part of every FiLM layer
(computed once), the denoising step in a loop, and the way back to the dataset's units.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from getiaction.errors import InputError
from getiaction.interop.onnx_graph import CHUNK, NOISE, PARTS, STEP_NOISE, ChunkGraph, in_order, to_onnx
from getiaction.interop.onnx_policy import open_session
from getiaction.keys import ACTION, is_camera
from getiaction.policy import DiffusionPolicy

LARGEST = 1.9e9  # bytes of weights in one file, whose format ends at 2 GiB
CLOSE = 1e-4  # of the range of the actions: how far ONNX Runtime may be from PyTorch
PATIENCE = 2.0  # seconds for a latency: a chunk of a hundred steps can take one


def example(policy: DiffusionPolicy, graph: ChunkGraph, batch_size: int = 1) -> dict[str, Tensor]:
    """Return inputs of the right shapes, by name; always the same numbers."""
    draw = torch.Generator().manual_seed(0)
    shape = (batch_size, policy.horizon, policy.features.action_dim)
    inputs = {NOISE: torch.randn(shape, generator=draw)}
    if graph.draws:
        inputs[STEP_NOISE] = torch.randn((len(graph.draws), *shape), generator=draw)
    for key in graph.keys:
        size = (batch_size, policy.n_obs_steps, *policy.features.shapes[key])
        if is_camera(key):
            inputs[key] = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
        else:
            stats = policy.normalizer.statistics.get(key, {})
            low, high = stats.get("min", torch.tensor(-1.0)), stats.get("max", torch.tensor(1.0))
            inputs[key] = low + (high - low) * torch.rand(size, generator=draw)
    return inputs


@dataclass(frozen=True)
class Comparison:
    """Say what a file takes and gives, (name, type, shape), how far it is from PyTorch, and how long both take."""

    inputs: list[tuple[str, str, list[int]]]
    output: tuple[str, str, list[int]]
    difference: float
    onnx_ms: float
    torch_ms: float


def export_onnx(path: Path, policy: DiffusionPolicy, *, num_inference_steps: int, batch_size: int = 1) -> Comparison:
    """Write `policy` as an ONNX file, in one step, after checking that ONNX Runtime and PyTorch agree about it.

    The policy is moved to the CPU for that, and stays there.

    Raises:
        InputError: the packages for it are not installed, the scheduler has no fixed steps, or the two disagree.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install onnx onnxruntime onnxscript") from error
    if (size := 4 * sum(weight.numel() for weight in policy.parameters())) > LARGEST:
        raise InputError(
            f"the policy's weights take {size / 1e9:.1f} GB, and an ONNX file ends at 2 GB: use smaller unet.down_dims"
        )
    if kinds := {weight.dtype for weight in policy.parameters()} - {torch.float32}:
        raise InputError(f"the policy's weights are {kinds.pop()}, and a file holds float32: export policy.float()")
    graph = ChunkGraph(policy.cpu().eval(), num_inference_steps).eval()
    inputs = example(policy, graph, batch_size)
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # a folder that cannot be written to is known before the work
        with exporting_bar() as bar:
            onnx.save(to_onnx(graph, inputs, bar), temporary)
            bar.set_postfix_str("compared with PyTorch")
            compared = compare(temporary, graph, inputs)
        if not compared.difference <= CLOSE:  # NaN is not
            raise InputError(
                f"{path} was not written: ONNX Runtime and PyTorch differ by {compared.difference:.1e} of the actions' "
                "range"
            )
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}): give another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return compared


def exporting_bar() -> tqdm:
    """Return the progress bar: the parts of the graph, and the comparison with PyTorch. They are no measure of time."""
    return tqdm(
        total=PARTS + 1,
        desc="exporting",
        leave=False,
        dynamic_ncols=True,
        bar_format="{desc}: {n_fmt} of {total_fmt} parts [{elapsed}{postfix}]",
    )


def compare(path: Path, graph: ChunkGraph, inputs: Mapping[str, Tensor]) -> Comparison:
    """Run a file in ONNX Runtime, and its graph in PyTorch, on the same inputs."""
    session = open_session(path, None)
    fed = {name: value.numpy() for name, value in inputs.items()}
    ours, policy = torch.from_numpy(session.run([CHUNK], fed)[0]), graph.policy
    with torch.no_grad():
        theirs = graph(*in_order(graph, inputs))  # (B, Ta, Da)
    stats = policy.normalizer.statistics.get(ACTION, {})
    extent = float((stats["max"] - stats["min"]).max()) if "max" in stats and "min" in stats else 1.0
    observations, noise = {key: inputs[key] for key in graph.keys}, inputs[NOISE]
    return Comparison(
        inputs=[(entry.name, kind(entry.type), list(entry.shape)) for entry in session.get_inputs()],
        output=(CHUNK, "float32", list(theirs.shape)),
        difference=float((ours - theirs).abs().max()) / max(extent, 1e-8),
        onnx_ms=milliseconds(lambda: session.run([CHUNK], fed)),
        torch_ms=milliseconds(
            lambda: policy.predict_action_chunk(observations, noise=noise, num_inference_steps=len(graph.steps))
        ),
    )


def kind(onnx_type: str) -> str:
    """Return the usual name of an ONNX tensor's type, `tensor(float)`."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32"}.get(name, name)


def milliseconds(call: Callable[[], Any], rounds: int = 10) -> float:
    """Return the median time of a call, after two to warm up; of fewer rounds, but three, when they take seconds."""
    taken: list[float] = []
    while len(taken) < 2 + rounds and (len(taken) < 5 or sum(taken) < PATIENCE):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:]) * 1e3
