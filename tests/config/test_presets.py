"""Every preset means what the table says, composes, builds at full size and trains on real data."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from composing import compose

from getiaction.config.checks import check_config
from getiaction.config.compose import CONF_DIR, known_keys
from getiaction.config.value_checks import look_up
from getiaction.train import train

PRESETS = sorted(path.stem for path in (CONF_DIR / "preset").glob("*.yaml"))

TABLE: dict[str, tuple[Any, ...]] = {
    # key: basic, advanced, fast, cpu, multigpu, aloha
    "policy.n_obs_steps": (2, 2, 1, 2, 2, 2),
    "policy.horizon": (16, 16, 8, 16, 16, 16),
    "policy.n_action_steps": (8,) * 6,
    "backbone.resnet": ("resnet18", "resnet18", "resnet18", "resnet18", "resnet50", "resnet34"),
    "backbone.weights": (None, None, None, None, "IMAGENET1K_V2", "IMAGENET1K_V1"),
    "backbone.norm": ("group", "group", "batch", "batch", "batch", "batch"),
    "backbone.resize_shape": (None, None, [64, 64], [64, 64], None, [240, 240]),
    "backbone.crop_shape": ([84, 84], [84, 84], None, None, [84, 84], [224, 224]),
    "backbone.num_keypoints": (32, 32, 16, 16, 32, 64),
    "policy.use_separate_rgb_encoder_per_camera": (False, False, False, False, False, True),
    "unet.down_dims": (
        [256, 512, 1024],
        [512, 1024, 2048],
        [128, 256, 512],
        [128, 256, 512],
        [512, 1024, 2048],
        [512, 1024, 2048],
    ),
    "unet.kernel_size": (5, 5, 3, 3, 5, 5),
    "unet.n_groups": (8, 8, 4, 4, 8, 8),
    "unet.diffusion_step_embed_dim": (128, 128, 64, 64, 256, 256),
    "scheduler._target_": (
        "diffusers.DDPMScheduler",
        "diffusers.DDPMScheduler",
        "diffusers.DDIMScheduler",
        "diffusers.DDPMScheduler",
        "diffusers.DDPMScheduler",
        "diffusers.DDPMScheduler",
    ),
    "scheduler.num_train_timesteps": (100, 100, 50, 50, 100, 100),
    "scheduler.beta_schedule": ("squaredcos_cap_v2",) * 6,
    "scheduler.prediction_type": ("epsilon",) * 6,
    "scheduler.clip_sample": (True,) * 6,
    "policy.num_inference_steps": (10, 10, 5, 10, 10, 10),
    "optimizer._target_": ("torch.optim.AdamW",) * 6,
    "optimizer.lr": (1e-4, 1e-4, 5e-4, 1e-4, 2e-4, 1e-4),
    "optimizer.weight_decay": (1e-6, 1e-6, 0.0, 1e-6, 1e-6, 1e-6),
    "lr_scheduler.name": ("cosine", "cosine", "constant", "cosine", "cosine", "cosine"),
    "lr_scheduler.num_warmup_steps": (500, 500, 0, 100, 2000, 1000),
    "training.batch_size": (64, 64, 128, 16, 64, 32),
    "training.gradient_accumulation_steps": (1, 1, 1, 1, 2, 1),
    "training.max_steps": (200_000, 200_000, None, 1000, 25_000, 200_000),
    "training.max_epochs": (None, None, 500, None, None, None),
    "training.save_every": (10_000, 10_000, None, 500, 2500, 10_000),
    "training.max_grad_norm": (None, None, None, None, 10.0, 10.0),
    "hardware.mixed_precision": ("no", "no", "auto", "no", "auto", "auto"),
    "hardware.num_processes": (1, 1, 1, 1, 4, 1),
    "hardware.sync_batch_norm": (False, False, False, False, True, False),
    "dataset.episodes": (None, None, None, [0, 1, 2, 3, 4], None, None),
}
COLUMNS = ("pusht_basic", "pusht_advanced", "pusht_fast", "pusht_cpu", "pusht_multigpu", "aloha")


def test_the_six_presets_are_there() -> None:
    assert set(COLUMNS) <= set(PRESETS)


@pytest.mark.parametrize("preset", COLUMNS)
def test_preset_has_the_values_of_the_table(preset: str) -> None:
    config = compose([f"+preset={preset}"])
    column = COLUMNS.index(preset)
    assert {key: look_up(config, key) for key in TABLE} == {key: row[column] for key, row in TABLE.items()}
    assert config.name == preset


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("pusht_")])
def test_a_pusht_preset_takes_the_demonstrations_in_the_box(preset: str) -> None:
    seen = "_keypoints" if preset in ("pusht_keypoints", "pusht_laptop") else ""
    dataset = compose([f"+preset={preset}", f"dataset=pusht_demo{seen}"]).dataset
    assert (Path(str(dataset.root)) / "meta/info.json").exists()
    assert dataset.observations == ["observation.state", f"observation.{'environment_state' if seen else 'image'}"]


MAKE = {  # what follows `make train` -> the data that it names
    "PRESET=pusht_laptop": None,
    "PRESET=pusht_pictures": None,
    "PRESET=pusht_cpu": "dataset=pusht_demo",
    "PRESET=pusht_keypoints": "dataset=pusht_demo_keypoints",
    "PRESET=pusht_cpu ARGS=dataset.episodes=[0,1]": "dataset=pusht_demo",
    "PRESET=pusht_cpu ARGS=output_dir=/tmp/datasets": "dataset=pusht_demo",
    "PRESET=pusht_cpu ARGS=training.resume=false": "dataset=pusht_demo",
    "PRESET=pusht_cpu ARGS=training.resume=true": None,
    "PRESET=pusht_cpu ARGS=dataset.root=/data": "dataset.root=/data",
    "PRESET=aloha": None,
    "PRESET=pusht_mine": None,
}


@pytest.mark.parametrize("arguments", MAKE)
def test_make_train_names_the_data_unless_told_otherwise(arguments: str) -> None:
    shown = subprocess.run(
        ["make", "--dry-run", "train", *arguments.split()],
        cwd=CONF_DIR.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    words = [word for word in shown.stdout.split() if word.startswith(("dataset=", "dataset.root="))]
    assert words == ([MAKE[arguments]] if MAKE[arguments] else [])


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_passes_its_own_checks_strictly(preset: str) -> None:
    check_config(compose([f"+preset={preset}", "strict=true", "hardware.num_processes=1"]))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "pusht_advanced"])
def test_preset_is_a_short_diff(preset: str) -> None:
    lines = (CONF_DIR / f"preset/{preset}.yaml").read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 35


def test_advanced_names_every_key_with_a_comment() -> None:
    lines = (CONF_DIR / "preset/pusht_advanced.yaml").read_text().splitlines()
    spelled_out = yaml.safe_load("\n".join(uncommented(line) for line in lines))
    composed = asdict(compose(["+preset=pusht_advanced"]))
    del composed["output_dir"], composed["mirror"]  # a choice without keys
    for group in ("backbone", "unet", "scheduler", "optimizer", "env"):
        composed[group] = {key: value for key, value in composed[group].items() if not key.startswith("_")}
    assert {key: spelled_out[key] for key in composed} == composed
    for number, line in enumerate(lines):
        if line.startswith("  ") and not line.strip().startswith(("#", "-")):
            assert lines[number - 1].strip().startswith("#"), f"{line} has no line of documentation"


def uncommented(line: str) -> str:
    """Return the setting that a line like `  # down_dims: [1, 2]` shows, or the line itself."""
    key = line.strip().removeprefix("# ").split(":")[0]
    is_setting = line.startswith("  # ") and key in {known.rsplit(".", 1)[-1] for known in known_keys()}
    return line.replace("# ", "", 1) if is_setting else line


@pytest.mark.parametrize("path", sorted(CONF_DIR.glob("**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_of_the_tree_has_a_line_of_documentation(path: Path) -> None:
    if path.parent.name in ("preset", "lightning"):  # the second: in the words of another format
        return
    lines = path.read_text().split("\nhydra:")[0].splitlines()
    for number, line in enumerate(lines):
        key = line.strip().split(":")[0]
        section = line.rstrip().endswith(":") and not line.startswith("  ")
        if key.isidentifier() and not key.startswith("_") and key != "defaults" and not section:
            derived = "defaults:" in path.read_text() and path.stem != "train"  # documented in the leaf that it changes
            assert derived or lines[number - 1].strip().startswith("#"), f"{path.name}: {line}"


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_trains_two_steps(preset: str, request: pytest.FixtureRequest, scratch: Path) -> None:
    """At full size, but for three whose U-Net is half a minute, much of it for a checkpoint of four gigabytes.

    test_lerobot_equivalence builds them as they are.
    """
    aloha, acts = preset == "aloha", preset in ("pusht_keypoints", "pusht_laptop", "pusht_pictures")
    names = {"aloha": "aloha_root", "pusht_keypoints": "pusht_keypoints_root"}
    boxed = preset in ("pusht_laptop", "pusht_pictures")  # their data come with the package
    data = [] if boxed else [f"dataset.root={request.getfixturevalue(names.get(preset, 'pusht_root'))}"]
    small = ["training.batch_size=2", "training.max_steps=2", "training.log_every=1", "hardware.num_processes=1"]
    small += ["validation.max_samples=2", "validation.max_sampled=2"]
    small += ["evaluation.final_episodes=1", "env.max_steps=8"] if acts else ["backbone.weights=null"]
    small += [] if aloha else ["dataset.episodes=[0,1]"]
    small += ["unet.down_dims=[128,256,512]"] if preset in ("aloha", "pusht_advanced", "pusht_multigpu") else []
    config = compose([f"+preset={preset}", *data, *small])
    metrics = train(config, scratch / "run")
    least = 0.03 if preset == "pusht_pictures" else 0.1  # actions are nearer to an untrained guess than noise is
    assert least < metrics["loss"] < 10
    assert least < metrics["val_loss"] < 10
    assert metrics["val_action_error"] > 0
    assert (scratch / "run/checkpoints/last/pretrained_model/model.safetensors").exists()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Return a folder in memory, where there is one: a checkpoint of `pusht_basic` takes more than a gigabyte."""
    memory = Path("/dev/shm")
    left = psutil.virtual_memory().available - 8e9  # beside what training takes
    roomy = memory.is_dir() and min(shutil.disk_usage(memory).free - 4e9, left) > 0
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        yield Path(folder)


def test_cpu_preset_learns(pusht_root: Path, tmp_path: Path) -> None:
    """A shortened `pusht_cpu`: the validation loss on held-out human demonstrations falls well below its start."""
    short = ["training.max_steps=40", "lr_scheduler.num_warmup_steps=5", "optimizer.lr=1e-3", "validation.every=5"]
    short += ["validation.max_samples=48"]
    config = compose(["+preset=pusht_cpu", f"dataset.root={pusht_root}", "validation.max_sampled=0", *short])
    metrics = train(config, tmp_path / "run")
    assert metrics["val_loss"] < 0.5 * read_validation(tmp_path / "run")[0]


def read_validation(folder: Path) -> list[float]:
    """Return the validation losses of a run."""
    from getiaction.training.metrics import read_metrics

    return [line["val_loss"] for line in read_metrics(folder) if "val_loss" in line]
