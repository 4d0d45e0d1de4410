"""Mirrored samples: PushT's simulator agrees that they are true, and they reach the batches as they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from composing import compose
from torch.utils._python_dispatch import TorchDispatchMode

from getiaction.config.build import build_mirror
from getiaction.data.batches import Share, TrainingBatches
from getiaction.data.gather import Gatherer
from getiaction.data.mirror import Mirror
from getiaction.data.order import Order
from getiaction.data.statistics import compute_statistics
from getiaction.data.windows import Windows
from getiaction.keys import ACTION, ACTION_IS_PAD, OBS_ENV_STATE, OBS_STATE
from getiaction.simulation.pusht import OBS_IMAGE, PushT

KEYS = (OBS_STATE, OBS_ENV_STATE, OBS_IMAGE)


@pytest.fixture(scope="module")
def pusht() -> Mirror:
    """Return the mirror of `mirror=pusht`."""
    mirror = build_mirror(compose(["+preset=pusht_basic", "mirror=pusht"]))
    assert mirror is not None
    return mirror


def mirrored(mirror: Mirror, key: str, value: np.ndarray) -> np.ndarray:
    """Mirror one step's observation; pictures (C, H, W)."""
    if key != OBS_IMAGE:
        return mirror.vector(key, torch.from_numpy(value)).numpy()
    return mirror.picture(key, torch.from_numpy(value).permute(1, 2, 0)).permute(2, 0, 1).numpy()


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_the_simulator_agrees(pusht: Mirror, seed: int) -> None:
    """Mirrored actions from a mirrored start lead to mirrored observations, and to the same coverage."""
    worlds = [PushT(), PushT()]
    for world in worlds:
        world.reset(seed)
    original, other = (world.simulator for world in worlds)
    other.agent.position = tuple(mirrored(pusht, OBS_STATE, np.array(original.agent.position)))
    other.block.angle = np.pi / 2 - original.block.angle
    other.block.position = tuple(mirrored(pusht, OBS_STATE, np.array(original.block.position)))
    other.space.reindex_shapes_for_body(other.block)
    start = worlds[0].observe(KEYS)
    way = start[OBS_ENV_STATE].reshape(8, 2).mean(0) - worlds[0].position
    count = int(np.hypot(*way) / 15)
    for _ in range(count):  # at the block, until the agent is where the block was
        action = worlds[0].position + way / np.hypot(*way) * 30
        steps = [worlds[0].step(action), worlds[1].step(mirrored(pusht, ACTION, action))]
    assert steps[0].measures["coverage"] == pytest.approx(steps[1].measures["coverage"], abs=0.02)
    ends = [world.observe(KEYS) for world in worlds]
    assert np.abs(ends[0][OBS_ENV_STATE] - start[OBS_ENV_STATE]).max() > 10  # the block was moved
    for key in (OBS_STATE, OBS_ENV_STATE):
        np.testing.assert_allclose(mirrored(pusht, key, ends[0][key]), ends[1][key], atol=3)  # pixels of 512
    difference = mirrored(pusht, OBS_IMAGE, ends[0][OBS_IMAGE]).astype(int) - ends[1][OBS_IMAGE]
    turned = ends[0][OBS_IMAGE].astype(int) - ends[1][OBS_IMAGE]
    assert np.abs(difference).mean() < 3 < np.abs(turned).mean()  # of 255


# --- batches ----------------------------------------------------------------------------------------------------------

TWO_ARMS = Mirror(
    {
        OBS_STATE: {"order": [0, 2, 1], "scale": -1.0},
        ACTION: {"order": [1, 0], "scale": -1.0},
        "observation.images.top": {"flip": ["width"], "source": "observation.images.wrist"},
        "observation.images.wrist": {"flip": ["width"], "source": "observation.images.top"},
    }
)


def batches(episodes: Any, mirror: Mirror | None, **share: int) -> TrainingBatches:
    windows = Windows(episodes, n_obs_steps=2, horizon=6, drop_n_last_frames=1)
    gatherer = Gatherer(
        episodes,
        windows,
        device=torch.device("cpu"),
        resident=False,
        observations=(OBS_STATE, *episodes.frames),
        crop_shape=None,
        mirror=mirror,
    )
    part = Share(**share)
    return TrainingBatches(gatherer, Order(len(windows), part.global_batch_size, 5), part, False, prefetch=False)


def test_half_of_the_samples_are_mirrored_all_of_each(toy_episodes: Any) -> None:
    plain, both = batches(toy_episodes(), None, batch_size=8), batches(toy_episodes(), TWO_ARMS, batch_size=8)
    counts = []
    for step in range(12):
        (before,), (after,) = plain.step(step), both.step(step)
        wanted = {
            **{key: TWO_ARMS.vector(key, before[key]) for key in (OBS_STATE, ACTION)},
            "observation.images.top": before["observation.images.wrist"].flip(-1),
            "observation.images.wrist": before["observation.images.top"].flip(-1),
        }
        assert torch.equal(before[ACTION_IS_PAD], after[ACTION_IS_PAD])
        for row in range(8):
            kinds = {
                key: (torch.equal(after[key][row], before[key][row]), torch.equal(after[key][row], wanted[key][row]))
                for key in wanted
            }
            assert len(set(kinds.values())) == 1, kinds
            assert any(kinds[ACTION])
            counts.append(kinds[ACTION][1])
    assert 30 < sum(counts) < 66  # of 96


def test_it_does_not_depend_on_the_number_of_processes(toy_episodes: Any) -> None:
    (whole,) = batches(toy_episodes(), TWO_ARMS, batch_size=8).step(3)
    parts = [batches(toy_episodes(), TWO_ARMS, batch_size=4, processes=2, rank=rank).step(3)[0] for rank in (0, 1)]
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)


def test_statistics_are_those_of_both_sides(toy_episodes: Any) -> None:
    plain, both = (compute_statistics(toy_episodes(), "imagenet", mirror) for mirror in (None, TWO_ARMS))
    low, high = plain[ACTION]["min"], plain[ACTION]["max"]
    order = [1, 0]
    torch.testing.assert_close(both[ACTION]["max"], torch.maximum(high, -low[order]))
    torch.testing.assert_close(both[ACTION]["min"], torch.minimum(low, -high[order]))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "text"),
    [
        ({ACTION: {"order": [0, 2]}}, "must name each place once"),
        ({ACTION: {"order": 1}}, "must name each place once"),
        ({ACTION: {"order": [0], "scale": "x"}}, "features.action.scale=x must be a number, or a list of numbers"),
        ({ACTION: {"order": ["a"]}}, "must be a number, or a list of numbers"),
        ({OBS_IMAGE: {"flip": 1}}, "flip=1 must be a list"),
        ({ACTION: {"order": [1, 2, 0]}}, "mirrored twice, it must be what it was"),
        ({ACTION: {"order": [0, 1], "scale": 2.0}}, "mirrored twice"),
        ({ACTION: {"order": [0], "sign": -1}}, r"features.action has \['sign'\]"),
        ({OBS_IMAGE: {"flip": ["width"], "transpose": True}}, "mirrored twice"),
        ({ACTION: {"order": [1, 0], "scale": [1.0, 2.0]}}, "mirrored twice"),
        ({ACTION: {"order": [1, 0], "scale": [1.0, 2.0, 1.0]}}, "must be one number each, or 2"),
        ({OBS_IMAGE: {"flip": ["depth"]}}, r"flip=\['depth'\] must be some of \['height', 'width'\]"),
        (
            {"observation.images.left": {"source": "observation.images.right"}, "observation.images.right": {}},
            "own source",
        ),
    ],
)
def test_what_means_nothing_is_refused(features: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Mirror(features)


def test_each_joint_has_its_own_sign() -> None:
    arms = Mirror({ACTION: {"order": [2, 3, 0, 1], "scale": [1.0, -1.0, 1.0, -1.0], "offset": [0.0, 6.0, 0.0, 6.0]}})
    torch.testing.assert_close(
        arms.vector(ACTION, torch.tensor([1.0, 2.0, 3.0, 4.0])), torch.tensor([3.0, 2.0, 1.0, 4.0])
    )


class Seen(TorchDispatchMode):
    """Remember the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_its_numbers_are_brought_to_the_device_once() -> None:
    mirror = build_mirror(compose(["+preset=pusht_basic", "mirror=pusht"]))
    assert mirror is not None
    values = torch.rand(3, 2, 2)
    first = mirror.vector(OBS_STATE, values)
    with Seen() as seen:
        assert torch.equal(mirror.vector(OBS_STATE, values), first)
    assert seen.names == {"index_select", "mul", "add", "equal"}
