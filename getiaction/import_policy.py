"""Turn a policy that LeRobot made, of any age, into a folder of today: `getiaction import FOLDER_OR_HUB_NAME`."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from getiaction.errors import InputError, exit_with_message
from getiaction.run_folder import CHECKPOINTS, LAST, PRETRAINED

LAYOUT = (CHECKPOINTS, LAST, PRETRAINED)


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="getiaction import",
        description="Open a policy that LeRobot or this package made, check it strictly, and write it as a policy "
        "folder of today, which LeRobot opens as well.",
    )
    parser.add_argument(
        "source", help="a folder, or a name on the Hugging Face Hub, <owner>/<name> or .../<name>@<revision>"
    )
    parser.add_argument("--output-dir", type=Path, help="where it lands; default: outputs/imported/<name>")
    return parser


def import_policy(source: str, output_dir: Path | None = None) -> list[str]:
    """Write the policy; return the lines to print.

    Raises:
        InputError: there is no such policy, it has no equal here, or `output_dir` exists.
    """
    from getiaction.config.fine_tuning import to_overrides
    from getiaction.config.overrides import as_override
    from getiaction.interop.description import describe
    from getiaction.interop.lerobot import find_policy_folder, load_policy, write_policy
    from getiaction.interop.lerobot_files import not_for_lerobot

    folder = output_dir or Path("outputs/imported") / name_of(source)
    if folder.exists():
        raise InputError(f"--output-dir {folder} exists already: give another one, or remove it")
    found = find_policy_folder(source, key="source")
    policy = load_policy(found)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".importing-"))
    try:
        write_policy(temporary / "policy", policy)
        (temporary / "policy").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    reasons = not_for_lerobot(policy)
    overrides = [as_override(key, value) for key, value in to_overrides(describe(policy)).items()]
    parameters = sum(weight.numel() for weight in policy.parameters()) / 1e6
    return [
        f"policy: {folder} ({parameters:.1f} M parameters, sees {', '.join(policy.features.observation_keys)})",
        f"LeRobot does not open it: {'; '.join(reasons)}" if reasons else f"LeRobot opens it: --policy.path={folder}",
        f"let it act: python -m getiaction.evaluate {as_override('checkpoint', str(folder))} env=pusht",
        "train it further: python -m getiaction.train "
        f"{as_override('training.init_from', str(folder))} {' '.join(overrides)}",
    ]


def name_of(source: str) -> str:
    """Return a folder's name for a source: what tells it from others."""
    if not Path(source).is_dir():
        return source.replace("/", "--").replace("@", "--")
    parts = Path(source).absolute().parts[1:]
    while len(parts) > 1 and parts[-1] in LAYOUT:
        parts = parts[:-1]
    in_run = len(parts) > 2 and parts[-2] == CHECKPOINTS  # <run>/checkpoints/<step>
    return f"{parts[-3]}--{parts[-1]}" if in_run else parts[-1]


def main() -> None:
    """Run as a command."""
    arguments = parser().parse_args()
    with exit_with_message():
        print("\n".join(import_policy(arguments.source, arguments.output_dir)))


if __name__ == "__main__":
    main()
