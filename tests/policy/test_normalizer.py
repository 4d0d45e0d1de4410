"""Test normalisation: known values, and the way back."""

from __future__ import annotations

import pytest
import torch

from getiaction.policy import Normalizer

MODES = {"visual": "mean_std", "state": "min_max", "env": "mean_std", "action": "min_max"}
STATISTICS = {
    "observation.image": {"mean": torch.tensor([[[0.5]], [[0.4]], [[0.3]]]), "std": torch.full((3, 1, 1), 0.25)},
    "observation.state": {
        "min": torch.tensor([-10.0, 5.0]),
        "max": torch.tensor([30.0, 5.0]),
    },  # the second never moves
    "observation.environment_state": {"mean": torch.tensor([1.0, 2.0]), "std": torch.tensor([2.0, 0.0])},
    "action": {"min": torch.tensor([0.0, 7.0]), "max": torch.tensor([512.0, 7.0])},
}


def test_known_values() -> None:
    batch = {
        "observation.state": torch.tensor([[-10.0, 5.0], [10.0, 5.0], [30.0, 5.0]]),
        "observation.environment_state": torch.tensor([[1.0, 2.0], [5.0, 2.0]]),
        "action": torch.tensor([[0.0, 7.0], [256.0, 7.0]]),
        "action_is_pad": torch.tensor([False, True]),
    }
    normalized = Normalizer(STATISTICS, MODES)(batch)
    torch.testing.assert_close(normalized["observation.state"], torch.tensor([[-1.0, -1], [0, -1], [1, -1]]))
    torch.testing.assert_close(normalized["observation.environment_state"], torch.tensor([[0.0, 0], [2, 0]]))
    torch.testing.assert_close(normalized["action"], torch.tensor([[-1.0, -1], [0, -1]]))
    assert normalized["action_is_pad"] is batch["action_is_pad"]


def test_pictures_in_bytes_count_from_0_to_1() -> None:
    normalizer = Normalizer(STATISTICS, MODES)
    white = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    normalized = normalizer({"observation.image": white})["observation.image"]
    torch.testing.assert_close(normalized[0, :, 0, 0], torch.tensor([2.0, 2.4, 2.8]))
    torch.testing.assert_close(normalized, normalizer.normalize("observation.image", white / 255))


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "identity"])
@pytest.mark.parametrize("values", [[[3.0, 7.0], [500.0, 7.0]], [[-600.0, 7.0], [9000.0, 7.0]]])
def test_unnormalize_takes_normalize_back(mode: str, values: list) -> None:
    stats = {
        "min": [0.0, 7.0],
        "max": [512.0, 7.0],
        "mean": [200.0, 7.0],
        "std": [90.0, 0.0],
    }  # zero range, zero spread
    normalizer = Normalizer({"action": {name: torch.tensor(value) for name, value in stats.items()}}, {"action": mode})
    actions = torch.tensor(values)
    normalized = normalizer.normalize("action", actions)
    assert normalized.isfinite().all()
    torch.testing.assert_close(normalizer.unnormalize("action", normalized), actions)


def test_an_action_that_never_moved_stays_put_whatever_is_predicted() -> None:
    predicted = torch.tensor([[-1.0, -0.9], [0.0, 0.4], [1.0, 1.0]])
    actions = Normalizer(STATISTICS, MODES).unnormalize("action", predicted)
    torch.testing.assert_close(actions, torch.tensor([[0.0, 7.0], [256.0, 7.0], [512.0, 7.0]]))


def test_a_feature_without_statistics_passes_through() -> None:
    state = torch.randn(2, 2)
    assert Normalizer({}, MODES)({"observation.state": state})["observation.state"] is state


def test_statistics_are_no_weights_but_follow_the_module() -> None:
    normalizer = Normalizer(STATISTICS, MODES)
    assert normalizer.state_dict() == {}
    assert normalizer.double().normalize("action", torch.zeros(2, dtype=torch.float64)).dtype == torch.float64


def test_mistakes_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"policy\.normalization\.action='minmax' must be one of mean_std, min_max"):
        Normalizer(STATISTICS, MODES | {"action": "minmax"})
    with pytest.raises(ValueError, match=r"observation\.state has no mean and no std, which .*state=mean_std needs"):
        Normalizer(STATISTICS, MODES | {"state": "mean_std"})
