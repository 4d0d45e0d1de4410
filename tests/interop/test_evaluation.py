"""`lerobot-eval` and ours measure the same: same start, same actions, same reward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs import make_env, make_env_pre_post_processors
from lerobot.envs.configs import PushtEnv
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.scripts.lerobot_eval import rollout as lerobot_rollout

from getiaction.interop.lerobot import load_policy
from getiaction.policy import BatchedActor
from getiaction.simulation.pusht import PushT
from getiaction.simulation.rollout import SerialPool, replay, rollout

SEEDS = [1000, 1001, 1002]
STEPS = 40
OBSERVATIONS = ["pixels_agent_pos", "environment_state_agent_pos"]


@pytest.fixture(scope="module")
def pictures_run(make_run: Callable[..., Path]) -> Path:
    return make_run(image=(3, 96, 96))


def folder_of(run: Path) -> Path:
    return run / "checkpoints/last/pretrained_model"


def lerobot_env(obs_type: str) -> tuple[PushtEnv, Any]:
    config = PushtEnv(obs_type=obs_type, episode_length=STEPS)
    return config, make_env(config, n_envs=len(SEEDS), use_async_envs=False)["pusht"][0]


@pytest.mark.parametrize("obs_type", OBSERVATIONS)
def test_our_episodes_get_the_same_rewards_in_lerobots_environments(
    keypoints_run: Path, pictures_run: Path, obs_type: str
) -> None:
    policy = load_policy(folder_of(pictures_run if obs_type.startswith("pixels") else keypoints_run))
    keys = policy.features.observation_keys
    pool = SerialPool(partial(PushT, max_steps=STEPS), num_envs=3, keys=keys, n_obs_steps=policy.n_obs_steps)
    episodes = sorted(
        rollout(BatchedActor(policy), pool, SEEDS, num_envs=3, batch_size=16), key=lambda episode: episode.seed
    )
    ours = np.array([[step.reward for step in replay(PushT(), episode)] for episode in episodes]).T  # (steps, 3)
    assert ours.shape == (STEPS, 3)

    _, env = lerobot_env(obs_type)
    env.reset(seed=SEEDS, options={NEW_ROLLOUT_OPTION: True})
    theirs = []
    for actions in np.stack([episode.actions for episode in episodes], axis=1):
        theirs.append(env.step(actions)[1])
    env.close()
    np.testing.assert_allclose(theirs, ours, rtol=1e-13)
    np.testing.assert_allclose([episode.score for episode in episodes], np.max(theirs, axis=0), rtol=1e-13)
    assert len(np.unique(ours)) > 3


@pytest.mark.parametrize("obs_type", OBSERVATIONS)
def test_lerobots_episodes_get_the_same_rewards_here(keypoints_run: Path, pictures_run: Path, obs_type: str) -> None:
    folder = folder_of(pictures_run if obs_type.startswith("pixels") else keypoints_run)
    env_config, env = lerobot_env(obs_type)
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    policy = make_policy(cfg=config, env_cfg=env_config).eval()
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    env_before, env_after = make_env_pre_post_processors(env_config, config)
    torch.manual_seed(0)
    with torch.no_grad():
        found = lerobot_rollout(
            env, policy, env_before, env_after, before, after, seeds=SEEDS, return_observations=True
        )
    env.close()
    keys = {"observation.image", "observation.state", "observation.environment_state"} & found["observation"].keys()
    assert len(keys) == 2
    for row, seed in enumerate(SEEDS):
        ours = PushT()
        ours.reset(seed)
        for number, action in enumerate(found["action"][row].numpy()):
            for key, value in ours.observe(sorted(keys)).items():
                scaled = value.astype(np.float32) / 255 if value.dtype == np.uint8 else value
                np.testing.assert_array_equal(scaled, found["observation"][key][row, number].numpy())
            step = ours.step(action)
            assert step.reward == pytest.approx(found["reward"][row, number].item(), rel=1e-13)
            assert step.success == found["success"][row, number].item()
    assert number == STEPS - 1


def test_lerobot_eval_opens_and_evaluates_our_checkpoint(pictures_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_eval", f"--policy.path={folder_of(pictures_run)}"]
    command += ["--env.type=pusht", f"--env.episode_length={STEPS}", "--eval.n_episodes=2", "--eval.batch_size=2"]
    command += ["--eval.use_async_envs=false", "--policy.device=cpu", f"--output_dir={tmp_path / 'out'}"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "SDL_VIDEODRIVER": "dummy"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out/eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 2
    rewards = found["per_task"][0]["metrics"]["max_rewards"]
    assert found["overall"]["avg_max_reward"] == pytest.approx(np.mean(rewards))
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)
    assert any(reward > 0 for reward in rewards)
