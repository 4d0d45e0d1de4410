"""Run a YAML file of the first GetiAction: `getiaction fit --config FILE.yaml --model.horizon 16`.

The file is said as overrides of the config here (`getiaction.config.lightning`), and training is `getiaction.train`'s.
"""

from __future__ import annotations

import re
import shlex
import sys
from typing import TYPE_CHECKING

from getiaction.errors import InputError, exit_with_message

if TYPE_CHECKING:
    from getiaction.config.lightning.arguments import Arguments
    from getiaction.config.lightning.translation import Translation

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


def print_config(arguments: Arguments) -> None:
    """Show the merged file."""
    import yaml

    print(yaml.safe_dump(arguments.content, sort_keys=False), end="")


def translate_aloud(arguments: Arguments) -> Translation:
    """Translate a command line, say what was changed and left out, and check what came of it.

    Raises:
        InputError: it cannot work; the message names the keys of the file.
    """
    from getiaction.config.lightning.translate import translate

    found = translate(arguments)
    for line in found.changed:
        print(f"changed: {line}")
    for line in found.left_out:
        print(f"left out: {line}")
    for line in found.notes:
        print(f"note: {line}")
    try:
        check(found.overrides)
    except InputError as error:
        named = [f"{key} is {found.sources[key]}" for key in found.sources if names(str(error), key)]
        more = f"\n       ({', '.join(named)})" if named else ""
        raise InputError(f"{error}{more}") from error
    return found


def names(message: str, key: str) -> bool:
    """Tell whether a message is about a dotted key."""
    return "." in key and re.search(rf"\b{re.escape(key)}\b", message) is not None


def check(overrides: list[str]) -> None:
    """Check a config and its dataset, as training will."""
    from getiaction.config.checks import check_config
    from getiaction.config.compose import compose
    from getiaction.config.dataset_checks import check_dataset
    from getiaction.config.sources import find_data

    config = compose(overrides)
    check_config(config)
    check_dataset(config, find_data(config))


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
