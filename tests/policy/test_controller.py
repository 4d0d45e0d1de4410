"""Test the controller against what the policy itself plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from getiaction.policy import Controller, DiffusionPolicy, Features

Observation = dict[str, Tensor]


def walk(steps: int, *, batch_size: int | None = None) -> list[Observation]:
    draw = torch.Generator().manual_seed(3)
    shape = (3,) if batch_size is None else (batch_size, 3)
    return [{"observation.state": torch.randn(shape, generator=draw)} for _ in range(steps)]


def planned(policy: DiffusionPolicy, history: list[Observation], generator: torch.Generator) -> Tensor:
    """Return the chunk, (Ta, Da), that the policy itself plans from exactly these observations."""
    observations = {key: torch.stack([step[key] for step in history])[None] for key in history[0]}
    return policy.predict_action_chunk(observations, generator=generator)[0]


def test_it_pads_the_history_then_replans_every_chunk_from_the_last_observations(make_policy) -> None:
    policy = make_policy(n_obs_steps=3, horizon=8, n_action_steps=4)
    controller, steps = Controller(policy, seed=5), walk(12)
    acted = torch.stack([controller.act(step) for step in steps])

    generator = torch.Generator().manual_seed(5)
    first = planned(policy, [steps[0], steps[0], steps[0]], generator)
    second = planned(policy, steps[2:5], generator)
    third = planned(policy, steps[6:9], generator)
    torch.testing.assert_close(acted, torch.cat([first, second, third]))


def test_reset_forgets_and_the_same_seed_gives_the_same_actions(make_policy) -> None:
    policy, steps = make_policy(), walk(7)
    controller = Controller(policy, seed=1)
    first = [controller.act(step) for step in steps]  # ends within a chunk
    controller.reset()
    again = [controller.act(step) for step in steps]
    twin = [actor.act(step) for actor in [Controller(policy, seed=1)] for step in steps]
    other = [actor.act(step) for actor in [Controller(policy, seed=2)] for step in steps]
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert torch.equal(torch.stack(first), torch.stack(twin))
    assert not torch.allclose(torch.stack(first), torch.stack(other))


def test_the_global_generator_is_left_alone(make_policy) -> None:
    controller = Controller(make_policy())
    before = torch.get_rng_state()
    controller.act(walk(1)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_refused_step_leaves_no_trace(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, steps = make_policy(), walk(3)
    refused, plain = Controller(policy, seed=1), Controller(policy, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "predict_action_chunk", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            refused.act(walk(1, batch_size=4)[0])
    assert all(torch.equal(refused.act(step), plain.act(step)) for step in steps)


def test_a_batch_dimension_is_kept(make_policy) -> None:
    policy = make_policy()
    assert Controller(policy).act(walk(1)[0]).shape == (2,)
    assert Controller(policy).act(walk(1, batch_size=1)[0]).shape == (1, 2)
    controller = Controller(policy)
    assert [controller.act(step).shape for step in walk(5, batch_size=3)] == [(3, 2)] * 5


def test_pictures_may_be_bytes(make_policy) -> None:
    features = Features(action_dim=2, state_dim=3, cameras={"observation.image": (3, 36, 36)})
    policy = make_policy(features, num_inference_steps=1)
    image = torch.randint(256, (3, 36, 36), dtype=torch.uint8)
    state = walk(1)[0]
    from_bytes = Controller(policy).act({**state, "observation.image": image})
    from_floats = Controller(policy).act({**state, "observation.image": image / 255})
    torch.testing.assert_close(from_bytes, from_floats)


def test_numpy_and_double_precision_observations_work(make_policy) -> None:
    policy, state = make_policy(), walk(1)[0]["observation.state"]
    expected = Controller(policy).act({"observation.state": state})
    for same in (state.double(), state.numpy(), state.double().numpy()):
        torch.testing.assert_close(Controller(policy).act({"observation.state": same}), expected)


def test_it_acts_in_evaluation_mode(make_policy) -> None:
    assert not Controller(make_policy().train()).policy.training


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({}, r"the policy needs observation\.state; the observation has nothing"),
        ({"state": torch.zeros(3)}, r"the policy needs observation\.state; the observation has state"),
        ({"observation.state": torch.zeros(4)}, r"observation\.state must have shape \(3,\) .*, got \(4,\)"),
        ({"observation.state": torch.tensor(0.0)}, r"observation\.state must have shape \(3,\) .*, got \(\)"),
        ({"observation.state": torch.zeros(1, 2, 3)}, r"observation\.state must have shape \(3,\) .*, got \(1, 2, 3\)"),
    ],
)
def test_a_wrong_observation_is_named(make_policy, observation: Observation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Controller(make_policy()).act(observation)


def test_a_batch_dimension_must_be_everywhere(make_policy) -> None:
    policy = make_policy(Features(action_dim=2, state_dim=3, env_state_dim=4))
    mixed = {"observation.state": torch.zeros(5, 3), "observation.environment_state": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"observation\.environment_state"):
        Controller(policy).act(mixed)
