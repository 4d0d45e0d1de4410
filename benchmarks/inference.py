"""Measure one action chunk against LeRobot's, same weights, same noise, turn by turn: `python -m benchmarks.inference`.

For each preset a policy of drawn weights is written as a checkpoint and opened in both libraries; their chunks must be
equal to float32 rounding. Then both predict one chunk for one robot, alternately, each from observations that are ready
(LeRobot's normalised already; ours raw, so normalising is in our time). Median and quartiles of both, and the ratio of
the medians, go to benchmarks/results/inference-<date>.json; on a CPU ours a second time as an exported file in ONNX
Runtime; and once more under autocast to bf16, if it is a CPU, whose memory that spares, or a GPU that multiplies it.
"Share of a chunk's time" is the real-time report: what one chunk takes, of the time that its actions take at the
preset's rate (PushT 10 Hz, ALOHA 50).
Before each call lies a pause, as in a robot's control loop: threads of the library before, which wait for more work,
have gone to sleep then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as LeRobotPolicy
from lerobot.policies.factory import make_pre_post_processors
from torch import Tensor

from getiaction.config.build import build_policy
from getiaction.config.compose import compose
from getiaction.config.record import describe_machine
from getiaction.config.schema import Config
from getiaction.half import is_faster_in_bf16
from getiaction.interop.lerobot import load_policy, write_policy
from getiaction.interop.onnx_file import export_onnx
from getiaction.interop.onnx_policy import OnnxPolicy
from getiaction.keys import is_camera
from getiaction.policy import DiffusionPolicy, Features

RESULTS = Path(__file__).parent / "results"
PRESETS = ("pusht_laptop", "pusht_keypoints", "pusht_cpu", "pusht_fast", "pusht_basic", "pusht_advanced", "aloha")
CAMERAS = {
    "aloha": dict.fromkeys(("observation.images.top", "observation.images.wrist"), (3, 480, 640)),
}
RATE = {"aloha": 50.0}  # Hz of the control loop; PushT's is 10
WARM_UP = 2


def features_of(config: Config) -> Features:
    """Return what a preset's policy sees: the shapes of its dataset."""
    if not config.uses_images:
        return Features(action_dim=2, state_dim=2, env_state_dim=16)
    if config.name in CAMERAS:
        return Features(action_dim=14, state_dim=14, cameras=CAMERAS[config.name])
    return Features(action_dim=2, state_dim=2, cameras={"observation.image": (3, 96, 96)})


def draw(features: Features, steps: int, device: str) -> dict[str, Tensor]:
    """Return one robot's observations, (1, To, ...), pictures in [0, 1], of the 256 values that are recorded."""
    shapes = {key: features.shapes[key] for key in features.observation_keys}
    drawn = {key: torch.rand((1, steps, *shape)) for key, shape in shapes.items()}
    return {key: ((one * 255).round() / 255 if is_camera(key) else one).to(device) for key, one in drawn.items()}


def statistics_of(features: Features) -> dict[str, dict[str, Tensor]]:
    """Return made-up statistics."""
    sizes = {key: (shape[0], 1, 1) if len(shape) == 3 else shape for key, shape in features.shapes.items()}
    made = {"min": 0.0, "max": 1.0, "mean": 0.5, "std": 0.5}
    return {key: {name: torch.full(size, value) for name, value in made.items()} for key, size in sizes.items()}


def alternate(
    calls: dict[str, Callable[[], Tensor]], rounds: int, wait: Callable[[], None], pause: float
) -> dict[str, list[float]]:
    """Call each in turn, `rounds` times; return milliseconds. The order changes every round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            time.sleep(pause)
            wait()
            begin = time.perf_counter()
            calls[name]()
            wait()
            if number >= WARM_UP:
                taken[name].append((time.perf_counter() - begin) * 1e3)
    return taken


def measure(preset: str, device: str, rounds: int, pause: float) -> dict[str, Any]:
    """Return a preset's latencies and how far the two libraries' chunks are apart."""
    config = compose([f"+preset={preset}", "hardware.num_processes=1"])
    features = features_of(config)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy"
        write_policy(path, build_policy(config, features, statistics_of(features), fetch_weights=False))
        ours: DiffusionPolicy = load_policy(path, device=device)
        file = exported(ours, Path(folder) / "policy.onnx") if device == "cpu" else None
        theirs = LeRobotPolicy.from_pretrained(path)
        preprocess, postprocess = make_pre_post_processors(
            theirs.config, pretrained_path=str(path), preprocessor_overrides={"device_processor": {"device": device}}
        )
    theirs.to(device)
    theirs.reset()
    seen = draw(features, config.policy.n_obs_steps, device)
    ready = preprocess({key: value[0] for key, value in seen.items()})
    batch = {key: ready[key][None] for key in seen}
    noise = torch.randn((1, config.policy.horizon, features.action_dim), device=device)

    def act() -> Tensor:
        torch.manual_seed(1)
        return ours.predict_action_chunk(seen, noise=noise)

    def act_lerobot() -> Tensor:
        torch.manual_seed(1)
        return theirs.predict_action_chunk(batch, noise=noise)

    def act_in_bf16() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return act()

    def act_in_onnx() -> Tensor:
        torch.manual_seed(1)
        assert file is not None
        return file.predict_action_chunk(seen, noise=noise)

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    calls = {"lerobot": act_lerobot, "getiaction": act}
    if file is not None:
        calls["getiaction onnx"] = act_in_onnx
    if device == "cpu" or is_faster_in_bf16(device):
        calls["getiaction bf16"] = act_in_bf16
    exact = postprocess(act_lerobot())
    apart = {name: float((call().cpu() - exact).abs().max()) for name, call in calls.items() if name != "lerobot"}
    taken = alternate(calls, rounds, wait, pause)
    quartiles = {name: [round(float(q), 3) for q in np.quantile(ms, (0.25, 0.5, 0.75))] for name, ms in taken.items()}
    rate = RATE.get(preset, 10.0)
    chunk_ms = config.policy.n_action_steps / rate * 1e3
    medians = {name: statistics.median(ms) for name, ms in taken.items()}
    return {
        "preset": preset,
        "parameters": sum(weight.numel() for weight in ours.parameters()),
        "num_inference_steps": ours.num_inference_steps,
        "n_action_steps": ours.n_action_steps,
        "quartiles_ms": quartiles,
        "ratio": {name: round(medians["lerobot"] / medians[name], 2) for name in apart},
        "largest_difference": apart,
        "control_hz": rate,
        "within_one_step": {name: medians[name] < 1e3 / rate for name in apart},
        "share_of_chunk": {name: round(medians[name] / chunk_ms, 3) for name in apart},
    }


def exported(policy: DiffusionPolicy, path: Path) -> OnnxPolicy:
    """Return a policy as ONNX Runtime runs it, on as many threads as PyTorch has."""
    export_onnx(path, policy, num_inference_steps=policy.num_inference_steps)
    return OnnxPolicy(path, num_threads=torch.get_num_threads())


def main() -> None:
    """Measure the presets that were asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pauses", type=float, default=0.05, help="seconds between two calls")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/inference-<date>.json")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 says float32
    results = [measure(preset, arguments.device, arguments.rounds, arguments.pauses) for preset in arguments.presets]
    path = arguments.result or RESULTS / f"inference-{datetime.now(UTC):%Y-%m-%d}.json"
    machine = describe_machine(torch.device(arguments.device))
    path.write_text(json.dumps({"date": datetime.now(UTC).isoformat(), **machine, "results": results}, indent=1) + "\n")
    print("| preset | LeRobot, ms | here, ms | ratio | differ by | share of a chunk's time |")
    print("| --- | --- | --- | --- | --- | --- |")
    for result in results:
        shown = {name: f"{q[1]:.1f} [{q[0]:.1f}, {q[2]:.1f}]" for name, q in result["quartiles_ms"].items()}
        for name, ratio in result["ratio"].items():
            how = name.removeprefix("getiaction").strip()
            print(
                f"| `{result['preset']}`{how and f', {how}'} | {shown['lerobot']} | {shown[name]} | **{ratio}** | "
                f"{result['largest_difference'][name]:.1e} | {result['share_of_chunk'][name]:.1%} of "
                f"{1e3 * result['n_action_steps'] / result['control_hz']:.0f} ms |"
            )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
