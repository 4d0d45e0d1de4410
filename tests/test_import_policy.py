"""An imported policy lands in a folder whose name tells it from others."""

from __future__ import annotations

from pathlib import Path

import pytest

from getiaction.import_policy import name_of


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("run", "run"),
        ("run/checkpoints", "run"),
        ("run/checkpoints/last/pretrained_model", "run"),
        ("run/checkpoints/000100/pretrained_model", "run--000100"),
        ("run/checkpoints/000100", "run--000100"),
        ("lerobots/pretrained_model", "lerobots"),
        ("me/policy@main", "me--policy--main"),
    ],
)
def test_it_is_named_after_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run/checkpoints/last/pretrained_model", "run/checkpoints/000100/pretrained_model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lerobots/pretrained_model").mkdir(parents=True)
    assert name_of(source) == name
