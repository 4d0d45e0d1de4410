"""ONNX files: the same actions as PyTorch's, in ONNX Runtime without PyTorch, and in OpenVINO."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from getiaction.errors import InputError
from getiaction.export import main
from getiaction.interop.lerobot import load_policy
from getiaction.interop.onnx_file import STEP_NOISE, ChunkGraph, example, export_onnx, in_order
from getiaction.interop.onnx_policy import OnnxPolicy, as_recorded
from getiaction.policy import ConditionalUnet1d, Controller, DiffusionPolicy, Features, ImageEncoder, Normalizer

RUN_WITHOUT_TORCH = """
import sys
import numpy as np
import onnxruntime
fed = dict(np.load(sys.argv[2]))
np.save(sys.argv[3], onnxruntime.InferenceSession(sys.argv[1]).run(None, fed)[0])
assert "torch" not in sys.modules and "getiaction" not in sys.modules
"""
SQUARED = {"beta_schedule": "squaredcos_cap_v2"}
UNET = partial(ConditionalUnet1d, down_dims=(16, 32), diffusion_step_embed_dim=16)
SHALLOW = {"unet": partial(UNET, down_dims=(16,))}  # half as long to export
CASES: dict[str, tuple[Features, dict[str, Any], Any]] = {
    "states": (Features(action_dim=2, state_dim=3, env_state_dim=4), {}, DDPMScheduler(20, **SQUARED)),
    "states, flow matching": (
        Features(action_dim=2, state_dim=3),
        {"prediction_type": "sample", **SHALLOW},
        FlowMatchEulerDiscreteScheduler(20),
    ),
    "one picture, resized": (
        Features(action_dim=2, state_dim=3, cameras={"observation.image": (3, 48, 48)}),
        {"encoder": partial(ImageEncoder, resize_shape=(40, 40), norm="batch", num_keypoints=4), **SHALLOW},
        DDIMScheduler(20, prediction_type="sample", **SQUARED),
    ),
    "two cameras, cropped": (
        Features(action_dim=2, cameras={"observation.images.a": (3, 48, 64), "observation.images.b": (3, 48, 64)}),
        {
            "encoder": partial(ImageEncoder, crop_shape=(40, 44), num_keypoints=4),
            "use_separate_rgb_encoder_per_camera": True,
            **SHALLOW,
        },
        DDPMScheduler(20, prediction_type="v_prediction", clip_sample=False, **SQUARED),
    ),
}


def make(case: str, **others: Any) -> DiffusionPolicy:
    """Return a small policy with statistics other than [-1, 1]."""
    features, more, scheduler = CASES[case]
    torch.manual_seed(0)
    draw = {key: torch.rand(shape) for key, shape in features.shapes.items() if len(shape) == 1}
    statistics: dict[str, dict[str, Tensor]] = {key: {"min": low - 3, "max": 4 * low + 2} for key, low in draw.items()}
    modes = {"visual": "identity", "state": "min_max", "env": "min_max", "action": "min_max"}
    return DiffusionPolicy(
        features,
        normalizer=Normalizer(statistics, modes),
        noise_scheduler=scheduler,
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        num_inference_steps=4,
        **{"unet": UNET, **more, **others},
    ).eval()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return a function that exports a case, once: a policy, its file, inputs for two robots and PyTorch's actions."""

    @functools.cache
    def make_file(case: str) -> dict[str, Any]:
        policy, path = make(case), tmp_path_factory.mktemp("onnx") / "policy.onnx"
        compared = export_onnx(path, policy, num_inference_steps=4, batch_size=2)
        graph = ChunkGraph(policy, 4)
        inputs = example(policy, graph, 2)
        torch.manual_seed(1)
        inputs |= {key: torch.randn_like(value) for key, value in inputs.items() if value.dtype == torch.float32}
        with torch.no_grad():
            actions = graph(*in_order(graph, inputs)).numpy()
        fed = {key: value.numpy() for key, value in inputs.items()}
        return {"policy": policy, "path": path, "inputs": fed, "actions": actions, "compared": compared}

    return make_file


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, export: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return what `export` makes of each case."""
    return export(request.param)


def test_it_does_what_the_policy_does(exported: dict[str, Any]) -> None:
    """The graph is held against `predict_action_chunk`, whose generator draws the same noise step by step."""
    policy, fed = exported["policy"], {key: torch.from_numpy(value) for key, value in exported["inputs"].items()}
    graph, shape = ChunkGraph(policy, 4), (2, 8, 2)
    draw = torch.Generator().manual_seed(3)
    step_noise = torch.stack([torch.randn(shape, generator=draw) for _ in graph.draws]) if graph.draws else None
    observations = {key: fed[key] for key in graph.keys}
    with torch.no_grad():
        inside = graph(fed["noise"], step_noise, *observations.values())
    generator = torch.Generator().manual_seed(3)
    outside = policy.predict_action_chunk(observations, noise=fed["noise"], generator=generator)
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-4)


def test_onnx_runtime_acts_the_same_without_pytorch(exported: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **exported["inputs"])
    paths = [exported["path"], tmp_path / "inputs.npz", tmp_path / "actions.npy"]
    subprocess.run([sys.executable, "-c", RUN_WITHOUT_TORCH, *map(str, paths)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "actions.npy"), exported["actions"], rtol=1e-4, atol=1e-4)
    assert exported["compared"].difference < 1e-5


def test_openvino_acts_the_same(exported: dict[str, Any]) -> None:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(exported["path"]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (actions,) = compiled(exported["inputs"]).values()
    resizes = any(encoder.resize_shape for encoder in exported["policy"].encoders)
    tolerance = 3e-2 if resizes else 1e-3  # it rounds resized pictures in its own way
    np.testing.assert_allclose(actions, exported["actions"], rtol=tolerance, atol=tolerance)


def test_every_input_matters(exported: dict[str, Any]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported["path"])
    for name, value in exported["inputs"].items():
        changed = exported["inputs"] | {name: 255 - value if value.dtype == np.uint8 else value + 0.3}
        assert not np.allclose(session.run(None, changed)[0], exported["actions"], atol=1e-3), name


def test_its_metadata_say_how_to_use_it(exported: dict[str, Any]) -> None:
    import onnx

    policy, model = exported["policy"], onnx.load(exported["path"], load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["observations"]) == list(policy.features.observation_keys)
    assert [said[key] for key in ("n_obs_steps", "horizon", "n_action_steps", "num_inference_steps")] == list("2844")
    assert said["scheduler"] == type(policy.noise_scheduler).__name__
    assert (STEP_NOISE in exported["inputs"]) == (said["scheduler"] == "DDPMScheduler")


# --- acting -----------------------------------------------------------------------------------------------------------


def test_a_controller_acts_the_same(exported: dict[str, Any]) -> None:
    policy, file = exported["policy"], OnnxPolicy(exported["path"], num_threads=1)
    assert file.features == policy.features
    draw = torch.Generator().manual_seed(4)
    walk = []
    for _ in range(9):  # two chunks and a step
        step = {}
        for key in policy.features.observation_keys:
            size = (2, *policy.features.shapes[key])
            is_picture = len(size) == 4
            step[key] = torch.randint(0, 256, size, generator=draw) if is_picture else torch.randn(size, generator=draw)
            step[key] = step[key].to(torch.uint8) if is_picture else step[key]
        walk.append(step)
    controllers = [Controller(one, seed=7) for one in (policy, file)]
    ours, theirs = (torch.stack([controller.act(step) for step in walk]) for controller in controllers)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_pictures_may_be_numbers_from_0_to_1(exported: dict[str, Any]) -> None:
    file, fed = OnnxPolicy(exported["path"]), exported["inputs"]
    seen = {key: torch.from_numpy(fed[key]) for key in file.features.observation_keys}
    as_floats = {key: value / 255 if value.dtype == torch.uint8 else value for key, value in seen.items()}
    chunks = [file.predict_action_chunk(one, generator=torch.Generator().manual_seed(1)) for one in (seen, as_floats)]
    assert torch.equal(*chunks)


def test_another_number_of_robots_is_told_what_to_do(exported: dict[str, Any]) -> None:
    file = OnnxPolicy(exported["path"])
    seen = {key: torch.zeros(1, 2, *file.features.shapes[key]) for key in file.features.observation_keys}
    with pytest.raises(ValueError, match=r"must have shape \(2, 2, .*, got \(1, 2, .*--batch-size 1"):
        file.predict_action_chunk(seen)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    with pytest.raises(InputError, match=r"is no file: write one with getiaction export RUN_FOLDER --output"):
        OnnxPolicy(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(InputError, match="cannot be opened by ONNX Runtime"):
        OnnxPolicy(tmp_path / "text.onnx")
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"was not written by getiaction export: KeyError\('n_obs_steps'\)"):
        OnnxPolicy(tmp_path / "other.onnx")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_obs_steps", '"two"'),
        ("n_obs_steps", "3"),
        ("n_obs_steps", "no JSON"),
        ("observations", '["observation.image.none"]'),
        ("observations", "3"),
        ("observations", "[]"),
        ("n_action_steps", "99"),
        ("horizon", "null"),
    ],
)
def test_files_that_say_something_else_of_themselves_are_refused(
    export: Callable[[str], dict[str, Any]], key: str, value: str, tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(export("states")["path"])
    (entry,) = (one for one in model.metadata_props if one.key == key)
    entry.value = value
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(InputError, match=r"changed\.onnx (was not written by|does not do what it says)"):
        OnnxPolicy(tmp_path / "changed.onnx")


@pytest.mark.parametrize("pictures", [torch.full((2, 3), 200), torch.full((2, 3), 200.0), torch.full((2, 3), math.nan)])
def test_pictures_of_other_numbers_are_refused(pictures: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8, or float in \[0, 1\]"):
        as_recorded("observation.image", pictures)


def test_what_resizing_left_outside_is_cut_off() -> None:
    pictures = as_recorded("observation.image", torch.tensor([-0.01, 0.0, 0.5, 1.0, 1.01]))
    assert pictures.tolist() == [0, 0, 128, 255, 255]


def test_what_a_policy_takes_a_file_takes(exported: dict[str, Any]) -> None:
    file, fed = OnnxPolicy(exported["path"]), exported["inputs"]
    seen = {key: torch.from_numpy(fed[key]) for key in file.features.observation_keys}
    noise = torch.from_numpy(fed["noise"])

    def act(kind: torch.dtype, *, learns: bool) -> Tensor:
        given = {key: one if one.ndim > 3 else one.double().requires_grad_(learns) for key, one in seen.items()}
        return file.predict_action_chunk(given, noise=noise.to(kind), generator=torch.Generator().manual_seed(0))

    assert torch.equal(act(torch.float32, learns=False), act(torch.float64, learns=True))


def test_a_policy_in_another_precision_is_told_what_to_do(tmp_path: Path) -> None:
    policy = make("states").bfloat16()
    with pytest.raises(InputError, match=r"are torch\.bfloat16, and a file holds float32: export policy\.float"):
        export_onnx(tmp_path / "policy.onnx", policy, num_inference_steps=2)


# --- many steps -------------------------------------------------------------------------------------------------------

MANY = 100


@pytest.fixture(scope="module")
def of_many_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a policy that takes a hundred steps, its file, inputs and the actions that PyTorch takes for them."""
    policy, path = make("states", **SHALLOW), tmp_path_factory.mktemp("onnx") / "policy.onnx"
    policy.noise_scheduler = DDPMScheduler(MANY, **SQUARED)
    export_onnx(path, policy, num_inference_steps=MANY)
    inputs = example(policy, graph := ChunkGraph(policy, MANY))
    with torch.no_grad():
        actions = graph(*in_order(graph, inputs)).numpy()
    fed = {key: value.numpy() for key, value in inputs.items()}
    return {"policy": policy, "path": path, "inputs": fed, "actions": actions}


def test_the_graph_does_not_grow_with_the_steps(of_many_steps: dict[str, Any]) -> None:
    import onnx

    model = onnx.load(of_many_steps["path"])
    (loop,) = (node for node in model.graph.node if node.op_type == "Scan")
    (step,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
    assert len(model.graph.node) + len(step.node) < 8 * MANY  # a step alone has hundreds
    held = sum(math.prod(weights.dims) for graph in (model.graph, step) for weights in graph.initializer)
    weights = sum(weight.numel() for weight in of_many_steps["policy"].parameters())
    assert held < weights + 400 * MANY  # each weight once, and what differs from step to step: embeddings


def test_onnx_runtime_takes_many_steps_the_same(of_many_steps: dict[str, Any]) -> None:
    import onnxruntime

    fed = of_many_steps["inputs"]
    assert fed["noise"].shape == (1, 8, 2)
    assert fed[STEP_NOISE].shape == (MANY - 1, 1, 8, 2)
    (actions,) = onnxruntime.InferenceSession(of_many_steps["path"]).run(["action"], fed)
    np.testing.assert_allclose(actions, of_many_steps["actions"], rtol=1e-4, atol=1e-4)


def test_openvino_takes_many_steps_the_same(of_many_steps: dict[str, Any]) -> None:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(of_many_steps["path"]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (actions,) = compiled(of_many_steps["inputs"]).values()
    np.testing.assert_allclose(actions, of_many_steps["actions"], rtol=1e-3, atol=1e-3)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command in this process: the exit code and what it said."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["getiaction export", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def test_a_run_is_exported_with_another_sampler_and_length(keypoints_run: Path, tmp_path: Path, run: Any) -> None:
    path = tmp_path / "new" / "policy.onnx"
    more = ("--scheduler", "ddim", "--num-inference-steps", "3", "--n-action-steps", "5")
    code, said = run(str(keypoints_run), "--output", str(path), *more)
    assert code == 0, said
    assert "DDIMScheduler, 3 denoising steps" in said
    assert "exporting: 1 of 3 parts" in said  # while it works
    assert "observation.environment_state" in said
    assert "[1, 5, 2]" in said
    assert list(path.parent.iterdir()) == [path]
    assert load_policy(keypoints_run / "checkpoints/last/pretrained_model").num_inference_steps != 3  # left as it was


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--output", "{}/policy.pt"), "must end with .onnx"),
        (
            ("--output", "{}/policy.onnx", "--scheduler", "dpm_solver"),
            "cannot be exported: use --scheduler",
        ),
        (("--output", "{}/policy.onnx", "--scheduler", "euler"), "--scheduler euler is not known: use ddim, ddpm"),
        (("--output", "{}/policy.onnx", "--num-inference-steps", "9999"), "--num-inference-steps=9999 must be between"),
        (("--output", "{}/policy.onnx", "--n-action-steps", "0"), "--n-action-steps=0 must be between 1 and"),
        (("--output", "{}/policy.onnx", "--batch-size", "0"), "--batch-size 0 must be at least 1"),
    ],
)
def test_mistakes_get_one_line_and_no_file(
    keypoints_run: Path, tmp_path: Path, run: Any, arguments: tuple[str, ...], text: str
) -> None:
    code, said = run(str(keypoints_run), *(argument.format(tmp_path) for argument in arguments))
    assert (code, said.count("error:")) == (2, 1)
    assert text in said
    assert not list(tmp_path.glob("**/*"))


@pytest.mark.parametrize("added", [0.01, math.nan])
def test_a_file_that_differs_is_not_kept(
    added: float, export: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is that of a policy which has one weight other than the one that it is compared with, or NaN, too."""
    import onnx

    other = onnx.load(export("states")["path"])
    if math.isnan(added):
        (loop,) = (node for node in other.graph.node if node.op_type == "Scan")
        (step,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
        for weights in [one for one in step.initializer if one.data_type == onnx.TensorProto.FLOAT]:
            nothing = np.full(tuple(weights.dims), math.nan, np.float32)
            weights.CopyFrom(onnx.numpy_helper.from_array(nothing, weights.name))
    monkeypatch.setattr("getiaction.interop.onnx_file.to_onnx", lambda *_: other)
    policy, path = make("states"), tmp_path / "policy.onnx"
    policy.diffusion.unet.final_conv[1].bias.data[0] += added
    path.write_bytes(b"the one before")
    with pytest.raises(InputError, match="was not written: ONNX Runtime and PyTorch differ"):
        export_onnx(path, policy, num_inference_steps=4, batch_size=2)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_to_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getiaction.interop.onnx_file.to_onnx", None)  # not reached
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        export_onnx(tmp_path / "file" / "policy.onnx", make("states"), num_inference_steps=2)


def test_what_no_file_can_hold_is_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getiaction.interop.onnx_file.LARGEST", 1000)
    with pytest.raises(InputError, match="an ONNX file ends at 2 GB"):
        export_onnx(tmp_path / "new" / "policy.onnx", make("states"), num_inference_steps=2)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"onnxruntime is not installed: pip install onnx onnxruntime onnxscript"):
        export_onnx(tmp_path / "policy.onnx", make("states"), num_inference_steps=2)
