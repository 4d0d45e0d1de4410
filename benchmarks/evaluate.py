"""Measure evaluation against `lerobot-eval`, turn by turn: `python -m benchmarks.evaluate --episodes 20`.

A policy of drawn weights (or `--checkpoint`, one for each preset) acts in gym-pusht by both commands, as users run
them: LeRobot with its own choice of environments at once (or `--lerobot-batch`), ours with ours, both with films. They
take turns in changing order. Reported are episodes per minute of the whole command, start-up included, and of the
rollouts alone, as each says itself (LeRobot's rollouts draw its films, ours are drawn after them).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.train import write_start
from getiaction.config.compose import compose
from getiaction.config.record import describe_machine

RESULTS = Path(__file__).parent / "results"
PRESETS = ("pusht_keypoints", "pusht_fast")


def run(command: list[str], folder: Path) -> float:
    """Run a command; return its seconds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "SDL_VIDEODRIVER": "dummy"}
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return time.perf_counter() - begin


def evaluate_ours(policy: Path, folder: Path, episodes: int, pictures: bool) -> tuple[list[str], float, float]:
    """Return the command, its seconds, and the seconds of the rollouts."""
    command = [sys.executable, "-m", "getiaction.evaluate", f"checkpoint={policy}", "env=pusht", f"episodes={episodes}"]
    command += [f"output_dir={folder / 'ours'}"]
    seconds = run(command, folder)
    said = json.loads((folder / "ours/evaluation.json").read_text())
    return command, seconds, episodes / said["episodes_per_minute"] * 60


def evaluate_lerobot(
    policy: Path, folder: Path, episodes: int, pictures: bool, batch_size: int = 0
) -> tuple[list[str], float, float]:
    """Return the command, its seconds, and the seconds of the rollouts."""
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_eval", f"--policy.path={policy}", "--env.type=pusht"]
    command += [
        f"--eval.n_episodes={episodes}",
        f"--eval.batch_size={batch_size}",
        f"--output_dir={folder / 'lerobot'}",
    ]
    command += [f"--policy.device={'cuda' if torch.cuda.is_available() else 'cpu'}"]
    command += [] if pictures else ["--env.obs_type=environment_state_agent_pos"]
    command += ["--eval.use_async_envs=false"] if batch_size > 1 else []  # its workers do not know gym_pusht
    seconds = run(command, folder)
    said = json.loads((folder / "lerobot/eval_info.json").read_text())
    return command, seconds, said["overall"]["eval_s"]


def compare(preset: str, checkpoint: Path | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return both rates, round by round, and the ratios of their medians."""
    pictures = compose([f"+preset={preset}", "hardware.num_processes=1"]).uses_images
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        policy = checkpoint or write_start(preset, Path(place) / "policy")
        calls = {"lerobot": partial(evaluate_lerobot, batch_size=arguments.lerobot_batch), "getiaction": evaluate_ours}
        for number in range(arguments.rounds):
            for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
                folder = Path(place) / f"{name}{number}"
                folder.mkdir()
                command, seconds, rollouts = calls[name](policy, folder, arguments.episodes, pictures)
                rates = {"whole": arguments.episodes / seconds * 60, "rollouts": arguments.episodes / rollouts * 60}
                rounds.append({"name": name, "command": command[1:], "episodes_per_minute": rates})
                print(f"{preset}: {name} {rates['whole']:.1f} episodes/min in all, {rates['rollouts']:.1f} rolling out")
    medians = {
        name: {
            kind: statistics.median(entry["episodes_per_minute"][kind] for entry in rounds if entry["name"] == name)
            for kind in ("whole", "rollouts")
        }
        for name in calls
    }
    ratios = {kind: round(medians["getiaction"][kind] / medians["lerobot"][kind], 2) for kind in ("whole", "rollouts")}
    return {"preset": preset, "episodes": arguments.episodes, "rounds": rounds, "medians": medians, "ratios": ratios}


def main() -> None:
    """Measure the presets that were asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=(*PRESETS, "pusht_cpu", "pusht_basic"))
    parser.add_argument("--checkpoint", nargs="*", type=Path, default=[], help="policy folders, in the presets' order")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--lerobot-batch", type=int, default=0, help="LeRobot's environments at once; 0: its own choice"
    )
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/evaluate-<date>.json")
    arguments = parser.parse_args()
    if len(arguments.checkpoint) > len(arguments.presets):
        parser.error(f"{len(arguments.checkpoint)} checkpoints for {len(arguments.presets)} presets")
    given = [*(path.resolve() for path in arguments.checkpoint), *[None] * len(arguments.presets)]
    results = [compare(preset, path, arguments) for preset, path in zip(arguments.presets, given, strict=False)]
    path = arguments.result or RESULTS / f"evaluate-{datetime.now(UTC):%Y-%m-%d}.json"
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path.write_text(json.dumps({"date": datetime.now(UTC).isoformat(), **machine, "results": results}, indent=1) + "\n")
    print("| preset | lerobot-eval, episodes/min (rollouts alone) | here | ratio |")
    print("| --- | --- | --- | --- |")
    for result in results:
        shown = [f"{rates['whole']:.1f} ({rates['rollouts']:.1f})" for rates in result["medians"].values()]
        ratios = result["ratios"]
        print(f"| `{result['preset']}` | {' | '.join(shown)} | **{ratios['whole']}** ({ratios['rollouts']}) |")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
