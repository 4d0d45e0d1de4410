"""Whatever is loaded, no pickle is: Python itself tells when one asks for a class or a function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WATCHED = """
import json, runpy, sys

import torch, accelerate, lerobot.policies, torchvision, gymnasium, pymunk  # what they do when imported is theirs

def refuse(event, arguments):
    if event == "pickle.find_class":
        raise SystemExit(f"a pickle asks for {arguments}")

def never(*_, **__):
    raise SystemExit("torch.load was called")

sys.addaudithook(refuse)
torch.load = never
for module, *arguments in json.loads(sys.argv[1]):
    print(module, flush=True)
    sys.argv[1:] = arguments
    try:
        runpy.run_module(f"getiaction.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""
SMALL = (
    "+preset=pusht_cpu",
    "dataset.episodes=null",
    "backbone.resize_shape=[40,40]",
    "backbone.crop_shape=[36,36]",
    "unet.down_dims=[16]",
    "lr_scheduler.num_warmup_steps=0",
    "training.batch_size=4",
    "validation.max_samples=4",
)
MODULES = ("train", "evaluate", "import_policy", "export")
ACTING = (
    "env=pusht",
    "env.image_size=[48,48]",
    "env.max_steps=3",
    "num_workers=0",
    "videos=false",
    "episodes=2",
    "device=cpu",
    "num_threads=1",
)


def run(folder: Path, commands: list[tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other, in a process that ends as soon as it opens a pickle."""
    return subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "GETIACTION_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, make_dataset) -> tuple[Path, Path]:
    """Return a folder, and a dataset with pictures."""
    shape = {"cameras": ("observation.image",), "image_size": (48, 48), "state_dim": 2, "action_dim": 2, "fps": 10}
    return tmp_path_factory.mktemp("watched"), make_dataset(lengths=(17, 15, 16), **shape)


def test_the_watch_sees_a_pickle(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "harm").write_bytes(pickle.dumps(os.getcwd))
    script = WATCHED.split("for module, *")[0] + "import pickle; pickle.load(open('harm', 'rb'))"
    script = script.replace(", accelerate, lerobot.policies, torchvision, gymnasium, pymunk", "")  # which take seconds
    seen = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "a pickle asks for" in seen.stderr
    assert seen.returncode == 1


def test_training_resuming_evaluating_importing_and_fine_tuning_open_no_pickle(work: tuple[Path, Path]) -> None:
    folder, root = work
    policy = "run/checkpoints/last/pretrained_model"
    lengths = [f"training.max_steps={steps}" for steps in (2, 3)]
    commands: list[tuple[str, ...]] = [
        ("train", *SMALL, f"dataset.root={root}", "output_dir=run", lengths[0]),
        ("train", "training.resume=run", lengths[1]),
        ("evaluate", "checkpoint=run", "output_dir=evaluation", *ACTING),
        ("import_policy", policy, "--output-dir", "imported"),
        ("train", *SMALL, f"dataset.root={root}", "output_dir=tuned", "training.init_from=imported", lengths[0]),
        ("export", "run", "--output", "policy.onnx", "--num-inference-steps", "2"),
    ]
    done = run(folder, commands)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    assert [word for word, *_ in commands] == [line for line in done.stdout.splitlines() if line in MODULES]
