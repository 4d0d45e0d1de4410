"""Check a config, its dataset and its policy without training: `getiaction check +preset=pusht_fast`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from getiaction.errors import exit_with_message

USAGE = """usage: getiaction check [+preset=NAME] [key=value ...]
       getiaction check --config FILE.yaml [options of `getiaction fit`]

Check everything that training checks before it decodes or writes anything: keys, values, what they mean together, the
dataset, the policy that they build. Ends with 0 and a summary, or with 2 and what is wrong, a line each.
strict=true makes errors of warnings."""


def check(overrides: list[str]) -> list[str]:
    """Check what a command line composes to; return lines that sum it up.

    Raises:
        InputError: it cannot work.
    """
    from getiaction.config import run
    from getiaction.config.build import build_features, build_policy
    from getiaction.config.compose import compose
    from getiaction.config.prepare import find_checked_data
    from getiaction.config.record import check_folder
    from getiaction.config.resume import take_up

    config = compose(overrides)
    folder = Path(config.output_dir)
    config = take_up(config, overrides, folder)
    check_folder(config, folder)
    mixture = find_checked_data(config)
    run.check_buildable(config, mixture)
    policy = build_policy(config, build_features(config, mixture.metadata), {}, fetch_weights=False, device="meta")
    parameters = sum(weight.numel() for weight in policy.parameters()) / 1e6
    training, hardware = config.training, config.hardware
    processes = hardware.num_processes * hardware.num_nodes
    batch = training.batch_size * training.gradient_accumulation_steps * processes
    lengths = {"steps": training.max_steps, "epochs": training.max_epochs}
    return [
        f"policy: {parameters:.1f} M parameters, sees {', '.join(policy.features.observation_keys)}",
        *(f"data: {source.describe()}" for source in mixture.sources),
        f"training: {' or '.join(f'{count} {unit}' for unit, count in lengths.items() if count)} of {batch} samples",
        "all is well",
    ]


def main() -> None:
    """Run as a command."""
    given = sys.argv[1:]
    if {"--help", "-h"} & set(given):
        print(USAGE)
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_with_message():
        if any(option.startswith("--") for option in given):
            from getiaction.config.lightning.arguments import read_arguments
            from getiaction.config.lightning.command import print_config, translate_aloud

            arguments = read_arguments(given)
            if arguments.print_config:
                print_config(arguments)
                return
            given = translate_aloud(arguments).overrides
        print("\n".join(check(given)))


if __name__ == "__main__":
    main()
