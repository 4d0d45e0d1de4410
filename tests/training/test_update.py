"""Training that replays its steps as CUDA graphs takes the steps that plain training takes."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from getiaction.config import run
from getiaction.config.sources import find_data
from getiaction.policy.fast.beside import Beside
from getiaction.training.checkpoint import read_average, read_state
from getiaction.training.metrics import read_metrics
from getiaction.training.resume import resume
from getiaction.training.stepper import Stepper
from getiaction.training.update import Rates, is_listened_to

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA GPU has graphs")
ON_GPU = ("hardware=gpu", "hardware.tf32=false", "training.max_steps=8", "training.max_grad_norm=0.5")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@needs_gpu
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("pictures",),
        ("pictures", "backbone.norm=batch"),
        ("training.gradient_accumulation_steps=2", "policy.do_mask_loss_for_padding=false"),
        ("training.gradient_accumulation_steps=2", "policy.do_mask_loss_for_padding=true"),
        ("hardware.mixed_precision=bf16",),
        ("hardware.mixed_precision=fp16",),
        ("unet.gradient_checkpointing=true",),
        ("optimizer.fused=false",),
        ("hardware.convolutions=library",),
        ("hardware.data_placement=host",),
    ],
)
def test_replayed_steps_are_the_plain_ones(
    tiny: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    overrides = [part for one in more for part in (helpers.WITH_PICTURES if one == "pictures" else (one,))]
    plain_only = {"hardware.mixed_precision=fp16", "policy.do_mask_loss_for_padding=true"} & {*more}
    weights = {}
    for name, replays in {"replayed": "true", "plain": "false"}.items():
        trainer = tiny.trainer(tmp_path / name, *ON_GPU, *overrides, f"hardware.cuda_graphs={replays}")
        torch.backends.cudnn.benchmark = False  # which would choose other kernels for each
        trainer.fit()
        kept = trainer.update.replay
        assert (kept is not None and kept.captured) is (name == "replayed" and not plain_only)
        weights[name] = {key: value.cpu() for key, value in weights_of(trainer).items()}
    assert losses(tmp_path / "replayed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    for key, value in weights["plain"].items():
        assert torch.allclose(weights["replayed"][key], value, rtol=1e-2, atol=1e-4), key


@needs_gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("more", ["", "pictures", "backbone.norm=batch", "optimizer=adam"])
def test_weights_that_learn_beside_the_backward_pass_learn_the_same(
    tiny: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, more: str
) -> None:
    """Bit for bit, with their averages, as if all kernels came after each other and Adam's after all gradients."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    overrides = [f"hardware.mixed_precision={precision}", "training.max_grad_norm=null", "training.max_steps=12"]
    overrides += [*helpers.WITH_PICTURES, more] if more not in ("", "pictures") else []
    overrides += [*helpers.WITH_PICTURES] if more == "pictures" else []
    weights, updated = [], []
    launch = Stepper._launch
    monkeypatch.setattr(
        Stepper, "_launch", lambda own, *given: (updated.append(bool(own._groups)), launch(own, *given))
    )
    for name in ("beside", "after"):
        trainer = tiny.trainer(tmp_path / name, *ON_GPU, *overrides)
        torch.backends.cudnn.benchmark = False
        if name == "after":
            monkeypatch.setattr(Beside, "launching", lambda *_: contextlib.nullcontext())
            monkeypatch.setattr("getiaction.training.stepper.AHEAD", None)
        updated.clear()
        trainer.fit()
        assert any(updated) is (name == "beside")
        assert trainer.update.replay.captured
        weights.append({key: value.cpu() for key, value in weights_of(trainer).items()})
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key


def test_a_cpu_replays_nothing(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, "training.max_steps=4")
    trainer.fit()
    assert trainer.update.replay is None


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_who_listens_is_told_from_accelerate_which_casts(precision: str) -> None:
    """Accelerate replaces the outermost `forward`, and so may others: before it, after it, and further inside."""
    network = nn.Sequential(nn.Linear(2, 2))
    model = prepared(network, precision)
    assert ("forward" in vars(model)) is (precision != "no")
    assert not is_listened_to(model)
    handle = model.register_forward_hook(lambda *_: None)
    assert is_listened_to(model)
    handle.remove()
    before = nn.Linear(2, 2)
    before.forward = functools.wraps(before.forward)(lambda x: x)
    after = prepared(nn.Linear(2, 2), precision)
    after.forward = functools.wraps(after.forward)(lambda x: x)
    inside = nn.Sequential(nn.Linear(2, 2))
    inside[0].forward = lambda x: x
    for other in (prepared(before, precision), after, prepared(inside, precision)):
        assert is_listened_to(other)


def prepared(model: nn.Module, precision: str) -> nn.Module:
    """Return a model as Accelerate prepares it, whatever this machine could compute."""
    AcceleratorState._reset_state(reset_partial_state=True)  # before, and after: all share it
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = precision, precision != "no"
    model = accelerator.prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    return model


def test_rates_follow_an_optimiser_that_was_resumed() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    rates = Rates(optimizer, torch.device("cpu"))
    optimizer.load_state_dict(optimizer.state_dict() | {})
    optimizer.param_groups[0]["lr"] = 0.25
    assert rates.fit
    rates.take_over()
    with rates.as_a_graph_reads_them(on_device=True):
        [group] = optimizer.param_groups
        assert isinstance(group["lr"], torch.Tensor)
        assert (float(group["lr"]), group["capturable"]) == (0.25, True)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["capturable"]) == (0.25, False)


def test_rates_are_rounded_before_there_is_a_graph_as_in_it() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.1, fused=True)
    rates, [group] = Rates(optimizer, torch.device("cpu")), optimizer.param_groups
    rates.take_over()
    with rates.as_a_graph_reads_them(on_device=False):
        plain, capturable = group["lr"], group["capturable"]
    with rates.as_a_graph_reads_them(on_device=True):
        assert plain == float(group["lr"]) != 0.1
    assert (group["lr"], capturable) == (0.1, False)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_key_decides_for_action_chunks_as_well(tiny: Any, tmp_path: Path, wanted: bool) -> None:
    trainer = tiny.trainer(tmp_path, f"hardware.cuda_graphs={str(wanted).lower()}")
    assert (trainer.policy.cuda_graphs, trainer.best.cuda_graphs) == (wanted, wanted)


def test_other_optimisers_step_outside_of_a_graph() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    for optimizer in (torch.optim.SGD(weights, lr=0.5), torch.optim.AdamW(weights, lr=0.5)):
        assert not Rates(optimizer, torch.device("cpu")).fit


@needs_gpu
def test_a_resumed_run_replays_as_well(tiny: Any, tmp_path: Path) -> None:
    tiny.train(tmp_path, *ON_GPU[:2], "training.max_steps=4")
    config = tiny.resumed_config(tmp_path, "training.max_steps=12")
    trainer = run.build_trainer(config, find_data(config), run.start_accelerator(config, tmp_path), tmp_path)
    assert trainer.step == 4
    trainer.fit()
    assert trainer.update.replay is not None
    assert trainer.update.replay.captured


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Return a policy's weights, and their averages."""
    averages = {f"average of {key}": value for key, value in trainer.ema.average.state_dict().items()}
    return {**trainer.policy.state_dict(), **averages}


@pytest.mark.parametrize("on", ["cpu", pytest.param("gpu", marks=needs_gpu)])
def test_a_trainer_that_goes_back_captures_anew(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: str
) -> None:
    """As in a notebook: the moments lie elsewhere then, and a graph would go on with the old ones."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    trainer = tiny.trainer(tmp_path, *ON_GPU[1:], f"hardware={on}", "training.save_every=4")
    torch.backends.cudnn.benchmark = False
    trainer.fit()
    weights = {key: value.clone() for key, value in weights_of(trainer).items()}
    checkpoint = tmp_path / "checkpoints" / "000004"
    trainer.update.replay = trainer.update.replay or object()  # on a CPU there is none to forget
    resume(trainer, read_state(checkpoint), read_average(checkpoint))
    assert (trainer.step, trainer.update.replay) == (4, None)
    trainer.fit()
    for key, value in weights_of(trainer).items():
        assert torch.allclose(weights[key], value, rtol=1e-2, atol=1e-4 if on == "gpu" else 0), key
