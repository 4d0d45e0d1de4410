"""Run a YAML file of the first GetiAction: `getiaction fit --config FILE.yaml --model.horizon 16`.

The file is said as overrides of the config here (`getiaction.config.lightning`), and training is `getiaction.train`'s.
"""

from __future__ import annotations

import shlex
import sys

from getiaction.errors import InputError, exit_with_message

USAGE = """usage: getiaction {command} --config FILE.yaml [--config MORE.yaml] [--model.KEY VALUE] [--data.KEY VALUE]
                [--trainer.KEY VALUE] [--seed_everything N] [--ckpt_path CHECKPOINT] [--strict] [--print_config]

{what}

  --config FILE        model:, data: and trainer: sections; of several files the later ones win
  --model.horizon 16   a key of model.init_args; --model.init_args.horizon=16 is the same; data. likewise
  --trainer.max_steps  a key of trainer
  --getiaction.ema.power 0.7   any key of the config here, for what the format has no word for
  --ckpt_path          {ckpt}
  --strict             refuse a file that contradicts itself; without it, it is mended, line by line
  --print_config       show the merged file and do nothing else

model:   {model}
data:    {data}
trainer: {trainer}

Examples: conf/lightning/."""
WHAT = {
    "fit": ("Train what a YAML file of the first GetiAction says.", "a run folder to go on with"),
    "validate": (
        "Measure a policy on the held-out episodes of a file's data.",
        "the policy: a run, a folder, a Hub name",
    ),
    "test": ("Let a policy act in the simulator of a file's data.", "the policy: run, folder or Hub name"),
}


def main(command: str = "fit") -> None:
    """Run as a command."""
    given = sys.argv[1:]
    if not given or {"--help", "-h"} & set(given):
        print(usage(command))
        return
    with exit_with_message():
        arguments = run(command, given)
    if arguments is None:
        return
    if command == "test":
        from getiaction.evaluate import main as run_main
    else:
        from getiaction.train import main as run_main
    sys.argv = [sys.argv[0], *arguments]
    run_main()


def run(command: str, given: list[str]) -> list[str] | None:
    """Return the overrides that do what a command line asks for; None if it is done already.

    Raises:
        InputError: the file cannot work; the message names its keys.
    """
    from getiaction.config.lightning.arguments import read_arguments
    from getiaction.config.lightning.command import print_config, translate_aloud
    from getiaction.config.overrides import quote

    arguments = read_arguments(given)
    if arguments.print_config:
        print_config(arguments)
        return None
    checkpoint = arguments.content.pop("ckpt_path", None) if command != "fit" else None
    if command != "fit" and checkpoint is None:
        raise InputError(f"{command} needs --ckpt_path: a run folder, a policy folder, or a policy's name on the Hub")
    found = translate_aloud(arguments)
    if command == "validate":
        from getiaction.validate import validate_command

        validate_command(found.overrides, str(checkpoint))
        return None
    if command == "test":
        rollouts = arguments.content.get("data", {}).get("init_args", {}).get("num_rollouts_test")
        limits = [f"env.max_steps={found.values['env.max_steps']}"] if "env.max_steps" in found.values else []
        device = found.values.get("hardware.device", "auto")
        overrides = [f"checkpoint={quote(str(checkpoint))}", f"env={found.values['env']}", *limits, f"device={device}"]
        overrides += [f"episodes={rollouts}"] if rollouts else []
        say("evaluate", overrides)
        return overrides
    say("train", found.overrides)
    return found.overrides


def say(module: str, overrides: list[str]) -> None:
    """Show the command that does the same."""
    print(f"the same here: {shlex.join(['python', '-m', f'getiaction.{module}', *overrides])}", flush=True)


def usage(command: str) -> str:
    """Return the help."""
    from textwrap import fill

    from getiaction.config.lightning import keys

    def listed(*tables: dict) -> str:
        return fill(", ".join(name for table in tables for name in table), 118, subsequent_indent=" " * 9)

    what, ckpt = WHAT[command]
    return USAGE.format(
        command=command,
        what=what,
        ckpt=ckpt,
        model=listed(keys.MODEL, keys.MODEL_SPECIAL),
        data=listed(keys.DATA, keys.DATA_SPECIAL),
        trainer=listed(keys.TRAINER, keys.TRAINER_SPECIAL),
    )


if __name__ == "__main__":
    main()
