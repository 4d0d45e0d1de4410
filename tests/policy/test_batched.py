"""What a row gets depends on what it sees and on its moment, bit by bit; never on its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from getiaction.policy import BatchedActor, DiffusionPolicy, Features, ImageEncoder

MakePolicy = Callable[..., DiffusionPolicy]
CAMERA = "observation.image"
STATES = Features(action_dim=2, state_dim=3, env_state_dim=5)
PICTURES = Features(action_dim=2, state_dim=3, cameras={CAMERA: (3, 40, 40)})
GROUP_NORM = {"encoder": partial(ImageEncoder, crop_shape=(34, 34), num_keypoints=4, norm="group")}
BATCH_NORM = {"encoder": partial(ImageEncoder, crop_shape=(34, 34), num_keypoints=4, norm="batch")}


def look(policy: DiffusionPolicy, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return observations of `rows` episodes, (B, To, ...)."""
    draw = np.random.default_rng(seed)
    seen = {}
    for key in policy.features.observation_keys:
        shape = (rows, policy.n_obs_steps, *policy.features.shapes[key])
        seen[key] = (
            draw.integers(0, 256, shape, dtype=np.uint8) if key == CAMERA else draw.normal(size=shape).astype("f")
        )
    return seen


def some(observations: dict[str, np.ndarray], rows: list[int]) -> dict[str, np.ndarray]:
    return {key: value[rows] for key, value in observations.items()}


@pytest.mark.parametrize(
    ("features", "arguments"),
    [
        (STATES, {}),
        (STATES, {"noise_scheduler": DDIMScheduler(20, beta_schedule="squaredcos_cap_v2")}),
        (STATES, {"noise_scheduler": DPMSolverMultistepScheduler(20, beta_schedule="squaredcos_cap_v2")}),
        (PICTURES, GROUP_NORM),
        (PICTURES, BATCH_NORM),
    ],
    ids=["states, ddpm", "states, ddim", "states, dpm solver", "pictures, group norm", "pictures, batch norm"],
)
def test_a_row_does_not_depend_on_the_others_nor_on_its_place(
    make_policy: MakePolicy, features: Features, arguments: dict[str, Any]
) -> None:
    policy = make_policy(features, **arguments)
    act = BatchedActor(policy, num_inference_steps=3)
    seen, moments = look(policy, 20), [(1000 + row, row % 3) for row in range(20)]
    together = act(seen, moments)  # 16 and 4, filled up
    assert together.shape == (20, 4, 2)
    assert together.dtype == np.float32
    assert len({chunk.tobytes() for chunk in together}) == 20
    for rows in ([3], [19, 3, 7], [*reversed(range(20))], [5] * 17):
        np.testing.assert_array_equal(act(some(seen, rows), [moments[row] for row in rows]), together[rows])


def test_each_moment_has_its_own_noise_and_the_same_one_again(make_policy: MakePolicy) -> None:
    policy = make_policy(STATES)
    seen = some(look(policy, 1), [0, 0, 0, 0])
    moments = [(1000, 0), (1000, 1), (1001, 0), (1000, 0)]
    first, later, other, again = BatchedActor(policy)(seen, moments)
    np.testing.assert_array_equal(first, again)
    assert not any(np.allclose(first, chunk) for chunk in (later, other))
    assert not np.allclose(BatchedActor(policy, seed=1)(seen, moments)[0], first)


def test_what_the_policy_does_alone_is_what_it_does_in_a_batch(make_policy: MakePolicy) -> None:
    import torch

    from getiaction.random import Purpose, generator

    policy = make_policy(STATES)
    seen, moments = look(policy, 2), [(7, 0), (8, 4)]
    chunks = BatchedActor(policy)(seen, moments)
    for row, moment in enumerate(moments):
        draw = generator(0, Purpose.ROLLOUT, *moment)
        noise = torch.randn((1, policy.horizon, 2), generator=draw)
        batch = {key: torch.from_numpy(value) for key, value in some(seen, [row]).items()}
        alone = policy.predict_action_chunk(batch, noise=noise, generator=[draw])
        np.testing.assert_allclose(chunks[row], alone[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 10, 24])
def test_rows_that_kernels_treat_unequally_are_refused(make_policy: MakePolicy, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be a multiple of 16, or rows would not all"):
        BatchedActor(make_policy(), batch_size=batch_size)


def test_acting_sets_evaluation_mode_and_leaves_torchs_random_numbers_alone(make_policy: MakePolicy) -> None:
    import torch

    policy = make_policy(STATES, noise_scheduler=DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")).train()
    before = torch.random.get_rng_state()
    act = BatchedActor(policy)
    act(look(policy, 2), [(0, 0), (1, 0)])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not policy.training
