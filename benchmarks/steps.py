"""Ask how few denoising steps are enough: `python -m benchmarks.steps --checkpoint RUN_FOLDER`.

For each sampler and number of steps the same checkpoint acts in its simulator, from the same starts; beside score A and
success B stand the milliseconds that one action chunk for one robot takes on this machine, in PyTorch and (DDPM and
DDIM) in ONNX Runtime, and the share of the time that the chunk's actions take. The table is printed; it goes to
benchmarks/results/steps-<date>.json, with a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from getiaction.config.evaluation import Evaluation, build_environment, check_environment, find_env, measure_latency
from getiaction.config.record import describe_machine, pick_device
from getiaction.config.sampling import change_scheduler, check_steps, find_scheduler
from getiaction.interop.lerobot import find_policy_folder, load_policy
from getiaction.interop.onnx_file import export_onnx
from getiaction.policy import DiffusionPolicy
from getiaction.policy.steps import known_steps
from getiaction.simulation.evaluation import Crowd

RESULTS = Path(__file__).parent / "results"
SAMPLERS = ("ddpm:100", "ddpm:20", "ddpm:10", "ddpm:5", "ddim:10", "ddim:5", "ddim:2", "dpm_solver:10", "dpm_solver:5")


def measure(checkpoint: Path, sampler: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how well and how fast a checkpoint acts by a sampler, `<scheduler>:<steps>`."""
    name, count = sampler.split(":")
    steps, device = int(count), pick_device(arguments.device)
    policy = load_policy(checkpoint, device=device)
    change_scheduler(policy, find_scheduler(name))
    check_steps(policy, steps)
    env = find_env(checkpoint)
    environment = check_environment(build_environment(env), policy.features)
    seeds = range(arguments.seed, arguments.seed + arguments.episodes)
    evaluation = Evaluation(env, seeds, Crowd(None, None), num_inference_steps=steps, videos=False)
    with tempfile.TemporaryDirectory() as folder:
        summary = evaluation.run(policy, Path(folder), {})
    torch_ms = measure_latency(policy, environment, steps)
    known = known_steps(policy.noise_scheduler, steps, policy.prediction_type)
    onnx_ms = measure_onnx(policy, steps) if known else None
    chunk_ms = policy.n_action_steps / arguments.hz * 1e3
    return {
        "sampler": name,
        "steps": steps,
        "score": [summary.score.mean, summary.score.low, summary.score.high],
        "success": [summary.success.mean, summary.success.low, summary.success.high],
        "torch_ms": round(torch_ms, 2),
        "onnx_ms": onnx_ms and round(onnx_ms, 2),
        "share_of_chunk": round(torch_ms / chunk_ms, 4),
    }


def measure_onnx(policy: DiffusionPolicy, steps: int) -> float:
    """Return the milliseconds of a chunk in ONNX Runtime, on the CPU."""
    device = policy.device
    with tempfile.TemporaryDirectory() as folder:
        milliseconds = export_onnx(Path(folder) / "policy.onnx", policy, num_inference_steps=steps).onnx_ms
    policy.to(device)
    return milliseconds


def shown(row: dict[str, Any]) -> str:
    """Return the table's row."""
    score, success = row["score"], row["success"]
    return (
        f"| {row['sampler']} | {row['steps']} | {score[0]:.3f} [{score[1]:.3f}, {score[2]:.3f}] | {success[0]:.0%} "
        f"[{success[1]:.0%}, {success[2]:.0%}] | {row['torch_ms']:.1f} | {row['onnx_ms'] or '-'} | "
        f"{row['share_of_chunk']:.1%} |"
    )


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw score A over latency, a line for each sampler."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["sampler"] for row in rows):
        own = sorted((row for row in rows if row["sampler"] == name), key=lambda row: row["torch_ms"])
        means = [row["score"][0] for row in own]
        spread = [
            [row["score"][0] - row["score"][1] for row in own],
            [row["score"][2] - row["score"][0] for row in own],
        ]
        axes.errorbar([row["torch_ms"] for row in own], means, spread, marker="o", capsize=3, label=name)
        for row in own:
            axes.annotate(
                str(row["steps"]), (row["torch_ms"], row["score"][0]), xytext=(4, 4), textcoords="offset points"
            )
    axes.set(xscale="log", xlabel="one action chunk, ms", ylabel="score A (95% interval)", title="Denoising steps")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure the samplers that were asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run folder, a checkpoint or a policy folder")
    parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS), help="<scheduler>:<steps> ...")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--hz", type=float, default=10.0, help="of the control loop")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/steps-<date>.json")
    arguments = parser.parse_args()
    checkpoint = find_policy_folder(arguments.checkpoint)
    print("| sampler | steps | score A | success B | PyTorch, ms | ONNX Runtime, ms | share of the chunk's time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for sampler in arguments.samplers:
        rows.append(measure(checkpoint, sampler, arguments))
        print(shown(rows[-1]), flush=True)
    path = arguments.result or RESULTS / f"steps-{datetime.now(UTC):%Y-%m-%d}.json"
    described = {"date": datetime.now(UTC).isoformat(), **describe_machine(torch.device(pick_device(arguments.device)))}
    described |= {"checkpoint": str(checkpoint), "episodes": arguments.episodes, "hz": arguments.hz, "rows": rows}
    path.write_text(json.dumps(described, indent=1) + "\n")
    draw(path.with_suffix(".png"), rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
