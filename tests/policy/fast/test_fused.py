"""The kernels for GPUs compute what PyTorch's layers do; without a GPU, Triton's interpreter runs them."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from interpreting import hurry
from torch import Tensor, nn
from torch.nn import functional

from getiaction.policy import ConditionalUnet1d, ImageEncoder, encoder, unet
from getiaction.policy.fast import casts, convolution, kernels
from getiaction.policy.fast.beside import Beside, using
from getiaction.policy.fast.casts import casts_of, convolved_by, keep_shadows
from getiaction.policy.fast.convolution import Conv1d, Conv2d, ConvTranspose1d, lay_channels_last, use_library

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
DEVICE = "cuda" if ON_GPU else "cpu"
if INTERPRETED:
    hurry()
SMALL: dict[str, Any] = {
    "action_dim": 2,
    "cond_dim": 6,
    "down_dims": (16, 32),
    "n_groups": 2,
    "kernel_size": 3,
    "diffusion_step_embed_dim": 16,
}


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run here")
@pytest.mark.parametrize(("file", "skipped"), [("policy/fast/test_fused.py", 3), ("training/test_adam.py", 2)])
def test_the_kernels_in_the_interpreter(file: str, skipped: int) -> None:
    pytest.importorskip("triton", reason="PyTorch's builds without CUDA have no Triton")
    path = str(Path(__file__).parents[2] / file)
    command = [sys.executable, "-m", "pytest", path, "-v", "-W", "ignore", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f" {skipped} skipped" in done.stdout.splitlines()[-1], done.stdout  # this, and what the compiler is to do


@pytest.mark.skipif(INTERPRETED, reason="there is nothing to compile")
def test_the_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    """The compiler refuses things that the interpreter takes."""
    pytest.importorskip("triton", reason="PyTorch's builds without CUDA have no Triton")
    found = importlib.import_module("getiaction.policy.fast.fused_kernels")
    window = {"KERNEL": 5, "STRIDE": 1, "PADDING": 2, "BLOCK": 1024}
    block = {"STARTS": True, "SCALES": True, "SHIFTS": True, "STEPS": 16, "CHANNELS": 64}
    compile_kernel(found.unfold_kernel, ("x", "out"), window)
    compile_kernel(found.unfold_lines_kernel, ("x", "out"), window | {"WINDOWS": 2})
    for last in (False, True):
        folded = window | {"BIASED": True, "LAST": last, "PLACES": 2 if last else 1}
        compile_kernel(found.fold_kernel, ("windows", "bias", "out"), folded)
    forwards = ("x", "start", "weight", "bias", "scale", "shift", "residual", "out")
    compile_kernel(found.block_kernel, forwards, block | {"ADDS": True})
    backwards = ("x", "start", "weight", "bias", "scale", "gradient", "by_x", "by_affine", "by_scale", "by_shift")
    compile_kernel(found.block_backward_kernel, backwards, block)
    found = importlib.import_module("getiaction.policy.fast.sums")
    compile_kernel(found.sum_kernel, ("x", "out"), {"ROWS": 64, "COLUMNS": 32})
    found = importlib.import_module("getiaction.policy.fast.few_kernel")
    product = {"BIASED": True, "COLUMNS": 2, "BLOCK": 512, "UNROLL": 2}
    compile_kernel(found.few_kernel, ("x", "weight", "bias", "out"), product)
    sides = {"HEIGHT": 3, "WIDTH": 3, "STRIDE_Y": 2, "STRIDE_X": 2, "PADDING_Y": 1, "PADDING_X": 1, "BLOCK": 1024}
    sides |= {"LAST": True}
    compile_kernel(found.unfold_picture_kernel, ("x", "out"), sides)
    found = importlib.import_module("getiaction.policy.fast.fused_group_norm_kernels")
    group = {"ADDS": True, "RECTIFIES": True, "WHOLE": True, "GROUPS": 1, "PLACES": 512, "CHANNELS": 16}
    affine = ("x", "weight", "bias", "out", "statistics")
    backwards = (*affine, "gradient", "beside", "by_x", "by_residual", "by_affine")
    half = {"x": "*bf16", "narrow": "*bf16", "beside": "*bf16", "by_x": "*bf16"}
    for changed in ({}, {"ADDS": False, "WHOLE": False}, {"GROUPS": 16, "PLACES": 16}):
        compile_kernel(found.norm_kernel, (*affine, "residual"), group | changed | {"BRANCHES": True}, **half)
        compile_kernel(found.norm_backward_kernel, backwards, group | changed | {"JOINS": True}, **half)
    found = importlib.import_module("getiaction.policy.fast.fused_pooling_kernels")
    pooling = {"KERNEL": 3, "STRIDE": 2, "PADDING": 1, "PLACES": 128, "CHANNELS": 16}
    others = {**half, "taken": "*i8", "won": "*bf16"}
    compile_kernel(found.pool_kernel, affine, pooling | {"BRANCHES": True}, **others)
    pooling |= {"JOINS": True, "SQUARES": 32}
    for changed in ({}, {"KERNEL": 5, "PADDING": 2}):
        compile_kernel(found.pool_backward_kernel, backwards, pooling | changed, **others)
    found = importlib.import_module("getiaction.policy.fast.fused_batch_norm_kernels")
    rows, half = {"ROWS": 32, "CHANNELS": 64}, {"x": "*bf16", "gradient": "*bf16", "beside": "*bf16", "by_x": "*bf16"}
    compile_kernel(found.measure_kernel, ("means", "squares"), rows, **half)
    running = {"batches": "*i64", "momentum": "fp32"}
    joined = ("means", "squares", "statistics", "running_mean", "running_var")
    compile_kernel(found.finish_kernel, joined, {"SPLITS": 512, "CHANNELS": 16}, **running)
    more = {"ADDS": True, "RECTIFIES": True, "JOINS": True}
    affine = ("weight", "bias", "residual", "out", "statistics", "by_residual", "parts", "sums")
    for kernel, taken in (
        (found.normalise_kernel, ("ADDS", "RECTIFIES")),
        (found.sum_gradients_kernel, ("ADDS", "RECTIFIES", "JOINS")),
        (found.gradient_kernel, ("RECTIFIES", "JOINS")),
    ):
        compile_kernel(kernel, affine, rows | {name: more[name] for name in taken}, **half)
    found = importlib.import_module("getiaction.policy.fast.fused_stem_kernels")
    found_crop = importlib.import_module("getiaction.policy.fast.fused_crop")
    places = {"frames": "*u8", "rows": "*i64", "corners": "*i64", "out": "*u8"}
    compile_kernel(found_crop.crop_kernel, (), {"LINES": 8, "WIDTH": 256}, **places)
    folding = {"RANGED": True, "PER_COLOUR": True, "COLOURS": 3, "DEPTH": 16, "PADDING": 3, "PLACES": 64, "HELD": 16}
    ranges = ("shift", "scale", "offset")
    compile_kernel(found.space_to_depth_kernel, ranges, folding, x="*u8", out="*bf16", factor="fp32")
    convolving = {"TAPS": 4, "DEPTH": 16, "WIDTH": 64, "PLACES": 128}
    compile_kernel(found.stem_kernel, (), convolving, **dict.fromkeys(("x", "weight", "out"), "*bf16"))
    compile_kernel(found.stem_backward_kernel, ("by_weight",), convolving, x="*bf16", gradient="*bf16")


def compile_kernel(kernel: Any, tensors: Sequence[str], constants: dict[str, Any], **others: str) -> None:
    """Compile for Hopper, with float32 tensors, and others of other types."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(tensors, "*fp32") | {"eps": "fp32"} | others
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    assert compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, without_tf32: None) -> ModuleType:
    """Return the kernels for pictures, and let encoders use them."""
    if not (ON_GPU or INTERPRETED):
        pytest.skip("see test_the_kernels_in_the_interpreter")
    found = importlib.import_module("getiaction.policy.fast.fused_pictures")

    def find(backbone: Any, x: Tensor) -> ModuleType | None:
        return None if getattr(backbone, "by_library", False) else found

    if INTERPRETED:
        monkeypatch.setattr(encoder, "picture_kernels_for", find)
        monkeypatch.setattr(convolution, "learns_under_autocast", lambda *_: torch.is_autocast_enabled("cpu"))
        stem = importlib.import_module("getiaction.policy.fast.fused_stem")
        fits = stem.fits_products  # the interpreter cannot multiply bf16
        monkeypatch.setattr(stem, "fits_products", lambda turned: turned.dtype != torch.bfloat16 and fits(turned))
        monkeypatch.setattr(stem, "find_products", lambda: stem)
    return found


@pytest.fixture
def groups(pictures: ModuleType) -> ModuleType:
    found: ModuleType = pictures.fused_group_norm
    return found


@pytest.fixture
def batches(pictures: ModuleType) -> ModuleType:
    found: ModuleType = pictures.fused_batch_norm
    return found


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch, without_tf32: None) -> ModuleType:
    """Return the kernels, and let every layer use them."""
    if not (ON_GPU or INTERPRETED):
        pytest.skip("see test_the_kernels_in_the_interpreter")
    found = importlib.import_module("getiaction.policy.fast.fused")

    def find(layer: Any, x: Tensor) -> ModuleType | None:
        return None if layer.by_library or x.ndim != 3 else found

    if INTERPRETED:
        monkeypatch.setattr(convolution, "kernels_for", find)
        for finder in ("block_kernels_for", "film_kernels_for"):
            monkeypatch.setattr(unet, finder, find)
    return found


def drawn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE).requires_grad_(grad)


def gradients(result: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a weighted sum of a result."""
    return torch.autograd.grad((result.float() * drawn(*result.shape, grad=False)).sum(), inputs)


def is_rounded(x: Tensor, narrow: Tensor) -> bool:
    """Tell whether these are the same numbers, rounded; Triton's interpreter cuts off instead."""
    return torch.equal(x.to(narrow.dtype), narrow) if ON_GPU else torch.allclose(x, narrow.float(), rtol=2**-7)


def check(found: Tensor, wanted: Tensor, inputs: Sequence[Tensor], close: float = 1e-5) -> None:
    """Compare two results, and their gradients, relative to the largest number."""
    pairs = zip((found, *gradients(found, inputs)), (wanted, *gradients(wanted, inputs)), strict=True)
    for number, (one, other) in enumerate(pairs):
        assert one.shape == other.shape
        apart = float((one - other).detach().abs().max() / other.detach().abs().max())
        assert apart < close, f"number {number} is {apart:.1e} apart"


@pytest.mark.parametrize(
    ("rows", "channels", "out", "steps", "kernel", "stride"),
    [(2, 8, 16, 8, 5, 1), (3, 5, 7, 6, 3, 2), (2, 4, 6, 4, 1, 1), (1, 300, 20, 16, 5, 1), (1, 4, 4, 1, 3, 1)],
)
@pytest.mark.parametrize("last", [False, True])
def test_convolutions(
    fused: ModuleType, rows: int, channels: int, out: int, steps: int, kernel: int, stride: int, last: bool
) -> None:
    layer = nn.Conv1d(channels, out, kernel, stride, kernel // 2).to(DEVICE)
    if last:
        lay_channels_last(layer)
    x = drawn(rows, channels, steps)
    check(fused.convolve(layer, x), layer(x), [x, *layer.parameters()])
    lying = drawn(rows, steps, channels)
    turned = lying.transpose(1, 2)
    check(fused.convolve(layer, turned), layer(turned), [lying, *layer.parameters()])


@pytest.mark.parametrize(
    ("rows", "columns", "width", "turned"),
    [
        (4, 6, 40, False),
        (7, 9, 1100, False),
        (1, 5, 130, True),
        (20, 3, 300, False),
        (140, 3, 21, False),
        (0, 3, 8, False),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_products_of_few_rows(
    fused: ModuleType, rows: int, columns: int, width: int, turned: bool, biased: bool
) -> None:
    few, x, bias = fused.few, drawn(rows, width, grad=False), drawn(columns, grad=False) if biased else None
    weight = drawn(width, columns, grad=False).t() if turned else drawn(columns, width, grad=False)
    assert few.takes(rows, weight) == (rows > 0)
    if rows:
        wanted = (x.double() @ weight.double().t() + (0 if bias is None else bias)).float()
        lying = x.t().contiguous().t()
        for given in (x, lying):
            assert torch.allclose(few.multiply(given, weight, bias), wanted, rtol=1e-5, atol=1e-5 * width**0.5)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["along time", "along time, last", "of pictures", "of pictures, channels last", "of pictures, 1x1"]
)
def test_convolutions_of_few_places(
    fused: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, precision: torch.dtype | None
) -> None:
    layer: nn.Module
    if "time" in kind:
        layer, plain, x = Conv1d(40, 9, 5, 2, 2), nn.Conv1d.forward, drawn(2, 40, 8)
        monkeypatch.setattr(fused, "_Convolution", None)  # the other kernels
    else:
        sizes = (1, 1, 0) if "1x1" in kind else (3, 2, 1)
        layer, plain, x = Conv2d(5, 6, *sizes), nn.Conv2d.forward, drawn(2, 5, 9, 7).transpose(2, 3)
    layer.to(DEVICE, memory_format=torch.channels_last if "channels last" in kind else torch.preserve_format)  # type: ignore[call-overload]
    if "time, last" in kind:
        lay_channels_last(layer)
    wanted = plain(layer, x)
    with torch.no_grad(), torch.autocast(DEVICE, precision, enabled=precision is not None):
        found = fused.convolve(layer, x) if "time" in kind else fused.few.convolve_picture(layer, x)
    assert found.dtype == (precision or torch.float32)
    assert torch.allclose(found.float(), wanted, atol=1e-5 if precision is None else 5e-2)


def test_who_learns_is_left_to_the_other_kernels(fused: ModuleType) -> None:
    few, layer, x = fused.few, Conv2d(3, 4, 3).to(DEVICE), drawn(1, 3, 8, 8, grad=False)
    assert not few.takes_picture(layer, x)
    with torch.no_grad():
        assert few.takes_picture(layer, x)
        assert not few.takes(2**20, layer.weight.expand(64, 4, 3, 3, 3))
    layer.requires_grad_(False)
    assert few.takes_picture(layer, x)
    assert not few.takes_picture(layer, x[:, :, :2, :2])  # for which PyTorch has an error
    assert not few.takes_picture(layer, x.requires_grad_())


def test_what_the_kernels_leave_to_pytorch(fused: ModuleType) -> None:
    x = drawn(2, 4, 8)
    for layer in (ConvTranspose1d(4, 6, 4, 2, 1, output_padding=1), ConvTranspose1d(4, 6, 4, 2, 1, bias=False)):
        assert torch.allclose(layer.to(DEVICE)(x), nn.ConvTranspose1d.forward(layer, x), atol=1e-5)


def test_convolutions_without_a_bias(fused: ModuleType) -> None:
    layer, x = nn.Conv1d(4, 6, 3, padding=1, bias=False).to(DEVICE), drawn(2, 4, 8)
    check(fused.convolve(layer, x), layer(x), [x, layer.weight])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("rows", "channels", "steps"), [(2, 8, 4), (1, 300, 8)])
def test_transposed_convolutions(fused: ModuleType, rows: int, channels: int, steps: int, last: bool) -> None:
    layer, x = nn.ConvTranspose1d(channels, 6, 4, 2, 1).to(DEVICE), drawn(rows, channels, steps)
    if last:
        lay_channels_last(layer)
    check(fused.convolve_transposed(layer, x), layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize(("rows", "channels", "steps"), [(1, 64, 4), (2, 24, 5), (1, 32, 1)])
@pytest.mark.parametrize(
    ("with_film", "with_residual", "biased"), [(0, False, True), (1, False, True), (2, False, False), (2, True, True)]
)
def test_what_follows_a_convolution(
    fused: ModuleType, rows: int, channels: int, steps: int, with_film: int, with_residual: bool, biased: bool
) -> None:
    norm, x = nn.GroupNorm(8, channels).to(DEVICE), drawn(rows, 4, steps)
    layer = Conv1d(4, channels, 3, padding=1, bias=biased).to(DEVICE)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    film = drawn(rows, with_film * channels) if with_film else None
    residual = drawn(rows, channels, steps) if with_residual else None
    wanted = functional.mish(norm(nn.Conv1d.forward(layer, x)))
    if film is not None:
        parts = film[:, :, None].chunk(with_film, dim=1)
        wanted = wanted * parts[0] + parts[1] if with_film == 2 else wanted + parts[0]
    wanted = wanted if residual is None else wanted + residual
    inputs = [one for one in (x, film, residual, *norm.parameters(), *layer.parameters()) if one is not None]
    check(fused.convolve_and_normalise(layer, norm, x, film, residual), wanted, inputs, 2e-5)


def test_mish_far_from_zero(fused: ModuleType) -> None:
    norm, layer, x = nn.GroupNorm(1, 1).to(DEVICE), Conv1d(1, 1, 1).to(DEVICE), drawn(1, 1, 16)
    nn.init.constant_(norm.weight, 300.0)
    found = fused.convolve_and_normalise(layer, norm, x)
    assert found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(found, [x, *norm.parameters()]))
    wanted = functional.mish(norm(nn.Conv1d.forward(layer, x)))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_hooks_are_called(fused: ModuleType) -> None:
    called: list[int] = []
    block = unet.ConvBlock(4, 16, kernel_size=3, n_groups=8).to(DEVICE)
    wanted = block(drawn(2, 4, 8))
    block.block[1].register_forward_hook(lambda *_: called.append(1))
    assert torch.allclose(block(drawn(2, 4, 8)), wanted, atol=1e-5)
    assert called


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_films_as_one_product(fused: ModuleType, precision: torch.dtype | None) -> None:
    layers, cond = nn.ModuleList(nn.Linear(6, size) for size in (8, 4, 12)).to(DEVICE), drawn(3, 6)
    with torch.autocast(DEVICE, precision, enabled=precision is not None):
        found = fused.films(layers, cond)
    assert [one.shape for one in found] == [(3, 8), (3, 4), (3, 12)]
    weights = list(layers.parameters())
    wanted = torch.cat([layer(cond) for layer in layers], dim=1)
    check(torch.cat(found, dim=1), wanted, [cond, *weights], 1e-5 if precision is None else 2e-2)
    sum(one.float().sum() for one in fused.films(layers, cond)).backward()
    assert all(weight.grad.is_contiguous() and weight.grad.dtype == torch.float32 for weight in weights)


def test_who_listens_to_a_film_layer_is_called(fused: ModuleType) -> None:
    network = ConditionalUnet1d(**SMALL).to(DEVICE)
    inputs, called = (drawn(1, 4, 2), torch.tensor([5], device=DEVICE), drawn(1, 6)), []
    wanted = network(*inputs)
    network.mid_modules[0].cond_encoder[1].register_forward_hook(lambda *_: called.append(1))
    assert torch.allclose(network(*inputs), wanted, atol=1e-5)
    assert called


def test_a_block_of_somebodys_own_is_called(fused: ModuleType) -> None:
    class Doubled(unet.ResidualBlock):
        def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x, cond)

    network = ConditionalUnet1d(**SMALL).to(DEVICE)
    inputs = drawn(1, 4, 2), torch.tensor([5], device=DEVICE), drawn(1, 6)
    plain = network(*inputs)
    network.mid_modules[0].__class__ = Doubled
    assert not torch.allclose(network(*inputs), plain, atol=1e-3)


def test_weights_that_are_cast_together(fused: ModuleType) -> None:
    network = nn.Sequential(Conv2d(3, 5, 3), Conv1d(4, 6, 3), nn.Linear(3, 3), Conv1d(4, 6, 1)).to(DEVICE)
    network[0].to(memory_format=torch.channels_last)
    network[3].by_library = True
    weights = convolved_by(network)
    assert [id(one) for one in weights] == [id(one) for layer in network[:2] for one in layer.parameters()]
    made = casts_of(network, torch.bfloat16)
    for weight in weights:
        kept, narrow = made[id(weight), torch.bfloat16]
        assert kept is weight
        assert torch.equal(narrow, weight.bfloat16())
        assert narrow.stride() == weight.stride()
        assert narrow.data_ptr() % 16 == 0
    assert casts_of(network, torch.float32) == {}


def test_a_step_casts_its_weights_ahead(fused: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found as long as the step lasts, and only with gradients: who acts keeps casts of its own."""
    layer, gpu = Conv1d(4, 6, 3).to(DEVICE), torch.device("cuda")
    if INTERPRETED:
        monkeypatch.setattr(casts, "find_kernels", lambda: fused)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: torch.bfloat16)

    def twice() -> list[Tensor]:
        return [casts.cast(layer.weight, torch.bfloat16) for _ in range(2)]

    def are_one(made: list[Tensor]) -> bool:
        assert all(torch.equal(one, layer.weight.detach().bfloat16()) for one in made)
        return made[0].data_ptr() == made[1].data_ptr()

    with torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU):
        with casts.cast_ahead(layer, gpu):
            assert are_one(twice())
        assert not are_one(twice())
        with torch.no_grad(), casts.cast_ahead(layer, gpu):
            assert not are_one(twice())
        shadows = keep_shadows(layer, torch.bfloat16)
        for _ in range(2):
            with casts.cast_ahead(layer, gpu):
                made = twice()
                assert are_one(made)
                assert made[0] is shadows.of[layer.weight]
            with torch.no_grad():
                layer.weight.add_(1.0)
        del shadows, made
        assert casts.shadows_of(layer) is None


@pytest.mark.parametrize(("scales", "precision"), [(True, torch.bfloat16), (False, None)])
def test_a_whole_network(fused: ModuleType, scales: bool, precision: torch.dtype | None) -> None:
    torch.manual_seed(0)
    network = ConditionalUnet1d(**SMALL, use_film_scale_modulation=scales).to(DEVICE)
    noisy, cond = drawn(1, 4, 2), drawn(1, 6)
    times = torch.tensor([50], device=DEVICE)
    inputs = [noisy, cond, *network.parameters()]

    def run(precision: torch.dtype | None) -> list[Tensor]:
        with torch.autocast(DEVICE, precision, enabled=precision is not None):
            result = network(noisy, times, cond)
        return [result.detach().float(), *gradients(result, inputs)]

    found = run(precision)
    with torch.no_grad(), torch.autocast(DEVICE, precision, enabled=precision is not None):
        acting = network(noisy, times, cond).float()
    use_library(network)
    exact, by_library = run(None), run(precision)
    assert float((acting - exact[0]).norm()) < (1e-4 if precision is None else 5e-2) * float(exact[0].norm())
    if precision is None:
        for number, (one, right) in enumerate(zip(found, exact, strict=True)):
            assert float((one - right).norm() / right.norm()) < 1e-4, number
    else:  # as far from float32 as PyTorch's own, over all gradients
        joined = [torch.cat([part.flatten() for part in parts[1:]]) for parts in (found, by_library, exact)]
        assert 0 < float((joined[0] - joined[2]).norm()) < 2 * float((joined[1] - joined[2]).norm())
        assert float((found[0] - exact[0]).norm()) < 4 * float((by_library[0] - exact[0]).norm())  # of eight numbers


def test_gradients_of_weights_may_stay_in_two_bytes(fused: ModuleType) -> None:
    """For who takes them so: the same products, not made into four, of all that is convolved."""
    torch.manual_seed(0)
    network = ConditionalUnet1d(**SMALL).to(DEVICE)
    given = drawn(1, 4, 2, grad=False), torch.tensor([50], device=DEVICE), drawn(1, 6, grad=False)
    found = []
    for own in (Beside(torch.device(DEVICE), narrow=True), Beside(torch.device(DEVICE))):
        for weight in network.parameters():
            weight.grad, weight.grad_dtype = None, None
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = network(*given).float().sum()
        with using(own):
            loss.backward()
        found.append({name: weight.grad for name, weight in network.named_parameters()})
    narrow, wide = found
    films = [name for name in narrow if "cond_encoder" in name]
    halved = {name for name, gradient in narrow.items() if gradient.dtype == torch.bfloat16}
    assert halved == {
        name for name, gradient in wide.items() if gradient.ndim == 3 or (name in films and gradient.ndim == 2)
    }
    for name, gradient in narrow.items():
        assert wide[name].dtype == torch.float32
        assert (gradient.float() - wide[name]).norm() <= 2**-8 * wide[name].norm(), name


def test_large_groups_are_left_to_pytorch(fused: ModuleType) -> None:
    assert fused.takes(nn.GroupNorm(8, 2048), 16)
    assert not fused.takes(nn.GroupNorm(1, 2048), 16)
    assert not fused.takes(nn.GroupNorm(8, 64, affine=False), 16)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "count", "height", "width"),
    [
        (2, 32, 2, 5, 4),
        (1, 16, 1, 20, 15),
        (2, 24, 2, 3, 3),
        (1, 32, 2, 1, 1),
        (1, 4, 1, 40, 31),
        (1, 24, 1, 20, 15),  # more than a program holds
    ],
)
def test_what_follows_a_convolution_of_pictures(
    groups: ModuleType, rows: int, channels: int, count: int, height: int, width: int, adds: bool, rectify: bool
) -> None:
    norm = nn.GroupNorm(count, channels).to(DEVICE)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, residual = drawn(rows, channels, height, width), drawn(rows, channels, height, width + 1)[..., 1:]
    far = (x + 100).contiguous(memory_format=torch.channels_last)  # where a sum of squares alone would lose digits
    exact = functional.group_norm(far.double(), count, norm.weight.double(), norm.bias.double(), norm.eps)
    wanted = exact + residual if adds else exact
    inputs = [x, *norm.parameters()]
    found = groups.normalise(norm, far, residual=residual if adds else None, rectify=rectify)
    assert found.is_contiguous(memory_format=torch.channels_last)
    check(found, functional.relu(wanted) if rectify else wanted, inputs, 1e-4)


@pytest.mark.parametrize(
    ("places", "size", "count", "held", "together"),
    [
        (9, 16, 32, 256, 16),
        (36, 16, 16, 1024, 4),
        (121, 16, 8, 2048, 2),
        (441, 16, 4, 8192, 1),
        (9, 16, 6, 256, 2),
        (9, 16, 7, 256, 1),
        (9, 10, 4, 256, 4),
        (1764, 16, 4, 8192, 1),
    ],
)
def test_small_groups_are_held_together(
    groups: ModuleType, monkeypatch: pytest.MonkeyPatch, places: int, size: int, count: int, held: int, together: int
) -> None:
    monkeypatch.setattr(groups, "TOGETHER", 4096)
    found = groups.tile(places, size, count)
    assert (found["GROUPS"], found["PLACES"] * found["CHANNELS"]) == (together, held)
    assert found["num_warps"] == max(1, min(8, held * together // 1024))
    monkeypatch.setattr(groups, "TOGETHER", 0)
    assert groups.tile(places, size, count)["GROUPS"] == 1


@pytest.mark.parametrize(("size", "side", "together"), [(4, 3, 128), (4, 3, 4096), (3, 5, 512), (16, 1, 64)])
@pytest.mark.parametrize("adds", [False, True])
def test_norms_of_several_groups_at_a_time(
    groups: ModuleType, monkeypatch: pytest.MonkeyPatch, size: int, side: int, together: int, adds: bool
) -> None:
    """They are what they are one at a time; and what is no number stays in its group and picture."""
    norm, x = nn.GroupNorm(4, 4 * size).to(DEVICE), drawn(2, 4 * size, side, side + 1, grad=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    residual = drawn(2, 4 * size, side + 1, side + 1, grad=False)[:, :, 1:].requires_grad_()
    x[1, size, 0, 0] = float("nan")

    def run(together: int) -> list[Tensor]:
        monkeypatch.setattr(groups, "TOGETHER", together)
        lying = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        if not adds:
            found = groups.normalise_between(norm, lying)
            return [found, *gradients(found, [lying, *norm.parameters()])]
        kept, seen = groups.branch(norm, lying, residual)
        return [kept, *gradients(kept + 2 * seen, [lying, residual, *norm.parameters()])]

    alone, found = run(0), run(together)
    assert groups.tile(side * (side + 1), size, 4)["GROUPS"] > 1
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        gaps = (one - other).detach().nan_to_num().abs()
        assert float(gaps.max()) < 1e-5 * float(other.detach().nan_to_num().abs().max())
    for one in found[:2]:  # what came out, and x's gradient
        assert not one[0].isnan().any()
        assert not one[1, :size].isnan().any()
        assert one[1, size : 2 * size].isnan().any()
        assert not one[1, 2 * size :].isnan().any()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 2, 0), (5, 3, 2)])
def test_max_pooling(groups: ModuleType, kernel: int, stride: int, padding: int) -> None:
    norm, layer = nn.GroupNorm(2, 10).to(DEVICE), nn.MaxPool2d(kernel, stride, padding)
    nn.init.normal_(norm.weight)  # some below zero
    nn.init.normal_(norm.bias)
    lying = drawn(2, 10, 9, 6, grad=False).contiguous(memory_format=torch.channels_last).requires_grad_()
    kept, seen = groups.normalise_and_pool(norm, layer, lying)
    assert "NormAndPool" in kept.grad_fn.name()
    assert torch.equal(kept, seen)
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in (kept, seen))
    wanted = layer(functional.relu(norm(lying)))
    check(kept + 2 * seen, 3 * wanted, [lying, *norm.parameters()])
    alone = groups.normalise_and_pool(norm, layer, lying)[1]  # the other has no gradient
    check(alone, layer(functional.relu(norm(lying))), [lying])
    unknown = lying.detach().clone()
    unknown[0, 0, 4, 3] = float("nan")
    found, right = groups.normalise_and_pool(norm, layer, unknown)[0], layer(functional.relu(norm(unknown)))
    assert torch.equal(found.isnan(), right.isnan())
    assert found.isnan().any()


@pytest.mark.parametrize(("lines", "columns"), [(9, 6), (8, 7), (1, 5), (2, 2), (19, 17)])
def test_max_pooling_of_odd_sides(groups: ModuleType, lines: int, columns: int) -> None:
    """Four numbers get their gradient together; the first of the results may have one alone."""
    norm, layer = nn.GroupNorm(2, 10).to(DEVICE), nn.MaxPool2d(3, 2, 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    lying = drawn(2, 10, lines, columns, grad=False).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = [lying, *norm.parameters()]
    for second in (2, 0):
        kept, seen = groups.normalise_and_pool(norm, layer, lying)
        found = kept + second * seen if second else kept
        check(found, (1 + second) * layer(functional.relu(norm(lying))), inputs)


def test_max_pooling_where_weights_are_zero(groups: ModuleType) -> None:
    """All are equal then, and the first is taken."""
    norm, layer = nn.GroupNorm(1, 4).to(DEVICE), nn.MaxPool2d(3, 2, 1)
    norm.weight.data[:] = torch.tensor([1.0, 0.0, -1.0, 0.0])
    nn.init.constant_(norm.bias, 0.5)
    lying = drawn(2, 4, 7, 7, grad=False).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = groups.normalise_and_pool(norm, layer, lying)[0]
    check(found, layer(functional.relu(norm(lying))), [lying, *norm.parameters()])


def test_norms_far_from_zero(groups: ModuleType) -> None:
    """Where the first block is not like the others, too; and where all are equal, which has no spread."""
    norm, layer = nn.GroupNorm(1, 16).to(DEVICE), nn.MaxPool2d(3, 2, 1)
    x = drawn(1, 16, 30, 30)
    shift = torch.where(torch.arange(30, device=DEVICE) < 5, 0.0, 5.0)[:, None]
    far = (x + shift + 1000).contiguous(memory_format=torch.channels_last)
    exact = functional.relu(functional.group_norm(far.double(), 1, norm.weight.double(), norm.bias.double()))
    check(groups.normalise(norm, far, rectify=True), exact, [x, *norm.parameters()], 1e-4)
    far = (x + shift + 1000).contiguous(memory_format=torch.channels_last)
    exact = functional.relu(functional.group_norm(far.double(), 1, norm.weight.double(), norm.bias.double()))
    check(groups.normalise_and_pool(norm, layer, far)[0], layer(exact), [x, *norm.parameters()], 1e-4)
    same = torch.full((1, 16, 30, 30), 1.1e7, device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert groups.normalise(norm, same).isfinite().all()


def test_max_pooling_under_autocast(groups: ModuleType) -> None:
    norm, layer = nn.GroupNorm(1, 16).to(DEVICE), nn.MaxPool2d(3, 2, 1)
    x = drawn(2, 16, 16, 16)  # more than a program holds
    lying = x.bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast(DEVICE, torch.bfloat16):
        kept, seen = groups.normalise_and_pool(norm, layer, lying)
    assert (kept.dtype, seen.dtype) == (torch.float32, torch.bfloat16)
    assert is_rounded(kept, seen)
    exact = layer(functional.relu(norm(lying.float())))
    assert torch.allclose(kept, exact, atol=1e-5)
    check(kept + seen, 2 * exact, [x, norm.weight], 1e-2)


def test_other_poolings_are_left_to_pytorch(groups: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_NormAndPool", None)
    norm, x = nn.GroupNorm(2, 4).to(DEVICE), drawn(1, 4, 8, 8)
    lying = x.contiguous(memory_format=torch.channels_last)
    layers = (nn.MaxPool2d(3, dilation=2), nn.MaxPool2d((3, 2)), nn.MaxPool2d(3, 2, ceil_mode=True))
    for given, layer in ((x, nn.MaxPool2d(3, 2, 1)), *((lying, layer) for layer in layers)):
        found = groups.normalise_and_pool(norm, layer, given)[1]
        assert torch.allclose(found, layer(functional.relu(norm(given))), atol=1e-6)


@pytest.mark.parametrize(("colours", "side", "padding"), [(3, 7, 3), (1, 3, 0), (4, 4, 1), (2, 5, 2)])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_first_convolution(
    pictures: ModuleType, colours: int, side: int, padding: int, precision: torch.dtype | None
) -> None:
    layer = Conv2d(colours, 8, side, 2, padding, bias=False).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = drawn(2, colours, 11, 14, grad=False)
    with torch.autocast(DEVICE, precision, enabled=precision is not None):
        found = pictures.convolve_first(layer, x)
    assert "Stem" in found.grad_fn.name()
    assert found.dtype == (precision or torch.float32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    check(found, nn.Conv2d.forward(layer, x), [layer.weight], 1e-5 if precision is None else 2e-2)
    pictures.convolve_first(layer, x.transpose(2, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize(("side", "padding", "width"), [(7, 3, 16), (8, 0, 16)])
def test_the_first_convolution_in_two_bytes(
    pictures: ModuleType, monkeypatch: pytest.MonkeyPatch, side: int, padding: int, width: int
) -> None:
    """By products of its own, in several programs, of which the last has less to do; sums are float32."""
    stem = importlib.import_module("getiaction.policy.fast.fused_stem")
    monkeypatch.setattr(stem, "PLACES", 16)
    monkeypatch.setattr(stem, "SPLITS", 3)
    layer = Conv2d(3, width, side, 2, padding, bias=False).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = drawn(2, 3, 12, 13, grad=False)
    with torch.autocast(DEVICE, torch.bfloat16 if ON_GPU else torch.float16):
        found = pictures.convolve_first(layer, x)
    exact = nn.Conv2d.forward(layer, x)
    weights = drawn(*exact.shape, grad=False).contiguous(memory_format=torch.channels_last)
    [theirs] = torch.autograd.grad((exact * weights).sum(), [layer.weight])
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", None)
    [ours] = torch.autograd.grad((found.float() * weights).sum(), [layer.weight])
    assert float((found - exact).detach().norm()) < 1e-2 * float(exact.detach().norm())
    assert float((ours - theirs).norm()) < 1e-2 * float(theirs.norm())
    assert ours.stride() == layer.weight.stride()


def test_products_that_compute_something_else_are_noticed(pictures: ModuleType) -> None:
    stem, dtype = importlib.import_module("getiaction.policy.fast.fused_stem"), torch.bfloat16
    dtype = dtype if ON_GPU else torch.float16
    kernels.compare_products(stem, torch.device(DEVICE), dtype)  # as at the first use
    for name in ("convolve", "weight_gradient"):
        right = getattr(stem, name)
        wrong = SimpleNamespace(**vars(stem) | {name: lambda *given, right=right: right(*given) * 1.1})
        with pytest.raises(ArithmeticError):
            kernels.compare_products(wrong, torch.device(DEVICE), dtype)


@pytest.mark.parametrize("kind", ["each", "all", "none"])
@pytest.mark.parametrize("fits", [True, False])
def test_recorded_pictures_are_normalised_on_the_way(pictures: ModuleType, kind: str, fits: bool) -> None:
    layer = Conv2d(3, 8, 3, 2 if fits else 1, 1, bias=False).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recorded = torch.randint(0, 256, (2, 7, 9, 3), dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)
    each = tuple(torch.rand(3 if kind == "each" else 1, 1, 1, device=DEVICE) + number for number in range(3))
    ranges = None if kind == "none" else each
    found = pictures.convolve_first(layer, recorded, ranges)
    assert ("Stem" in found.grad_fn.name()) is fits
    wanted = recorded.float() / 255
    wanted = wanted if ranges is None else (wanted - ranges[0]) * ranges[1] + ranges[2]
    check(found, nn.Conv2d.forward(layer, wanted), [layer.weight])


@pytest.mark.parametrize("shape", [(5, 6), (9, 13), (1, 1), (9, 2)])
def test_recorded_pictures_are_cropped(fused: ModuleType, shape: tuple[int, int]) -> None:
    from getiaction.data.gather import crop_on_host
    from getiaction.policy.fast.fused_crop import crop

    torch.manual_seed(0)
    frames = torch.randint(0, 256, (11, 9, 13, 3), dtype=torch.uint8)
    rows = torch.randint(11, (4, 2))
    corners = torch.stack([torch.randint(9 - shape[0] + 1, (4,)), torch.randint(13 - shape[1] + 1, (4,))], dim=1)
    found = crop(frames.to(DEVICE), rows.to(DEVICE), corners.to(DEVICE), shape).cpu()
    assert np.array_equal(found.numpy(), crop_on_host(frames.numpy(), rows.numpy(), corners.numpy(), shape))


def test_other_first_convolutions_are_left_to_pytorch(pictures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getiaction.policy.fast.fused_stem._Stem", None)
    sizes = ((3, 1, 1), ((3, 5), 2, 1), (3, 2, (1, 0)), (3, (2, 1), 1))
    for layer in (*(Conv2d(3, 4, *one, bias=False) for one in sizes), Conv2d(3, 4, 3, 2, 1), Conv2d(6, 4, 3, 2)):
        x = drawn(1, layer.in_channels, 8, 8, grad=False)
        assert pictures.convolve_first(layer.to(DEVICE), x).shape == layer(x).shape
    layer, x = Conv2d(3, 4, 3, 2, 1, bias=False).to(DEVICE), drawn(1, 3, 8, 8)
    check(pictures.convolve_first(layer, x), nn.Conv2d.forward(layer, x), [x, layer.weight])
    with torch.no_grad():
        pictures.convolve_first(layer, x)


@pytest.mark.parametrize(("side", "precision"), [(6, None), (24, None), (6, torch.bfloat16)])
def test_what_goes_two_ways(groups: ModuleType, side: int, precision: torch.dtype | None) -> None:
    norm, x, residual = nn.GroupNorm(1, 24).to(DEVICE), drawn(2, 24, side, side), drawn(2, 24, side, side)
    lying = x.to(precision or torch.float32).contiguous(memory_format=torch.channels_last)
    for first, second, inputs in ((1, 2, [x, residual, *norm.parameters()]), (1, 0, [x, residual])):
        with torch.autocast(DEVICE, precision, enabled=precision is not None):
            kept, seen = groups.branch(norm, lying, residual)
        assert (kept.dtype, seen.dtype) == (torch.float32, precision or torch.float32)
        assert is_rounded(kept, seen)
        wanted = (first + second) * functional.relu(norm(x.to(lying.dtype).float()) + residual)
        found = first * kept + second * seen if second else kept
        check(found, wanted, inputs, 1e-5 if precision is None else 1e-2)
        lying = x.to(lying.dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("first", [1, 0])
@pytest.mark.parametrize(("last", "precision"), [(True, None), (True, torch.bfloat16), (False, torch.bfloat16)])
def test_what_goes_into_two_convolutions(
    groups: ModuleType, batches: ModuleType, last: bool, precision: torch.dtype | None, first: int
) -> None:
    for norms, norm in ((groups, nn.GroupNorm(1, 8).to(DEVICE)), (batches, nn.BatchNorm2d(8).to(DEVICE))):
        x, residual = drawn(2, 8, 5, 4), drawn(2, 8, 5, 4)
        lying = x.to(precision or torch.float32)
        lying = lying.contiguous(memory_format=torch.channels_last) if last else lying
        with torch.autocast(DEVICE, precision, enabled=precision is not None):
            one, other = norms.branch(norm, lying, residual, narrow=True)
        assert one.dtype == other.dtype == (precision or torch.float32)
        assert torch.equal(one, other)
        exact = (first + 2) * functional.relu(norm(x.to(lying.dtype).float()) + residual)
        found = first * one.float() + 2 * other.float() if first else 2 * other.float()
        check(found, exact, [x, residual, *norm.parameters()], 1e-5 if precision is None else 2e-2)


def test_what_is_only_convolved_is_written_narrow(pictures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is so before a block whose addition is of a convolution; the last result of all is float32."""
    network = ImageEncoder((3, 36, 36)).backbone[:6].to(DEVICE, memory_format=torch.channels_last)
    made, branch = [], pictures.fused_group_norm.branch
    keep = lambda *given, **more: made.append(branch(*given, **more)) or made[-1]  # noqa: E731
    monkeypatch.setattr(pictures.fused_group_norm, "branch", keep)
    with torch.autocast(DEVICE, torch.bfloat16):
        pictures.run(network, drawn(1, 3, 12, 12, grad=False))
    wide, narrow = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)
    assert [(kept.dtype, seen.dtype) for kept, seen in made] == [wide, narrow, wide, wide]


@pytest.mark.parametrize(("count", "rows", "columns"), [(3, 64, 40), (1, 700, 20), (2, 1, 5)])
def test_sums_over_rows(fused: ModuleType, count: int, rows: int, columns: int) -> None:
    tables = drawn(count, rows, columns, grad=False)
    assert torch.allclose(fused.add_rows(tables, torch.float32), tables.sum(1), atol=1e-4)
    half = fused.add_rows(tables.bfloat16(), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), tables.bfloat16().float().sum(1), rtol=1e-2, atol=1e-2)


def test_the_gradient_of_what_is_added(groups: ModuleType) -> None:
    norm, x, residual = nn.GroupNorm(2, 8).to(DEVICE), drawn(2, 8, 4, 4), drawn(2, 8, 4, 5)[..., :4]
    lying = x.contiguous(memory_format=torch.channels_last)
    found = groups.normalise(norm, lying, residual=residual, rectify=True)
    check(found, functional.relu(norm(x) + residual), [residual, x])


def test_channels_that_lie_first_are_left_to_pytorch(groups: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_Norm", None)
    norm, x = nn.GroupNorm(2, 8).to(DEVICE), drawn(2, 8, 4, 4)
    check(groups.normalise(norm, x, residual=2 * x, rectify=True), functional.relu(norm(x) + 2 * x), [x])
    assert groups.normalise(norm, x[:0]).shape == (0, 8, 4, 4)


@pytest.mark.parametrize(
    ("resnet", "norm", "stages", "precision"),
    [
        ("resnet18", "group", 2, None),
        ("resnet18", "group", 2, torch.bfloat16),
        ("resnet18", "batch", 2, torch.bfloat16),
        ("resnet18", "batch", 1, None),  # which is not taken, but sharp
        ("resnet50", "group", 1, None),
    ],
)
def test_the_first_stages_of_a_resnet(
    pictures: ModuleType, resnet: str, norm: str, stages: int, precision: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    whole = ImageEncoder((3, 36, 36), resnet=resnet, norm=norm).backbone
    network = whole[: 4 + stages].to(DEVICE, memory_format=torch.channels_last)
    images = drawn(1, 3, 12, 12) if resnet == "resnet50" else drawn(1, 3, 20, 20)
    inputs = [images, *network.parameters()]

    def run(network: Any, precision: torch.dtype | None) -> Tensor:
        with torch.autocast(DEVICE, precision, enabled=precision is not None):
            result = network(images).float()
        return torch.cat([part.flatten() for part in (result.detach(), *gradients(result, inputs))])

    with torch.autocast(DEVICE, precision, enabled=precision is not None):
        assert pictures.takes(network, DEVICE) == (norm == "group" or precision is not None)
    found = run(lambda images: pictures.run(network, images), precision)
    exact, by_library = run(network, None), run(network, precision)
    apart, usual = (float((one - exact).norm() / exact.norm()) for one in (found, by_library))
    assert 0 < apart < (1e-4 if precision is None else 2 * usual), (apart, usual)


def test_encoders_take_them_unless_told_otherwise(pictures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(pictures, "run", lambda backbone, x, _: called.append(1) or backbone(x))
    images = drawn(1, 3, 40, 40)
    for norm, times in (("batch", 0), ("group", 1)) if ON_GPU else (("group", 1),):
        made = ImageEncoder((3, 40, 40), norm=norm).to(DEVICE, memory_format=torch.channels_last)
        made(images)
        assert len(called) == times
    handle = made.backbone[1].register_forward_hook(lambda *_: None)  # who listens to a layer wants it called
    made(images)
    assert len(called) == (1 if ON_GPU else 2)
    handle.remove()
    use_library(made)
    called.clear()
    made(images)
    assert not called


def test_other_networks_are_left_to_pytorch(pictures: ModuleType) -> None:
    assert not pictures.takes(ImageEncoder((3, 40, 40), norm="batch").backbone, DEVICE)
    changed = ImageEncoder((3, 40, 40)).backbone
    changed[4][0].bn2 = nn.Identity()
    assert not pictures.takes(changed, DEVICE)
    longer = ImageEncoder((3, 40, 40)).backbone.append(nn.Dropout2d())
    assert not pictures.takes(longer, DEVICE)
    smooth = ImageEncoder((3, 40, 40)).backbone
    smooth[5][1].relu = nn.SiLU()
    assert not pictures.takes(smooth, DEVICE)


def test_pure_bf16_stays_bf16(groups: ModuleType) -> None:
    norm, x = nn.GroupNorm(2, 8).to(DEVICE, torch.bfloat16), drawn(2, 8, 4, 4)
    lying = x.bfloat16().contiguous(memory_format=torch.channels_last)
    found = groups.normalise(norm, lying, residual=lying, rectify=True)
    assert found.dtype == torch.bfloat16
    with torch.autocast(DEVICE, torch.bfloat16):
        assert groups.normalise(norm, lying).dtype == torch.float32
        assert groups.normalise_between(norm, lying).dtype == torch.bfloat16
    exact = functional.relu(functional.group_norm(lying.float(), 2) + lying.float())
    check(found, exact, [x, norm.weight][:1], 2e-2)


def test_kernels_that_compute_something_else_are_noticed(
    groups: ModuleType, batches: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = nn.GroupNorm(2, 32).to(DEVICE), nn.BatchNorm2d(32).to(DEVICE)
    if INTERPRETED:  # which takes half a minute for those at the first use
        monkeypatch.setattr(kernels, "TRIALS", tuple((min(side, 7), *rest) for side, *rest in kernels.TRIALS))
    kernels.compare(groups, own[0])  # as at the first use
    kernels.compare(batches, own[1])
    monkeypatch.setattr(kernels, "TRIALS", ((6, torch.float32, False, 1e-3),))
    for name, wrong in {
        "normalise": lambda norm, x, **_: norm(x.float()),
        "normalise_and_pool": lambda norm, pooling, x: (-pooling(-norm(x.float()).relu()),) * 2,
    }.items():
        changed = SimpleNamespace(**vars(groups) | {name: wrong})
        with pytest.raises(ArithmeticError):
            kernels.compare(changed, own[0])


def make_batch_norms(channels: int) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """Return two alike, with weights below zero, and running numbers of their own."""
    torch.manual_seed(channels)
    norm = nn.BatchNorm2d(channels, momentum=0.3).to(DEVICE)
    for numbers in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(numbers)
    return norm, copy.deepcopy(norm)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("rows", "channels", "side"), [(2, 40, 5), (3, 8, 11), (1, 130, 2)])
def test_batch_norm(batches: ModuleType, rows: int, channels: int, side: int, adds: bool, rectify: bool) -> None:
    ours, norm = make_batch_norms(channels)
    x, residual = drawn(rows, channels, side, side + 2)[..., 2:], drawn(rows, channels, side, side + 1)[..., 1:]
    far = (3 * x + 50).contiguous(memory_format=torch.channels_last)
    found = batches.normalise(ours, far, residual=residual if adds else None, rectify=rectify)
    own = gradients(found, [x, *ours.parameters()])
    far = 3 * x + 50
    assert "BatchNorm" in found.grad_fn.name()
    assert "Native" not in found.grad_fn.name()
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact = functional.batch_norm(far.double(), None, None, norm.weight.double(), norm.bias.double(), True)
    wanted = exact + residual if adds else exact
    theirs = functional.relu(wanted) if rectify else wanted
    for one, other in zip((found, *own), (theirs, *gradients(theirs, [x, *norm.parameters()])), strict=True):
        assert float((one - other).detach().abs().max() / other.detach().abs().max()) < 1e-4
    norm(far)
    for name, value in norm.named_buffers():
        assert torch.allclose(ours.get_buffer(name), value, rtol=1e-4), name


def test_batch_norm_for_two_readers(batches: ModuleType) -> None:
    ours, norm = make_batch_norms(24)
    x, residual = drawn(2, 24, 6, 6), drawn(2, 24, 6, 6)
    lying, inputs = x.contiguous(memory_format=torch.channels_last), [x, residual]
    kept, seen = batches.branch(ours, lying, residual)
    check(kept + 2 * seen, 3 * functional.relu(norm(lying) + residual), inputs)
    kept, seen = batches.branch(ours, lying, residual)
    check(seen, functional.relu(norm(lying) + residual), inputs)
    half = lying.detach().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        kept, seen = batches.branch(ours, half, half)
    assert kept.dtype == seen.dtype == torch.bfloat16
    wanted = functional.relu(norm(half.float()) + half.float())
    assert torch.allclose(kept.float(), wanted, rtol=2**-6, atol=1e-2)


def test_batch_norms_that_are_left_to_pytorch(batches: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batches.takes(nn.BatchNorm2d(4))
    others = (nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False))
    assert not any(batches.takes(norm) for norm in (*others, nn.BatchNorm2d(4, momentum=None), nn.SyncBatchNorm(4)))
    monkeypatch.setattr(batches, "_BatchNorm", None)
    ours, norm = make_batch_norms(8)
    x = drawn(2, 8, 4, 4)  # its channels lie first
    check(batches.normalise(ours, x, residual=2 * x, rectify=True), functional.relu(norm(x) + 2 * x), [x])
    single = drawn(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batches.normalise(ours, single)
