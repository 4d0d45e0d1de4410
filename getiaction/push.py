"""Push a policy to the Hugging Face Hub, with a model card: `getiaction push RUN_FOLDER --repo-id me/policy`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from getiaction.errors import InputError, exit_with_message
from getiaction.run_folder import CONFIG


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="getiaction push", description="Push a policy to the Hugging Face Hub, in one commit, with a model card."
    )
    parser.add_argument("policy", help="a run folder (its last checkpoint is taken), a checkpoint, or a policy folder")
    parser.add_argument("--repo-id", required=True, help="name on the Hub, <owner>/<name>; it is made if need be")
    parser.add_argument("--evaluation", type=Path, help="outputs/evaluate/<date_time>; default: the run's own")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--revision", help="branch to push to; it is made if need be")
    parser.add_argument("--license", help="by the Hub's names: apache-2.0, mit, ...")
    parser.add_argument("--dry-run", action="store_true", help="show the card and the files, and send nothing")
    return parser


def push(arguments: argparse.Namespace) -> str:
    """Push what `arguments` say; return the address of the commit, or with `--dry-run` what would be sent.

    Raises:
        InputError: there is no policy, the evaluation is another's, or the Hub refuses.
    """
    from getiaction import __version__
    from getiaction.config.fine_tuning import to_overrides
    from getiaction.config.overrides import as_override
    from getiaction.interop.description import describe
    from getiaction.interop.hub import check_repo_id, push_files
    from getiaction.interop.lerobot import find_policy_folder, load_policy
    from getiaction.interop.lerobot_files import not_for_lerobot
    from getiaction.interop.weights import fingerprint
    from getiaction.report.card import find_evaluation, read_run, write_card
    from getiaction.report.evaluation import NUMBERS

    check_repo_id(arguments.repo_id)
    folder = find_policy_folder(arguments.policy, key="policy")
    policy = load_policy(folder)
    evaluation = find_evaluation(folder, arguments.evaluation)
    numbers = json.loads((evaluation / NUMBERS).read_text()) if evaluation else None
    if numbers is not None and numbers["weights"] != fingerprint(policy.state_dict()):
        raise InputError(
            f"--evaluation {evaluation} is of other weights than {folder}: evaluate this policy, or leave it out"
        )
    described, made = describe(policy), read_run(folder)
    card = write_card(
        arguments.repo_id,
        described,
        version=__version__,
        reasons=not_for_lerobot(policy),
        overrides=" ".join(as_override(key, value) for key, value in to_overrides(described).items()),
        made=made,
        numbers=numbers,
        license=arguments.license,
    )
    files = {**files_of(folder, evaluation), "README.md": card.encode()}
    if made:
        files[CONFIG] = made["folder"] / CONFIG
    if arguments.dry_run:
        return "\n".join([card, "files:", *(f"  {name}" for name in files)])
    return push_files(arguments.repo_id, files, private=arguments.private, revision=arguments.revision)


def files_of(folder: Path, evaluation: Path | None) -> dict[str, Path | bytes]:
    """Return what of a policy and its evaluation is pushed: name there -> file here."""
    from getiaction.interop.layout import FILES
    from getiaction.report.evaluation import NUMBERS, SHEET, VIDEOS

    files: dict[str, Path | bytes] = {path.name: path for name in FILES for path in sorted(folder.glob(name))}
    if evaluation is not None:
        found = [evaluation / NUMBERS, evaluation / SHEET, *sorted((evaluation / VIDEOS).glob("*.mp4"))]
        files |= {f"evaluation/{path.name}": path for path in found if path.exists()}
    return files


def main() -> None:
    """Run as a command."""
    with exit_with_message():
        print(push(parser().parse_args()))


if __name__ == "__main__":
    main()
