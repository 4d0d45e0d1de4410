"""The U-Net's operations in C: what the plain network computes in float32, and PyTorch's where they cannot be had."""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from getiaction.policy import ConditionalUnet1d
from getiaction.policy.fast import native
from getiaction.policy.fast import unroll as unroll_module
from getiaction.policy.fast.convolution import Conv1d
from getiaction.policy.fast.modulation import Modulation
from getiaction.policy.fast.native_unet import ROWS, NativeUnet
from getiaction.policy.fast.unroll import PLANS, ROWS_OF_BF16, unroll

TIMESTEPS = torch.tensor([90, 10, 0])
SHAPES: dict[str, dict[str, Any]] = {
    "three levels": {"down_dims": (16, 32, 64)},
    "channels that no vector divides": {"down_dims": (24, 40, 72), "kernel_size": 3},
    "one level, shift only": {"down_dims": (16,), "use_film_scale_modulation": False},
    "kernel of one": {"down_dims": (16, 32), "kernel_size": 1},
    "deeper than a cache": {"down_dims": (64, 256)},
}


@pytest.fixture(autouse=True)
def library() -> native.Library:
    """Return the compiled operations; tests without them say so."""
    if (found := native.find_library()) is None:
        pytest.skip("needs a C compiler")
    return found


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(**shape: Any) -> ConditionalUnet1d:
    """Return a U-Net in which every weight and bias matters."""
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=3, cond_dim=5, **shape)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            weight.normal_(std=0.1) if weight.ndim > 1 else weight.normal_(1.0 if "block.1" in name else 0.0, 0.3)
    return unet


def drawn(rows: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Return actions (B, T, 3) and what they depend on (B, 5); the first rows are the same for any B."""
    draw = torch.Generator().manual_seed(horizon)
    return torch.randn(16, horizon, 3, generator=draw)[:rows], torch.randn(16, 5, generator=draw)[:rows]


def run(unet: ConditionalUnet1d, actions: Tensor, cond: Tensor, *, halves: bool = False) -> Tensor:
    """Return what is predicted at each of TIMESTEPS, (S, B, T, Da), under autocast to bf16 if told so."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=halves):
        unrolled = unroll(unet, TIMESTEPS, cond, actions.shape[1])
    assert type(unrolled) is NativeUnet
    return torch.stack([unrolled(actions, number) for number in range(len(TIMESTEPS))])


def run_plain(unet: ConditionalUnet1d, actions: Tensor, cond: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([unet(actions, timestep.expand(len(actions)), cond) for timestep in TIMESTEPS])


def assert_rounding_only(unet: ConditionalUnet1d, actions: Tensor, cond: Tensor, *, halves: bool = False) -> None:
    """Compare with float64: no further from it than a few times as far as PyTorch in float32 is.

    Under autocast the network is the one whose convolutions' weights are rounded to bf16, and nothing else.
    """
    found = run(unet, actions, cond, halves=halves)
    unet = rounded(unet) if halves else unet
    usual = run_plain(unet, actions, cond)
    exact = run_plain(unet.double(), actions.double(), cond.double())
    unet.float()
    apart, own = (float((one - exact).norm() / exact.norm()) for one in (found, usual))
    assert 0 < apart < 2 * own + 1e-6, (apart, own)


def rounded(unet: ConditionalUnet1d) -> ConditionalUnet1d:
    """Return a copy whose convolutions' weights are numbers of bf16."""
    own = copy.deepcopy(unet)
    for layer in own.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            layer.weight.data = layer.weight.data.bfloat16().float()
    return own


@pytest.mark.parametrize(("rows", "horizon"), [(1, 16), (1, 4), (3, 8), (16, 16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_network(shape: str, rows: int, horizon: int, threads: int) -> None:
    assert_rounding_only(make(**SHAPES[shape]), *drawn(rows, horizon))


@pytest.mark.parametrize(("rows", "horizon"), [(1, 16), (1, 4), (4, 8), (7, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_under_autocast_weights_are_rounded_and_nothing_else(shape: str, rows: int, horizon: int, threads: int) -> None:
    assert_rounding_only(make(**SHAPES[shape]), *drawn(rows, horizon), halves=True)


def test_under_autocast_it_sees_new_weights() -> None:
    unet = make(down_dims=(24, 40))
    first = run(unet, *drawn(2, 8), halves=True)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(0.9)
    assert not torch.allclose(run(unet, *drawn(2, 8), halves=True), first, rtol=1e-2)
    assert_rounding_only(unet, *drawn(2, 8), halves=True)
    assert_rounding_only(unet, *drawn(2, 8))  # beside it, by weights that were not rounded


def test_many_rows_are_pytorchs_where_the_cpu_has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    cond = drawn(1, 8)[1]
    for faster, rows, is_native in (
        (True, ROWS_OF_BF16, True),
        (True, ROWS_OF_BF16 + 8, False),
        (False, ROWS, True),
        (False, ROWS + 8, False),
    ):
        monkeypatch.setattr(unroll_module, "is_faster_in_bf16", {"cpu": faster}.get)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            unrolled = unroll(make(down_dims=(16, 32)), TIMESTEPS, cond.expand(rows // 8, 5), 8)
        assert (type(unrolled) is NativeUnet) is is_native, (faster, rows)


@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("shape", ["three levels", "channels that no vector divides"])
def test_a_row_is_the_same_bit_by_bit_among_others_and_for_any_threads(
    shape: str, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unroll_module, "is_faster_in_bf16", {"cpu": False}.get)  # so that C takes all rows
    unet, (actions, cond), seen = make(**SHAPES[shape]), drawn(16, 8), []
    films = torch.cat(unet.modulation(TIMESTEPS, cond), dim=2)  # (S, 16, sum of C): PyTorch rounds one row otherwise

    def run_with(actions: Tensor, films: Tensor) -> Tensor:
        monkeypatch.setattr(Modulation, "__call__", lambda self, timesteps, cond, out: out.copy_(films))
        return run(unet, actions, cond[: len(actions)], halves=halves)

    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        whole = run_with(actions, films)
        for rows in (1, 2, 3, 5, 16):
            assert torch.equal(run_with(actions[:rows], films[:, :rows]), whole[:, :rows])
        assert torch.equal(run_with(actions.flip(0), films.flip(1)).flip(1), whole)
        seen.append(whole)
    torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_it_sees_new_weights_and_observations() -> None:
    unet = make(down_dims=(24, 40))
    assert_rounding_only(unet, *drawn(2, 8))
    first = run(unet, *drawn(2, 8))
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(0.9)  # as an optimiser does
    assert not torch.allclose(run(unet, *drawn(2, 8)), first, rtol=1e-2)
    assert_rounding_only(unet, *drawn(2, 8))
    for weight in unet.parameters():
        weight.data.mul_(1.2)  # which PyTorch does not count
    assert_rounding_only(unet, *drawn(2, 8))
    unet.load_state_dict({key: value * 1.1 for key, value in unet.state_dict().items()}, assign=True)
    assert_rounding_only(unet, *drawn(2, 8))
    assert_rounding_only(unet, *drawn(3, 4))


@pytest.mark.parametrize("part", ["up_modules.0.2", "down_modules.0.0.conv1.block.0", "final_conv.1"])
def test_it_sees_the_new_weights_of_one_layer(part: str) -> None:
    unet = make(down_dims=(24, 40))
    assert_rounding_only(unet, *drawn(1, 8))
    with torch.no_grad():
        unet.get_submodule(part).weight.mul_(-2)
    assert_rounding_only(unet, *drawn(1, 8))


def test_weights_whose_channels_lie_last() -> None:
    unet = make(down_dims=(16, 40))
    for layer in unet.modules():
        if isinstance(layer, nn.Conv1d):
            layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert_rounding_only(unet, *drawn(2, 8))


def test_threads_of_python_do_not_disturb_each_other(threads: int) -> None:
    unet, got = make(down_dims=(16, 40)), dict[int, Tensor]()
    inputs = {rows: drawn(rows, 8) for rows in (1, 2, 3, 4)}
    wanted = {rows: run(unet, *given) for rows, given in inputs.items()}

    def work(rows: int) -> None:
        torch.set_num_threads(threads)
        got[rows] = torch.stack([run(unet, *inputs[rows]) for _ in range(20)])

    workers = [threading.Thread(target=work, args=(rows,)) for rows in inputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(values, wanted[rows].expand_as(values)) for rows, values in got.items())
    assert len(got) == len(inputs)


def test_nan_stays_nan_and_where_it_is() -> None:
    unet, (actions, cond) = make(down_dims=(16, 32)), drawn(3, 8)
    clean = run(unet, actions, cond)
    actions = actions.clone()
    actions[1, 4, 0] = float("nan")
    found = run(unet, actions, cond)
    assert found[:, 1].isnan().all()
    assert torch.equal(found[:, ::2], clean[:, ::2])


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 3000.0])
def test_mish_near_and_far_from_zero(library: native.Library, size: float) -> None:
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    weight, bias, out = torch.full((32,), size), torch.linspace(-size, size, 32), torch.empty(1, 16, 32)
    more = {"weight": weight.data_ptr(), "bias": bias.data_ptr(), "groups": 2, "eps": 1e-5}
    library.run((native.Operation * 1)(native.describe(native.NORM, x, out, **more)), 0, 1)
    exact = nn.functional.group_norm(x.double().transpose(1, 2), 2, weight.double(), bias.double()).transpose(1, 2)
    assert torch.allclose(out.double(), nn.functional.mish(exact), rtol=1e-5, atol=1e-6 * size)


def test_what_it_does_not_take() -> None:
    unet, cond = make(down_dims=(16, 32)), drawn(1, 8)[1]
    with torch.no_grad():
        assert type(unroll(unet, TIMESTEPS, cond.expand(ROWS // 8, 5), 8)) is NativeUnet
        assert type(unroll(unet, TIMESTEPS, cond.expand(ROWS // 8 + 1, 5), 8)) is not NativeUnet
        with torch.autocast("cpu", torch.float16):
            assert type(unroll(unet, TIMESTEPS, cond, 8)) is not NativeUnet
        unet.double()
        assert type(unroll(unet, TIMESTEPS, cond.double(), 8)) is not NativeUnet


def spread(unet: ConditionalUnet1d) -> None:
    bias = unet.mid_modules[0].conv1.block[0].bias
    bias.data = torch.randn(2 * len(bias))[::2]


def widen(unet: ConditionalUnet1d) -> None:
    unet.mid_modules[0].conv1.block[1].double()


def exchange(unet: ConditionalUnet1d) -> None:
    unet.mid_modules[0].conv2.block[0] = Conv1d(32, 16, 5, padding=2)


def shorten(unet: ConditionalUnet1d) -> None:
    unet.mid_modules[0].conv1.block[0].padding = (1,)


def look_further(unet: ConditionalUnet1d) -> None:
    unet.mid_modules[0].conv1.block[0] = Conv1d(32, 32, 13, padding=6)


def split(unet: ConditionalUnet1d) -> None:
    unet.mid_modules[0].conv1.block[0] = Conv1d(32, 32, 5, padding=2, groups=2)


def scatter(unet: ConditionalUnet1d) -> None:
    weight = unet.mid_modules[0].conv1.block[0].weight
    weight.data = torch.randn(32, 64, 5)[:, ::2]


@pytest.mark.parametrize("change", [spread, widen, exchange, shorten, look_further, split, scatter])
def test_layers_of_another_size_or_type_are_left_alone(change: Callable[[ConditionalUnet1d], None]) -> None:
    """It would read what is not theirs."""
    unet, cond = make(down_dims=(16, 32)), drawn(1, 8)[1]
    change(unet)
    with torch.no_grad():
        assert unroll(unet, TIMESTEPS, cond, 8) is None
        assert unroll(make(down_dims=(8, 16, 32)), TIMESTEPS, cond, 6) is None  # which cannot be halved twice


def test_a_step_that_is_none_is_an_error() -> None:
    unet, (actions, cond) = make(down_dims=(16, 32)), drawn(1, 8)
    with torch.no_grad():
        unrolled = unroll(unet, TIMESTEPS, cond, 8)
    for number in (-1, 3):
        with pytest.raises(IndexError, match=f"step {number} of 3"):
            unrolled(actions, number)


def test_plans_share_their_copies_and_go_when_nobody_needs_them() -> None:
    unet, made = make(down_dims=(16, 40)), []
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for number in range(12):
                unrolled = unroll(unet, TIMESTEPS, drawn(1 + number % 7, 8)[1], 8)
                made.append(weakref.ref(unrolled))
        alive = {one() for one in made} - {None}
        assert len(alive) == PLANS
        copies = [copy for one in alive for copy in one._copies]
        assert len({id(copy) for copy in copies}) * PLANS == len(copies) > 0
        alive.clear()
        del unrolled, copies, unet
        assert not [one for one in made if one()], "they wait for no collector"
    finally:
        gc.enable()


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let the library be looked for again, in an empty cache, and be compiled in a second; return its folder."""
    monkeypatch.setenv("GETIACTION_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FAST", ("-O0",))
    native.find_library.cache_clear()
    yield tmp_path / "native"
    native.find_library.cache_clear()


def test_it_is_compiled_once(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.find_library() is not None
    (path,) = anew.iterdir()
    native.find_library.cache_clear()
    monkeypatch.setattr(native.subprocess, "run", None)
    assert native.find_library() is not None
    assert list(anew.iterdir()) == [path]


def test_without_a_compiler_pytorch_acts(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.INFO):
        assert native.find_library() is None
    assert "no C compiler" in caplog.text
    unet, (actions, cond) = make(down_dims=(16, 32)), drawn(1, 8)
    with torch.no_grad():
        unrolled = unroll(unet, TIMESTEPS, cond, 8)
    assert type(unrolled) is not NativeUnet
    torch.testing.assert_close(unrolled(actions, 0), run_plain(unet, actions, cond)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'fatal: no such flag' >&2; exit 3", "ends with 3: .*no such flag"),
        ('echo no library > "$(echo "$@" | sed "s/.*-o //; s/ .*//")"', "so: "),
    ],
)
def test_a_compiler_that_does_not_work_is_said_once(
    script: str,
    said: str,
    anew: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert native.find_library() is None
    assert native.find_library() is None
    (record,) = caplog.records
    assert re.search(said, record.getMessage())


def test_a_compiler_without_openmp_or_native_is_good_enough(
    anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*|*-march*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert native.find_library() is not None
    assert_rounding_only(make(down_dims=(16, 40)), *drawn(3, 8))


def test_what_computes_something_else_is_not_used(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    wrong = tmp_path / "native.c"
    wrong.write_text(native.SOURCES[0].read_text().replace("+= right *", "-= right *"))
    monkeypatch.setattr(native, "SOURCES", (wrong, *native.SOURCES[1:]))
    assert native.find_library() is None
    assert "computes something else" in caplog.text


@pytest.mark.parametrize("length", [0, 1000, 9000])
def test_a_file_that_is_not_whole_is_not_loaded(anew: Path, length: int) -> None:
    assert native.find_library() is not None
    (path,) = anew.iterdir()
    whole = path.read_bytes()
    path.unlink()  # this process has it in its memory
    path.write_bytes(whole[:length])
    native.find_library.cache_clear()
    assert native.find_library() is not None
    assert native.is_whole(path)


def test_a_file_that_the_system_does_not_load_is_compiled_again(anew: Path) -> None:
    assert native.find_library() is not None
    (path,) = anew.iterdir()
    other = b"of another system"
    wrong = anew / f"{path.stem[:32]}-{hashlib.sha256(other).hexdigest()[:32]}.so"
    wrong.write_bytes(other)
    path.unlink()
    native.find_library.cache_clear()
    assert native.find_library() is not None
    assert not wrong.exists()


@pytest.mark.parametrize("homeless", [False, True])
def test_without_a_cache_it_is_compiled_each_time(
    anew: Path, monkeypatch: pytest.MonkeyPatch, homeless: bool, caplog: pytest.LogCaptureFixture
) -> None:
    anew.write_text("no folder")
    if homeless:

        def nowhere() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("GETIACTION_CACHE")
        monkeypatch.setattr(Path, "home", nowhere)
    assert native.find_library() is not None
    assert_rounding_only(make(down_dims=(16, 40)), *drawn(3, 8))
    assert not caplog.records


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_what_is_usual_elsewhere_does_not_matter(anew: Path, default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            assert native.find_library() is not None
    finally:
        torch.set_default_dtype(before)


def test_a_compiler_may_be_named_with_what_starts_it(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "nice gcc -g0")
    assert native.find_library() is not None
