"""Compare the runs of a sweep: `getiaction report outputs/pusht_cpu/sweep_2026-01-31_12-00-00`."""

from __future__ import annotations

import argparse
from pathlib import Path

from getiaction.errors import exit_with_message


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="getiaction report",
        description="Compare the runs of a sweep: mean and 95% interval over seeds for each configuration, and the "
        "Pareto line of the metric against training time, as report.md, report.csv and report.png in its folder.",
    )
    parser.add_argument("folder", type=Path, help="what `python -m getiaction.train -m` wrote, or a single run")
    parser.add_argument("--metric", help="score, success, val_loss, ...; default: the first of these that all have")
    return parser


def main() -> None:
    """Run as a command."""
    arguments = parser().parse_args()
    with exit_with_message():
        from getiaction.report.sweep import write_report

        print(write_report(arguments.folder, arguments.metric))
        print(f"picture: {arguments.folder / 'report.png'}")


if __name__ == "__main__":
    main()
