"""The `getiaction` command: `getiaction train +preset=pusht_cpu`."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from getiaction import __version__
from getiaction.startup import hold_collector

COMMANDS = {  # name -> (module, what it does)
    "train": ("train", "train a Diffusion Policy; arguments as in `python -m getiaction.train`"),
    "check": ("check", "check a config, its dataset and its policy without training"),
    "fit": ("fit", "train what a YAML file of the first GetiAction says (model, data, trainer)"),
    "validate": ("fit", "measure a policy on the held-out episodes of such a file's data"),
    "test": ("fit", "let a policy act in the simulator of such a file's data"),
    "evaluate": ("evaluate", "roll a policy out in its simulator: score, success rate, films"),
    "report": ("report_sweep", "compare the runs of a sweep: a table and a plot over seeds"),
    "demonstrate": ("demonstrate", "record a scripted expert as a LeRobotDataset"),
    "import": ("import_policy", "open a policy of LeRobot's, of any age, and write it as one of today"),
    "export": ("export", "write a policy as an ONNX file, which runs without PyTorch"),
    "push": ("push", "push a policy to the Hugging Face Hub, with a model card"),
}


def main() -> None:
    """Hand over to a subcommand."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(__version__)
        return
    if name in ("--help", "-h", "help"):
        print("usage: getiaction COMMAND [arguments]\n\ncommands, each with its own --help:")
        print("\n".join(f"  {command:12} {text}" for command, (_, text) in COMMANDS.items()))
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(
            f"error: getiaction has no command {name!r}: {hint}the commands are {', '.join(COMMANDS)}", file=sys.stderr
        )
        sys.exit(2)
    hold_collector()
    sys.argv = [f"getiaction {name}", *sys.argv[2:]]
    module = import_module(f"getiaction.{COMMANDS[name][0]}")
    module.main(name) if module.__name__ == "getiaction.fit" else module.main()


if __name__ == "__main__":
    main()
