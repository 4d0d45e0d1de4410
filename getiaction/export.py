"""Write a policy as an ONNX file that runs without PyTorch: `getiaction export RUN_FOLDER --output policy.onnx`."""

from __future__ import annotations

import argparse
from pathlib import Path

from getiaction.errors import InputError, exit_with_message
from getiaction.startup import release_collector


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="getiaction export",
        description="Write a policy as one ONNX file: observations and noise in, an action chunk out, the sampler "
        "inside. ONNX Runtime and OpenVINO run it without PyTorch; it is checked against PyTorch before it is kept.",
    )
    parser.add_argument("policy", help="a run folder (its last checkpoint is taken), a checkpoint, or a policy folder")
    parser.add_argument("--output", type=Path, required=True, help="the file, <name>.onnx")
    parser.add_argument("--scheduler", help="ddpm or ddim; default: the policy's own")
    parser.add_argument("--num-inference-steps", type=int, help="denoising steps; default: the policy's own")
    parser.add_argument("--n-action-steps", type=int, help="actions of a chunk to execute; default: the policy's own")
    parser.add_argument("--batch-size", type=int, default=1, help="robots that act at once (1)")
    return parser


def export(arguments: argparse.Namespace) -> list[str]:
    """Write the file; return the lines to print.

    Raises:
        InputError: there is no policy, or it cannot be exported; nothing has been written.
    """
    if arguments.output.suffix != ".onnx":
        raise InputError(f"--output {arguments.output} must end with .onnx")
    if arguments.output.is_dir():
        raise InputError(f"--output {arguments.output} is a folder: give the name of a file in it")
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size} must be at least 1")
    from getiaction.config.sampling import change_action_steps, change_scheduler, check_steps, find_scheduler
    from getiaction.interop.lerobot import find_policy_folder, load_policy
    from getiaction.interop.onnx_file import export_onnx

    release_collector()
    folder = find_policy_folder(arguments.policy, key="policy")
    policy = load_policy(folder)
    if arguments.scheduler is not None:
        change_scheduler(policy, find_scheduler(arguments.scheduler))
    check_steps(policy, arguments.num_inference_steps, "--num-inference-steps")
    if arguments.n_action_steps is not None:
        change_action_steps(policy, arguments.n_action_steps, "--n-action-steps")
    steps = arguments.num_inference_steps or policy.num_inference_steps
    seen = export_onnx(arguments.output, policy, num_inference_steps=steps, batch_size=arguments.batch_size)
    inputs = [f"  {name:34} {kind:8} {shape}" for name, kind, shape in seen.inputs]
    size = arguments.output.stat().st_size / 1e6
    return [
        f"{arguments.output} ({size:.1f} MB): {type(policy.noise_scheduler).__name__}, {steps} denoising steps",
        *inputs,
        f"  -> {seen.output[0]:31} {seen.output[1]:8} {seen.output[2]}",
        f"differs from PyTorch by at most {seen.difference:.1e} of the actions' range; one chunk takes "
        f"{seen.onnx_ms:.1f} ms in ONNX Runtime, {seen.torch_ms:.1f} ms in PyTorch, on this machine's CPU",
    ]


def main() -> None:
    """Run as a command."""
    with exit_with_message():
        print("\n".join(export(parser().parse_args())))


if __name__ == "__main__":
    main()
