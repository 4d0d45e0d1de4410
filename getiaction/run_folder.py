"""Name what lies in a run folder: the layout that all rooms read and write.

config.yaml                                 what the run computes, resolved
run.json                                    its command, versions and hardware; again for each time that it went on
metrics.jsonl                               a line for each time that something was measured
checkpoints/<step>/pretrained_model/        the policy, which LeRobot opens
checkpoints/<step>/training_state/          what going on needs
checkpoints/<step>/manifest.json            size and checksum of each file
checkpoints/last, checkpoints/best          a link to the newest; the one with the best score, if asked for
evaluation/<step>/                          episodes, films and numbers
result.json                                 the last metrics: the run is complete
"""

from __future__ import annotations

from pathlib import Path

CONFIG, RUN, METRICS, RESULT = "config.yaml", "run.json", "metrics.jsonl", "result.json"
CHECKPOINTS, EVALUATION = "checkpoints", "evaluation"
PRETRAINED, STATE, MANIFEST, LAST, BEST = "pretrained_model", "training_state", "manifest.json", "last", "best"


def has_checkpoint(run: Path) -> bool:
    """Tell whether a folder holds a checkpoint of a step."""
    return any(run.glob(f"{CHECKPOINTS}/[0-9]*"))


def last_policy(run: Path) -> Path:
    """Return where a run's newest policy lies."""
    return run / CHECKPOINTS / LAST / PRETRAINED


def run_of(policy_folder: Path) -> Path | None:
    """Return the run that a policy folder belongs to, <run>/checkpoints/<step>/pretrained_model; None if to none."""
    folder = policy_folder.resolve()
    in_run = folder.name == PRETRAINED and folder.parent.parent.name == CHECKPOINTS
    return folder.parent.parent.parent if in_run else None
