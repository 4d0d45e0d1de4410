"""The commands as users type them: real processes, an installed wheel, another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command and capture what it prints."""
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the wheel is installed, as `pip wheel --no-deps .` makes it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    made = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT), cwd=folder)
    assert made.returncode == 0, made.stderr
    wheel = next(folder.glob("getiaction-*.whl"))
    done = run(*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_the_wheel_carries_the_config_tree_and_demonstrations_and_trains_from_any_folder(
    installed: Path, tmp_path: Path
) -> None:
    short = ["training.max_steps=1", "validation.max_samples=1", "evaluation.final_episodes=1", "env.max_steps=3"]
    trained = run(
        *(sys.executable, "-m", "getiaction.train", "+preset=pusht_laptop", *short),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
        HF_HUB_OFFLINE="1",
    )
    assert trained.returncode == 0, trained.stderr
    assert (installed / "getiaction/conf/train.yaml").exists()
    assert len(list(tmp_path.glob("outputs/pusht_laptop/*/checkpoints/last/pretrained_model/model.safetensors"))) == 1


def test_getiaction_train_shows_the_composed_config(installed: Path, tmp_path: Path) -> None:
    shown = run(
        *(sys.executable, "-m", "getiaction.cli", "train", "+preset=pusht_cpu", "--cfg", "job"),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert shown.returncode == 0, shown.stderr
    assert "name: pusht_cpu" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_explains_groups_presets_and_overrides(tmp_path: Path) -> None:
    shown = run(sys.executable, "-m", "getiaction.train", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for path in (path for path in (ROOT / "conf").glob("*/*.yaml") if path.parent.name != "lightning"):
        assert f"\n  {path.stem} " in shown.stdout
        assert f"{path.parent.name}=" in shown.stdout
    assert len([line for line in shown.stdout.split("Ten overrides")[1].splitlines() if line.startswith("  ")]) == 10


def test_mistakes_exit_with_2_and_one_message(tmp_path: Path) -> None:
    failed = run(sys.executable, "-m", "getiaction.train", "+preset=pusht_fst", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.strip().startswith("error: preset=pusht_fst does not exist: did you mean pusht_fast?")
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("more", "instead"),
    [
        (("output_dir=here", "hydra.run.dir=there"), "leave hydra.run.dir out"),
        (("++output_dir=here", "++hydra.run.dir=there"), "leave hydra.run.dir out"),
        (("output_dir=here", "--multirun"), "give hydra.sweep.dir=<folder> for all runs of a sweep"),
    ],
)
def test_a_folder_that_would_be_passed_over_is_an_error(more: tuple[str, ...], instead: str, tmp_path: Path) -> None:
    refused = warm.run("-m", "getiaction.train", "+preset=pusht_laptop", *more, cwd=tmp_path)
    assert refused.returncode == 2
    assert "output_dir=here would be passed over, since Hydra's folder is" in refused.stderr + refused.stdout
    assert instead in refused.stderr + refused.stdout
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_dataset_that_is_nowhere_names_dataset_root(tmp_path: Path) -> None:
    failed = run(sys.executable, "-m", "getiaction.train", "+preset=pusht_cpu", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert failed.returncode == 2
    assert "dataset.root=<folder>" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_an_unknown_command_is_answered_with_the_nearest(tmp_path: Path) -> None:
    failed = run(sys.executable, "-m", "getiaction.cli", "trian", cwd=tmp_path)
    assert failed.returncode == 2
    assert "did you mean train?" in failed.stderr


def test_a_sweep_trains_each_combination(pusht_root: Path, tmp_path: Path) -> None:
    small = ["training.max_steps=1", "training.batch_size=2", "validation.max_samples=1", "validation.max_sampled=0"]
    both = ("-m", "+preset=pusht_cpu", "seed=0,1", f"dataset.root={pusht_root}")
    swept = warm.run("-m", "getiaction.train", *both, *small, cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr
    assert len(list(tmp_path.glob("outputs/pusht_cpu/sweep_*/*/metrics.jsonl"))) == 2
