"""Policies that LeRobot made open here: today's layout, the older ones, compiled ones; what does not fit is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import compose
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as LeRobotPolicy
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file
from torch import Tensor

from getiaction.errors import InputError
from getiaction.interop.description import describe
from getiaction.interop.layout import CONFIG, EXTRA, POSTPROCESSOR, PREPROCESSOR, PREPROCESSOR_STATE, WEIGHTS
from getiaction.interop.lerobot import load_policy, write_policy
from getiaction.interop.lerobot_read import Config

STATE, ENV, IMAGE, ACTION = "observation.state", "observation.environment_state", "observation.image", "action"
TOP, WRIST = "observation.images.top", "observation.images.wrist"
SMALL: dict[str, Any] = {
    "down_dims": (16, 32),
    "diffusion_step_embed_dim": 16,
    "num_train_timesteps": 20,
    "num_inference_steps": 5,
    "horizon": 16,
    "n_action_steps": 8,
    "pretrained_backbone_weights": None,
    "spatial_softmax_num_keypoints": 8,
    "device": "cpu",
}
OF_2024: dict[str, Any] = {"use_group_norm": True, "use_separate_rgb_encoder_per_camera": False}
KINDS = {
    "keypoints": ({STATE: (2,), ENV: (16,)}, OF_2024),
    "picture": ({IMAGE: (3, 48, 48), STATE: (2,)}, {**OF_2024, "crop_shape": (40, 40)}),
    "today's defaults": ({TOP: (3, 48, 64), WRIST: (3, 48, 64), STATE: (4,)}, {}),
    "resized, ddim": (
        {IMAGE: (3, 60, 80), STATE: (2,)},
        {"resize_shape": (40, 48), "crop_ratio": 0.9, "noise_scheduler_type": "DDIM", "prediction_type": "sample"},
    ),
    "all normalised otherwise": (
        {IMAGE: (3, 48, 48), STATE: (2,)},
        {
            **OF_2024,
            "normalization_mapping": {
                "VISUAL": NormalizationMode.MIN_MAX,
                "STATE": NormalizationMode.MEAN_STD,
                "ACTION": NormalizationMode.MEAN_STD,
            },
        },
    ),
}
Make = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("one_thread")


def feature_type(key: str) -> FeatureType:
    return {STATE: FeatureType.STATE, ENV: FeatureType.ENV, ACTION: FeatureType.ACTION}.get(key, FeatureType.VISUAL)


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that has LeRobot make and save a policy of a kind; the same folder each time."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            seen, more = KINDS[kind]
            shapes = {**seen, ACTION: (2,)}
            features = {key: PolicyFeature(feature_type(key), shape) for key, shape in shapes.items()}
            outputs = {ACTION: features.pop(ACTION)}
            config = DiffusionConfig(input_features=features, output_features=outputs, **{**SMALL, **more})
            torch.manual_seed(1)
            policy = LeRobotPolicy(config)
            stats = {key: random_statistics(shape) for key, shape in shapes.items()}
            folder = made[kind] = tmp_path_factory.mktemp("lerobot") / "pretrained_model"
            policy.save_pretrained(folder)
            for processor in make_pre_post_processors(config, dataset_stats=stats):
                processor.save_pretrained(folder)
        return made[kind]

    return make


def random_statistics(shape: tuple[int, ...]) -> dict[str, Tensor]:
    size = (shape[0], 1, 1) if len(shape) == 3 else shape
    low, span = torch.randn(size), 0.5 + torch.rand(size)
    return {"min": low, "max": low + span, "mean": low + span / 3, "std": span / 4, "count": torch.tensor([99])}


def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def lerobot_acts(folder: Path, observations: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Return the action chunk of LeRobot's own policy and processors."""
    policy = LeRobotPolicy.from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    ready = before({key: value.flatten(0, 1) for key, value in observations.items()})  # a batch of steps
    batch = {key: value.unflatten(0, (1, -1)) for key, value in ready.items() if key in observations}
    if policy.config.image_features:
        batch["observation.images"] = torch.stack([batch[key] for key in policy.config.image_features], dim=-4)
    with torch.no_grad():
        return after(policy.diffusion.generate_actions(batch, noise=noise))


def observe(kind: str) -> tuple[dict[str, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(5)
    seen = {key: torch.rand((1, 2, *shape), generator=draw) for key, shape in KINDS[kind][0].items()}
    return seen, torch.randn((1, SMALL["horizon"], 2), generator=draw)


def acts(folder: Path, kind: str) -> Tensor:
    seen, noise = observe(kind)
    return load_policy(folder).predict_action_chunk(seen, noise=noise, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_todays_layout_acts_as_in_lerobot(today: Make, kind: str) -> None:
    folder = today(kind)
    assert not (folder / EXTRA).exists()
    seen, noise = observe(kind)
    if KINDS[kind][1].get("noise_scheduler_type") == "DDIM":  # deterministic: no draws but the first
        torch.testing.assert_close(acts(folder, kind), lerobot_acts(folder, seen, noise), rtol=1e-4, atol=1e-5)
        return
    torch.manual_seed(3)
    expected = lerobot_acts(folder, seen, noise)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = load_policy(folder).predict_action_chunk(seen, noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def to_2025(folder: Path) -> None:
    """Make of today's layout the one before processors: statistics are buffers among the weights."""
    weights, stats = load_file(folder / WEIGHTS), load_file(folder / PREPROCESSOR_STATE)
    modes = json.loads((folder / CONFIG).read_text())["normalization_mapping"]
    for flat_key, value in stats.items():
        key, name = flat_key.rsplit(".", 1)
        mode = modes.get(feature_type(key).value, "IDENTITY")
        if name in {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max")}.get(mode, ()):
            rooms = ("normalize_targets", "unnormalize_outputs") if key == ACTION else ("normalize_inputs",)
            for room in rooms:
                weights[f"{room}.buffer_{key.replace('.', '_')}.{name}"] = value.clone()
    save_file(weights, folder / WEIGHTS)
    for path in folder.glob("policy_*"):
        path.unlink()
    for key in ("resize_shape", "crop_ratio", "gradient_checkpointing", "compile_model", "compile_mode"):
        edit(folder / CONFIG, lambda content, key=key: content.pop(key))


def to_2024(folder: Path) -> None:
    """Make of that the first layout: no type, shapes and modes by key."""
    to_2025(folder)

    def rewrite(content: dict) -> None:
        content.pop("type")
        modes = {key: mode.lower() for key, mode in content.pop("normalization_mapping").items()}
        for side in ("input", "output"):
            features = content.pop(f"{side}_features")
            content[f"{side}_shapes"] = {key: feature["shape"] for key, feature in features.items()}
            named = {key: modes[feature["type"]] for key, feature in features.items() if feature["type"] in modes}
            content[f"{side}_normalization_modes"] = named
        kept = set(content) - {"use_separate_rgb_encoder_per_camera", "device", "use_amp", "push_to_hub"}
        for key in set(content) - kept:
            content.pop(key)

    edit(folder / CONFIG, rewrite)


def compiled(folder: Path) -> None:
    """Rename the weights as a policy whose U-Net was compiled saves them."""
    weights = load_file(folder / WEIGHTS)
    save_file(
        {key.replace("diffusion.unet.", "diffusion.unet._orig_mod."): v for key, v in weights.items()}, folder / WEIGHTS
    )


@pytest.mark.parametrize("change", [to_2025, to_2024, compiled])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("key", "pic", "all"))])
def test_older_and_compiled_layouts_act_like_todays(
    today: Make, kind: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = copied(today(kind), tmp_path)
    change(folder)
    assert torch.equal(acts(folder, kind), acts(today(kind), kind))
    if change is not compiled:
        with pytest.raises(Exception):  # noqa: B017, PT011 LeRobot itself raises several
            make_pre_post_processors(LeRobotPolicy.from_pretrained(folder).config, pretrained_path=str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_opened_is_written_as_lerobot_opens_it(today: Make, kind: str, tmp_path: Path) -> None:
    write_policy(tmp_path / "ours", load_policy(today(kind)))
    LeRobotPolicy.from_pretrained(tmp_path / "ours", strict=True)
    assert torch.equal(acts(tmp_path / "ours", kind), acts(today(kind), kind))
    (tmp_path / "ours" / EXTRA).unlink()  # what our own folder says to LeRobot alone
    assert describe(load_policy(tmp_path / "ours")) == describe(load_policy(today(kind)))


# --- what does not fit ------------------------------------------------------------------------------------------------


def set_key(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / CONFIG, lambda content: content.update({name: value}))


def set_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def set_step(number: int, change: Callable[[dict], Any], name: str = PREPROCESSOR) -> Callable[[Path], None]:
    return lambda folder: edit(folder / f"{name}.json", lambda content: change(content["steps"][number]))


BIAS = "diffusion.unet.final_conv.1.bias"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another policy": (set_key("type", "act"), "holds a policy of type act, which has no equal here"),
    "ours without its file": (set_key("type", "getiaction_diffusion"), "is not whole: it has no getiaction.json"),
    "an adapter": (set_key("use_peft", True), "PEFT adapter"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has neither getiaction.json nor config.json"),
    "no horizon": (lambda f: edit(f / CONFIG, lambda c: c.pop("horizon")), "config.json has no horizon"),
    "an unknown key": (set_key("use_new_loss", True), "config.json has use_new_loss, which LeRobot's diffusion policy"),
    "a horizon that does not fit": (set_key("horizon", 17), "horizon=17 must be divisible by 2"),
    "groups that do not fit": (set_key("n_groups", 7), "is damaged, or no policy that this version knows: "),
    "an unknown schedule": (set_key("beta_schedule", "steep"), "no policy that this version knows: steep is not"),
    "features without a type": (set_key("input_features", {"observation.state": {}}), "version knows: no 'type'"),
    "config of another kind": (lambda f: (f / CONFIG).write_text("[]"), "is damaged, or no policy"),
    "config in bytes": (lambda f: (f / CONFIG).write_bytes(b"\xff{}"), "is damaged, or no policy"),
    "a processor without steps": (lambda f: (f / f"{PREPROCESSOR}.json").write_text("{}"), "version knows: no 'steps'"),
    "another scheduler": (set_key("noise_scheduler_type", "EDM"), "noise_scheduler_type=EDM must be one of DDPM, DDIM"),
    "no action": (set_key("output_features", {}), "the output must be action, got nothing"),
    "a missing tensor": (set_weights(lambda w: w.pop(BIAS)), f"1 missing: {BIAS}"),
    "a tensor too many": (set_weights(lambda w: w.update(odd=torch.zeros(1))), "1 left over: odd"),
    "a misshaped tensor": (
        set_weights(lambda w: w.update({BIAS: torch.zeros(3)})),
        rf"1 of another shape: {BIAS} \(3,\) instead of \(2,\)",
    ),
    "cut weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:500]), "is damaged"),
    "cut config": (lambda f: (f / CONFIG).write_text("{"), "is damaged"),
    "no processors": (lambda f: (f / f"{PREPROCESSOR}.json").unlink(), "has no normalisation statistics"),
    "no postprocessor": (lambda f: (f / f"{POSTPROCESSOR}.json").unlink(), f"has no {POSTPROCESSOR}.json"),
    "no statistics": (lambda f: (f / PREPROCESSOR_STATE).unlink(), f"names {PREPROCESSOR_STATE}, which is not in it"),
    "statistics elsewhere": (set_step(3, lambda step: step.update(state_file="../x.safetensors")), "not in it"),
    "a step of another kind": (
        set_step(1, lambda step: step.update(registry_name="delta_actions_processor")),
        "has the step delta_actions_processor, which has no equal here",
    ),
    "quantiles": (
        set_step(3, lambda step: step["config"]["norm_map"].update(STATE="QUANTILES")),
        "normalises STATE: QUANTILES, which has no equal here",
    ),
    "another eps": (set_step(3, lambda step: step["config"].update(eps=1e-3)), "eps=0.001, which has no equal here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_said(today: Make, name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    folder = copied(today("keypoints"), tmp_path)
    change(folder)
    with pytest.raises(InputError, match=message):
        load_policy(folder)


def test_more_actions_than_lie_ahead_are_as_many_as_lerobot_executes(
    today: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(today("keypoints"), tmp_path)
    set_key("n_action_steps", 99)(folder)
    assert load_policy(folder).n_action_steps == 15
    assert "asks for n_action_steps=99, of which 15 exist" in caplog.text


def test_every_key_of_lerobots_config_is_known(today: Make) -> None:
    Config(
        today("picture"), {field.name: None for field in fields(DiffusionConfig)} | {"type": "diffusion"}
    ).check_type()


def test_untrained_statistics_are_refused(today: Make, tmp_path: Path) -> None:
    folder = copied(today("keypoints"), tmp_path)
    to_2025(folder)
    key = "normalize_inputs.buffer_observation_state.min"
    set_weights(lambda weights: weights.update({key: torch.full((2,), float("inf"))}))(folder)
    with pytest.raises(InputError, match=r"min of observation\.state is not finite: this policy was never trained"):
        load_policy(folder)


def test_renamed_observations_and_edits_by_hand_are_warned_of(
    today: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(today("keypoints"), tmp_path)
    set_step(0, lambda step: step["config"].update(rename_map={"joints": STATE}))(folder)
    policy = load_policy(folder)
    assert "renames observations ({'joints': 'observation.state'}): give them by the new names" in caplog.text
    write_policy(tmp_path / "ours", policy)
    set_key("n_action_steps", 4)(tmp_path / "ours")
    assert load_policy(tmp_path / "ours").n_action_steps == 8
    assert "says n_action_steps=4, but getiaction.json does not: the latter holds" in caplog.text


# --- there and back ---------------------------------------------------------------------------------------------------


def test_lerobot_trains_our_checkpoint_further_and_it_comes_back(keypoints_run: Path, tmp_path: Path) -> None:
    data = shutil.copytree(Path(str(compose(["dataset=pusht_demo"]).dataset.root)), tmp_path / "data")
    ours = keypoints_run / "checkpoints/last/pretrained_model"
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", f"--policy.path={ours}", "--policy.device=cpu"]
    command += ["--dataset.repo_id=getiaction/pusht_demo", f"--dataset.root={data}", "--dataset.episodes=[0,1]"]
    command += ["--steps=2", "--save_freq=2", "--batch_size=4", "--num_workers=0", "--env_eval_freq=0"]
    command += ["--policy.push_to_hub=false", "--wandb.enable=false", f"--output_dir={tmp_path / 'lerobot'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    trained = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    before, after = load_policy(ours), load_policy(tmp_path / "lerobot")
    moved = [float((after.state_dict()[key] - value).abs().max()) for key, value in before.state_dict().items()]
    assert 0 < max(moved) < 1e-3  # two small steps from our weights, not from drawn ones
    assert after.normalizer.modes == before.normalizer.modes
    assert (before.drop_n_last_frames, after.drop_n_last_frames) == (3, 3)  # it was trained on the same samples
