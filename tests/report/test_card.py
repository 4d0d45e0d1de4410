"""The model card says where a policy comes from, and how it acted when it was measured."""

from __future__ import annotations

from typing import Any

import pytest

from getiaction.report.card import on_the_hub, say_evaluation, say_source, sources_of


def made(*overrides: str, **dataset: Any) -> dict[str, Any]:
    """Return what `read_run` finds of a run."""
    return {"config": {"dataset": dataset}, "run": {"command": ["train.py"], "overrides": list(overrides)}}


@pytest.mark.parametrize(
    ("run", "says", "hub"),
    [
        (made(repo_id="lerobot/pusht", root=None), ["lerobot/pusht"], ["lerobot/pusht"]),
        (made("dataset.root=/data/my_robot", repo_id="lerobot/pusht", root="/data/my_robot"), ["my_robot"], []),
        (
            made("dataset.root=/data/pusht", "dataset.repo_id=lerobot/pusht", repo_id="lerobot/pusht", root="/data/p"),
            ["lerobot/pusht"],
            ["lerobot/pusht"],
        ),
        (made("dataset.root=null", repo_id="lerobot/pusht", root=None), ["lerobot/pusht"], ["lerobot/pusht"]),
        (made(repo_id="getiaction/pusht_demo", root="/in/the/box"), ["getiaction/pusht_demo"], []),
        (
            made(repo_id="lerobot/pusht", sources=["me/one", "/data/mine", {"root": "/data/two", "weight": 2}]),
            ["me/one", "mine", "two, weight 2"],
            ["me/one"],
        ),
    ],
)
def test_a_folder_is_not_what_the_preset_names(run: dict[str, Any], says: list[str], hub: list[str]) -> None:
    assert [say_source(source) for source in sources_of(run)] == says
    assert on_the_hub(run) == hub


def test_an_evaluation_says_how_the_policy_acted() -> None:
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6}
    numbers = {
        **{"score": estimate, "success": estimate, "largest": {}, "length": estimate, "episodes": 1},
        **{"env": {"_target_": "a.Task"}, "rows": [{"seed": 3}], "num_inference_steps": 5, "device": "a CPU"},
        **{"scheduler": {"class": "DDIMScheduler"}, "policy": {"n_action_steps": 4}},
    }
    assert "5 denoising steps by DDIMScheduler, 4 actions executed of each chunk, on a CPU" in say_evaluation(numbers)
