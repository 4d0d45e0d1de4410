"""Build a policy's ONNX graph: two parts, each exported by PyTorch once, with the denoising step in a loop.

The first part takes the observations and gives what every step needs of them, and brings the denoised sample back to
the dataset's units; the second is one denoising step. ONNX's `Scan` runs it for each step, so neither the time to
export nor the graph grows with the number of steps, and the U-Net's weights are there once. ONNX Runtime takes as long
as for the steps one after the other: benchmarks/NOTES.md.
Source: https://onnx.ai/onnx/operators/onnx__Scan.html
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from getiaction.errors import InputError
from getiaction.interop.onnx_rows import in_rows
from getiaction.policy import ConditionalUnet1d, DiffusionPolicy
from getiaction.policy.steps import Step, clip_of, known_steps

NOISE, CHUNK, STEP_NOISE = "noise", "action", "step_noise"
NUMBERS = "abcde"  # of a step; s is multiplied with the noise beforehand
ADDED, DENOISED = "added_noise", "denoised"
PARTS = 2


class ChunkGraph(nn.Module):
    """Do what `DiffusionPolicy.predict_action_chunk` does, as a graph without randomness.

    Args:
        policy: in evaluation mode, on the CPU.
        num_inference_steps: S.

    Raises:
        InputError: its scheduler carries something from step to step, as DPM-Solver does.
    """

    def __init__(self, policy: DiffusionPolicy, num_inference_steps: int) -> None:
        super().__init__()
        known = known_steps(policy.noise_scheduler, num_inference_steps, policy.prediction_type)
        if known is None:
            raise InputError(
                f"scheduler={type(policy.noise_scheduler).__name__} cannot be exported: use --scheduler ddpm or ddim"
            )
        self.policy, self.keys = policy, policy.features.observation_keys
        self.timesteps, self.steps = known
        self.clip = clip_of(policy.noise_scheduler)
        self.draws = [number for number, step in enumerate(self.steps) if step.s]  # steps that add noise

    def forward(self, noise: Tensor, step_noise: Tensor | None, *observations: Tensor) -> Tensor:
        """Return (B, Ta, Da), step after step: what the loop is compared with.

        Args:
            noise: (B, T, Da), standard normal.
            step_noise: (steps that add noise, B, T, Da), standard normal; None where none does.
            observations: one tensor for each of `keys`, (B, To, ...) raw units, pictures uint8.
        """
        films, sample = self.films(self.policy.diffusion.unet, observations), noise
        for number, step in enumerate(self.steps):
            output = self.policy.diffusion.unet.denoise(sample, [film[number] for film in films])
            fresh = step_noise[self.draws.index(number)] if step.s and step_noise is not None else None
            sample = step.take(output, sample, self.clip, fresh)
        return self.policy.executed(sample)

    def films(self, unet: ConditionalUnet1d, observations: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the values of each FiLM layer of the policy's U-Net, (S, B, C') or with scales (S, B, 2C')."""
        policy = self.policy
        prepared = policy.prepare(dict(zip(self.keys, observations, strict=True)))
        return unet.modulation(self.timesteps, policy.encode(policy.normalizer(prepared)))


class AroundSteps(nn.Module):
    """Compute what all steps take of the observations and of the noise, and bring what they make to its units."""

    def __init__(self, graph: ChunkGraph, unet: ConditionalUnet1d) -> None:
        super().__init__()
        self.unet = unet
        self.whole = graph  # torch.fx has a `graph` of its own in its modules
        row = {number: row for row, number in enumerate(graph.draws)}
        # a step that adds none takes any row, times 0
        self.rows = torch.tensor([row.get(number, 0) for number in range(len(graph.steps))])  # (S,)
        self.scales = torch.tensor([step.s for step in graph.steps])  # (S,)

    def forward(self, denoised: Tensor, step_noise: Tensor | None, *observations: Tensor) -> tuple[Tensor, ...]:
        """Return the chunk, (B, Ta, Da), the noise that each step adds, (S, B, T, Da), if any does, and FiLM's values.

        Args:
            denoised: (B, T, Da), which depends on all that follows the chunk.
            step_noise: as in `ChunkGraph`.
            observations: as in `ChunkGraph`.
        """
        chunk, films = self.whole.policy.executed(denoised), self.whole.films(self.unet, observations)
        if step_noise is None:
            return chunk, *films
        return chunk, step_noise.index_select(0, self.rows) * self.scales[:, None, None, None], *films


class OneStep(nn.Module):
    """Take a step as `Step.take` does, with its numbers as inputs."""

    def __init__(self, unet: ConditionalUnet1d, clip: float | None, names: list[str]) -> None:
        super().__init__()
        self.unet, self.clip, self.names = unet, clip, names

    def forward(self, sample: Tensor, *taken: Tensor) -> Tensor:
        """Map (B, T, Da) to (B, T, Da); `taken` are the step's numbers, (), and its noise by `names`, then its FiLM."""
        count = len(self.names)
        given = dict(zip(self.names, taken[:count], strict=True))
        output = self.unet.denoise(sample, taken[count:])
        clean = weighted(given, a=sample, b=output)
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        following = weighted(given, c=clean, d=sample, e=output)
        return following + given[ADDED] if ADDED in given else following


def weighted(given: Mapping[str, Tensor], **parts: Tensor) -> Tensor:
    """Add the parts, each times the number of its name; leave out those without one."""
    first, *rest = [part * given[name] for name, part in parts.items() if name in given]
    return sum(rest, first)


def numbers_of(steps: list[Step]) -> dict[str, Tensor]:
    """Return the steps' numbers, (S,) each, but those that are 0 at all of them."""
    numbers = {name: torch.tensor([getattr(step, name) for step in steps]) for name in NUMBERS}
    return {name: values for name, values in numbers.items() if values.any()}


def in_order(graph: ChunkGraph, inputs: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Return inputs as `ChunkGraph.forward` takes them."""
    return (inputs[NOISE], inputs.get(STEP_NOISE), *(inputs[key] for key in graph.keys))


@torch.no_grad()
def to_onnx(graph: ChunkGraph, inputs: Mapping[str, Tensor], bar: tqdm) -> Any:
    """Return the ONNX model of a graph, with what a control loop must know in its metadata; move `bar` by PARTS."""
    noise, *others = in_order(graph, inputs)
    unet = in_rows(graph.policy.diffusion.unet)
    around = AroundSteps(graph, unet)
    _, *values = around(noise, *others)
    numbers, added = numbers_of(graph.steps), [ADDED] if STEP_NOISE in inputs else []
    made = [*added, *(f"film.{number}" for number in range(len(values) - len(added)))]
    taken = [*numbers, *made]
    slices = [value[0] for value in (*numbers.values(), *values)]

    bar.set_postfix_str("what is around the steps")
    names = [key for key in inputs if key != NOISE]
    model = exported(around, (noise, *others), [DENOISED, *names], [CHUNK, *made])
    bar.update()
    bar.set_postfix_str("the denoising step")
    step = exported(OneStep(unet, graph.clip, [*numbers, *added]), (noise, *slices), ["sample", *taken], ["following"])
    bar.update()

    join(model.graph, step.graph, taken, numbers)
    for key, value in described(graph).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model


def exported(part: nn.Module, arguments: tuple[Tensor | None, ...], inputs: list[str], outputs: list[str]) -> Any:
    """Return the ONNX model of a part."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            part.eval(), arguments, input_names=inputs, output_names=outputs, dynamo=True, verbose=False
        )
    assert program is not None
    model = program.model_proto
    assert not model.functions, "they would have to be joined, too"
    return model


def join(graph: Any, step: Any, taken: list[str], numbers: Mapping[str, Tensor]) -> None:
    """Put a loop over `step` into `graph`, after what it has `taken`, and before all that takes what it makes.

    Args:
        graph: what is around the steps, an ONNX graph, as `step` is.
        taken: names of what the loop goes through, in the order of the step's inputs; `numbers` are among them.
        numbers: (S,) each.
    """
    from onnx import compose, helper, numpy_helper

    compose.add_prefix_graph(step, "step/", inplace=True)  # names within a loop must be others than outside
    (sample,) = (one for one in graph.input if one.name == DENOISED)
    sample.name = NOISE  # of the same shape
    graph.initializer.extend(numpy_helper.from_array(values.numpy(), name) for name, values in numbers.items())
    nodes, late = list(graph.node), {DENOISED}
    for node in nodes:  # in the order of their computation
        if late.intersection(node.input):
            late.update(node.output)
    del graph.node[:]
    graph.node.extend(node for node in nodes if not late.intersection(node.output))
    loop = graph.node.add(op_type="Scan", name="steps", input=[NOISE, *taken], output=[DENOISED])
    loop.attribute.append(helper.make_attribute("num_scan_inputs", len(taken)))
    body = loop.attribute.add(name="body", type=helper.AttributeProto.GRAPH)
    body.g.CopyFrom(step)  # the weights are in here, where OpenVINO and ONNX Runtime take them for constants
    graph.node.extend(node for node in nodes if late.intersection(node.output))
    del graph.output[1:]  # what the loop takes; the first is the chunk


def described(graph: ChunkGraph) -> dict[str, str]:
    """Return what a control loop must know about a file."""
    policy = graph.policy
    return {
        "n_obs_steps": json.dumps(policy.n_obs_steps),
        "horizon": json.dumps(policy.horizon),
        "n_action_steps": json.dumps(policy.n_action_steps),
        "num_inference_steps": json.dumps(len(graph.steps)),
        "scheduler": type(policy.noise_scheduler).__name__,
        "observations": json.dumps(list(graph.keys)),
    }
