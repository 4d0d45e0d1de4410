"""Pictures encoded by packed weights: what the layers compute, whoever changes these or their weights."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

from getiaction import half
from getiaction.policy.encoder import ImageEncoder
from getiaction.policy.fast import native_layers, packed
from getiaction.policy.fast.packed import KEPT, PackedResnet, encode, packed_for
from getiaction.policy.fast.packed_convolution import PackedConvolution

SHAPES = [("resnet18", (1, 64, 64)), ("resnet18", (3, 65, 47)), ("resnet50", (2, 33, 64))]  # B, H, W


@pytest.fixture(autouse=True)
def _onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")


@pytest.fixture
def _without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layers, "works", lambda: False)


@pytest.fixture
def _with_c() -> None:
    if not native_layers.works():
        pytest.skip("needs a C compiler")


ways = pytest.mark.parametrize("way", ["_with_c", "_without_c"])


def make(norm: str, resnet: str = "resnet18") -> nn.Sequential:
    """Return a network in which every weight, and every moment of batch norm, matters."""
    torch.manual_seed(0)
    backbone = ImageEncoder((3, 64, 64), norm=norm, resnet=resnet).eval().backbone
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return backbone


def drawn(batch_size: int = 1, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(height))


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@torch.no_grad()
def check(backbone: nn.Sequential, pictures: Tensor) -> None:
    """Compare what packed weights make of pictures with what the layers do."""
    found = packed_for(backbone, pictures)
    assert type(found) is PackedResnet
    assert_equal(found(pictures), backbone(pictures))


@ways
@pytest.mark.parametrize(("resnet", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_it_is_what_the_layers_compute(
    norm: str, resnet: str, shape: tuple[int, int, int], way: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(way)
    backbone = make(norm, resnet)
    check(backbone, drawn(*shape))
    check(backbone, drawn(*shape).contiguous(memory_format=torch.channels_last))


@pytest.mark.usefixtures("_with_c")
@torch.no_grad()
def test_each_convolution_goes_the_way_that_is_fastest_for_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[tuple[str, int]]()
    for way in ("_few", "_tiles", "_pack"):
        make_it = getattr(PackedConvolution, way)

        def listen(self: Any, *given: Any, way: str = way, make_it: Any = make_it) -> Any:
            taken.append((way, self._layer.kernel_size[0]))
            return make_it(self, *given)

        monkeypatch.setattr(PackedConvolution, way, listen)
    backbone = make("group")
    many = {("_pack", 7): 1, ("_tiles", 3): 10, ("_pack", 3): 2, ("_few", 3): 4, ("_few", 1): 2, ("_pack", 1): 1}
    one = {("_pack", 7): 1, ("_tiles", 3): 4, ("_few", 3): 12, ("_few", 1): 3}
    for batch_size, wanted in ((1, one), (32, many)):
        taken.clear()
        check(backbone, drawn(batch_size))
        assert Counter(taken) == wanted


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_an_encoder_that_acts_uses_it(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ImageEncoder((3, 64, 64), norm=norm).eval()
    calls: list[Tensor] = []
    run = PackedResnet.__call__
    monkeypatch.setattr(PackedResnet, "__call__", lambda self, x: calls.append(x) or run(self, x))
    pictures = drawn(2)
    learning = encoder(pictures)  # with gradients
    assert not calls
    assert packed.works()
    calls.clear()  # those of the trial
    with torch.no_grad():
        acting = encoder(pictures)
    assert len(calls) == 1
    assert_equal(acting, learning.detach())


def train_a_step(backbone: nn.Sequential) -> None:
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.01, fused=True)
    with torch.enable_grad():
        backbone(drawn()).square().mean().backward()
    optimizer.step()


def average(backbone: nn.Sequential) -> None:
    for weight in backbone.parameters():
        weight.data.mul_(0.9).add_(torch.randn(weight.shape), alpha=0.02)


def see_more(backbone: nn.Sequential) -> None:
    """Let batch norm's moments go on, and nothing else."""
    backbone.train()
    backbone(drawn(4, 32, 32))
    backbone.eval()


def load(backbone: nn.Sequential) -> None:
    backbone.load_state_dict({name: weight * 2 for name, weight in backbone.state_dict().items()})


def replace(backbone: nn.Sequential) -> None:
    backbone[0] = copy.deepcopy(backbone[0])
    nn.init.normal_(backbone[0].weight)


def move(backbone: nn.Sequential) -> None:
    weight = backbone[4][0].conv1.weight
    weight.data = weight.data.flip(0).contiguous()


CHANGES: dict[str, Callable[[nn.Sequential], None]] = {
    change.__name__: change for change in (train_a_step, average, see_more, load, replace, move)
}


def set_eps(backbone: nn.Sequential) -> None:
    backbone[5][0].bn1.eps = 0.5


def turn(backbone: nn.Sequential) -> None:
    """Let weights lie otherwise, where they are."""
    weight = backbone[4][0].conv1.weight
    weight.data = weight.data.transpose(2, 3)


def scale_some(backbone: nn.Sequential) -> None:
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data[:, layer.in_channels // 2 :].mul_(3)


CHANGES |= {change.__name__: change for change in (set_eps, turn, scale_some)}


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_it_follows_the_weights(change: str, norm: str) -> None:
    backbone, pictures = make(norm), drawn()
    check(backbone, pictures)
    before = backbone(pictures)
    CHANGES[change](backbone)
    if norm == "batch" or change != "see_more":
        assert not torch.allclose(backbone(pictures), before, rtol=1e-3)
    check(backbone, pictures)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch, _without_c: None) -> list[Tensor]:
    """Return a list of what is packed from now on."""
    found: list[Tensor] = []
    pack = torch.ops.mkldnn._reorder_convolution_weight

    def listen(weight: Tensor, *sizes: Any) -> Tensor:
        found.append(weight)
        return pack(weight, *sizes)

    assert packed.works()
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", listen)
    return found


@torch.no_grad()
def test_what_does_not_change_is_packed_once(packings: list[Tensor]) -> None:
    backbone = make("batch")
    for batch_size in (1, 3, 2, 1):
        check(backbone, drawn(batch_size))
    assert len(packings) == 3 * 20  # for each shape a ResNet-18's convolutions
    backbone[7][1].bn2.running_var.mul_(2)
    check(backbone, drawn())
    assert len(packings) == 4 * 20


@pytest.mark.usefixtures("_with_c")
@torch.no_grad()
def test_weights_for_few_places_and_tiles_are_laid_once_for_all_shapes() -> None:
    backbone = make("batch")
    for batch_size in (1, 2, 1):
        check(backbone, drawn(batch_size))
    laid = dict(KEPT[backbone]._weights)
    check(backbone, drawn(3))
    assert {key: id(one) for key, one in KEPT[backbone]._weights.items()} == {key: id(one) for key, one in laid.items()}
    assert len(laid) == len({layer for layer, _ in laid}) == 19  # all but the first convolution's
    backbone[7][1].bn2.running_var.mul_(2)
    check(backbone, drawn())
    assert len(KEPT[backbone]._weights) == 19
    assert not {id(one) for one in laid.values()} & {id(one) for one in KEPT[backbone]._weights.values()}


@ways
@torch.no_grad()
def test_packed_weights_compute_the_same_whatever_was_packed_before(way: str, request: pytest.FixtureRequest) -> None:
    """Or what a run gives would depend on how it came there."""
    request.getfixturevalue(way)
    backbone = make("batch")
    first = [encode(backbone, drawn(batch_size)) for batch_size in (1, 2, 3, 4)]
    makes = KEPT[backbone]._of.copy()
    again = [encode(backbone, drawn(batch_size)) for batch_size in (4, 3, 2, 1)]
    assert makes.keys() != KEPT[backbone]._of.keys()
    for one, other in zip(first, reversed(again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_without_c")
@torch.no_grad()
def test_who_is_at_it_while_weights_change_leaves_nothing_old_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, pictures = make("batch"), drawn()
    pack, changes = torch.ops.mkldnn._reorder_convolution_weight, [True]

    def pack_slowly(weight: Tensor, *sizes: Any) -> Tensor:
        if changes:  # another thread comes by, changes weights and acts
            changes.clear()
            average(backbone)
            check(backbone, pictures)
        return pack(weight, *sizes)

    assert packed.works()
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", pack_slowly)
    encode(backbone, pictures)
    assert not changes
    check(backbone, pictures)


def watch(backbone: nn.Sequential) -> None:
    backbone[4][0].conv1.register_forward_hook(lambda *_: None)


def train_one(backbone: nn.Sequential) -> None:
    backbone[4][0].bn1.train()


def widen(backbone: nn.Sequential) -> None:
    backbone[4][0].conv1 = nn.Conv2d(64, 64, 3, padding=2, dilation=2, bias=False)


def activate(backbone: nn.Sequential) -> None:
    backbone[4][0].relu = nn.SiLU()


def forget(backbone: nn.Sequential) -> None:
    backbone[4][0].bn1 = nn.BatchNorm2d(64, track_running_stats=False).eval()


def go_straight(backbone: nn.Sequential) -> None:
    backbone[4][0].downsample = nn.Identity()


def patch(backbone: nn.Sequential) -> None:
    backbone[4][0].forward = lambda x: 2 * x


def thin_out(backbone: nn.Sequential) -> None:
    prune.l1_unstructured(backbone[4][0].conv1, "weight", 0.5)


def own_norm(backbone: nn.Sequential) -> None:
    backbone[4][0].bn1 = nn.InstanceNorm2d(64)


@pytest.mark.parametrize(
    "odd",
    [
        go_straight,
        patch,
        thin_out,
        watch,
        train_one,
        widen,
        activate,
        forget,
        own_norm,
        nn.Module.double,
        nn.Module.train,
    ],
    ids=lambda odd: odd.__name__,
)
@torch.no_grad()
def test_other_networks_are_left_to_their_layers(odd: Callable[[nn.Module], Any]) -> None:
    backbone = make("batch")
    odd(backbone)
    assert packed_for(backbone, drawn().to(backbone[0].weight.dtype)) is None


@torch.no_grad()
def test_networks_that_are_no_list_of_layers_are_called() -> None:
    backbone, pictures = make("batch"), drawn()
    wanted = backbone(pictures)
    for whole in (torch.jit.trace(backbone, pictures), nn.DataParallel(backbone)):
        assert_equal(encode(whole, pictures), wanted)


def test_other_calls_are_left_to_the_layers() -> None:
    backbone, pictures = make("batch"), drawn()
    assert packed_for(backbone, pictures) is None  # with gradients
    with torch.no_grad():
        assert packed_for(backbone, pictures[:0]) is None
        assert packed_for(backbone, pictures.bfloat16()) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert packed_for(backbone, pictures) is None
        with torch.backends.mkldnn.flags(enabled=False):
            assert packed_for(backbone, pictures) is None
        assert packed_for(backbone, pictures) is not None


@torch.no_grad()
def test_under_autocast_a_cpu_that_acts_in_slow_bf16_rounds_some_weights_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, pictures = make("group"), drawn()
    full = encode(backbone, pictures)
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(half, "is_faster_in_bf16", {"cpu": True}.get)
        assert torch.equal(encode(backbone, pictures), usual := backbone(pictures))
        monkeypatch.setattr(half, "is_faster_in_bf16", {"cpu": False}.get)
        rounded = encode(backbone, pictures)
    assert rounded.dtype == torch.float32
    assert float((rounded - full).norm()) < float((usual - full).norm())
    assert torch.equal(rounded, full) is not native_layers.works()
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.copy_(layer.weight.bfloat16())
    full = encode(backbone, pictures)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(backbone, pictures), full)


@torch.no_grad()
def test_what_is_left_to_the_layers_is_autocasts() -> None:
    backbone, pictures = make("group"), drawn()
    backbone[4][0].register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(backbone, pictures), backbone(pictures))
        narrow = make("group").bfloat16()
        assert torch.equal(encode(narrow, pictures), narrow(pictures))


def stretch(backbone: nn.Sequential) -> None:
    """Add one place to four."""
    backbone[7][1].downsample = nn.Sequential(nn.Conv2d(512, 512, 1, stride=2), nn.GroupNorm(32, 512))


def scatter_bias(backbone: nn.Sequential) -> None:
    backbone[7][0].conv2.bias = nn.Parameter(torch.randn(1024)[::2])


def point(backbone: nn.Sequential) -> None:
    """Have weights of 1x1 where 3x3 is said, which PyTorch does not read."""
    backbone[7][0].conv2.weight = nn.Parameter(torch.randn(512, 512, 1, 1))
    backbone[7][0].conv2.padding = (0, 0)


@pytest.mark.parametrize("change", [stretch, scatter_bias, point])
@torch.no_grad()
def test_odd_layers_are_right(change: Callable[[nn.Sequential], None]) -> None:
    backbone = make("group")
    change(backbone)
    assert_equal(encode(backbone, drawn()), backbone(drawn()))


def go_around_without(backbone: nn.Sequential) -> None:
    backbone[5][0].downsample = None


def norm_less(backbone: nn.Sequential) -> None:
    backbone[7][0].bn1 = nn.GroupNorm(4, 64)


def expect_more(backbone: nn.Sequential) -> None:
    backbone[7][0].conv2 = nn.Conv2d(1024, 512, 3, padding=1)


def expect_more_by_tiles(backbone: nn.Sequential) -> None:
    backbone[4][0].conv2 = nn.Conv2d(128, 64, 3, padding=1)


def bias_few(backbone: nn.Sequential) -> None:
    backbone[7][0].conv2.bias = nn.Parameter(torch.randn(8))


def bias_wide(backbone: nn.Sequential) -> None:
    backbone[7][0].conv2.bias = nn.Parameter(torch.randn(512).double())


def moments_wide(backbone: nn.Sequential) -> None:
    backbone[7][0].bn1 = nn.BatchNorm2d(512).double().eval()


def see_past(backbone: nn.Sequential) -> None:
    backbone[7][0].conv2.padding = (0, 0)


def group_oddly(backbone: nn.Sequential) -> None:
    backbone[7][0].bn1.num_groups = 7


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        go_around_without,
        norm_less,
        expect_more,
        expect_more_by_tiles,
        bias_few,
        bias_wide,
        moments_wide,
        see_past,
        group_oddly,
    ],
)
@torch.no_grad()
def test_what_does_not_fit_is_pytorchs_error(change: Callable[[nn.Sequential], None], known: bool) -> None:
    backbone, pictures = make("group"), drawn()
    if known:
        encode(backbone, pictures)
    change(backbone)
    with pytest.raises(RuntimeError) as wanted:
        backbone(pictures)
    with pytest.raises(RuntimeError) as found:
        encode(backbone, pictures)
    assert str(found.value) == str(wanted.value)


@torch.no_grad()
def test_pictures_of_too_few_channels_are_pytorchs_error() -> None:
    backbone = make("group")
    backbone[0] = nn.Conv2d(3, 64, 3, padding=1)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 1"):
        encode(backbone, torch.randn(1, 1, 12, 12))


@torch.no_grad()
def test_one_number_a_group_is_pytorchs_error() -> None:
    backbone = make("group")
    backbone[7][1].bn2 = nn.GroupNorm(512, 512)
    with pytest.raises(ValueError, match="more than 1 value"):
        encode(backbone, drawn(1, 32, 32))


@pytest.mark.usefixtures("_with_c")
@torch.no_grad()
def test_weights_go_with_the_last_shape_that_needs_them() -> None:
    backbone = make("group")
    encode(backbone, drawn(1, 64, 64))
    few = set(KEPT[backbone]._weights)
    for batch_size in (32, 33, 34):  # tiles where there was one place a tile, and oneDNN
        encode(backbone, drawn(batch_size, 64, 64))
    gc.collect()
    assert not few <= set(KEPT[backbone]._weights)


@pytest.mark.parametrize("half_of", [torch.float64, torch.bfloat16])
def test_what_is_usual_elsewhere_does_not_matter(half_of: torch.dtype) -> None:
    before = torch.get_default_dtype()
    packed.works.cache_clear()
    try:
        torch.set_default_dtype(half_of)
        assert packed.works()
    finally:
        torch.set_default_dtype(before)
        packed.works.cache_clear()


@torch.no_grad()
def test_autocast_can_be_compiled_whole() -> None:
    encoder = ImageEncoder((3, 64, 64)).eval()
    whole = torch.compile(encoder, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert whole(drawn()).isfinite().all()


@pytest.mark.parametrize("fault", ["other sums", "another signature"])
@torch.no_grad()
def test_a_library_that_does_otherwise_is_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack = torch.ops.mkldnn._reorder_convolution_weight

    def otherwise(weight: Tensor, *sizes: Any) -> Tensor:
        return pack(weight * 1.01, *sizes) if fault == "other sums" else pack(weight, "same", *sizes)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", otherwise)
    packed.works.cache_clear()
    backbone, pictures = make("batch"), drawn()
    with caplog.at_level(logging.WARNING):
        assert packed_for(backbone, pictures) is None
        assert packed_for(backbone, pictures) is None
    packed.works.cache_clear()
    assert len(caplog.records) == 1


@torch.no_grad()
def test_what_the_library_refuses_is_left_to_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, pictures = make("batch"), drawn()
    assert packed.works()

    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("could not create a memory")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", refuse)
    for _ in range(2):
        assert torch.equal(encode(backbone, pictures), backbone(pictures))
        assert packed_for(backbone, pictures) is None
    small = drawn(1, 32, 32)  # one place is left in the end
    assert_equal(encode(make("batch"), small), make("batch")(small))


@torch.no_grad()
def test_weights_may_be_no_numbers_and_then_some() -> None:
    backbone, pictures = make("batch"), drawn()
    good = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    backbone[0].weight.fill_(float("nan"))
    assert encode(backbone, pictures).isnan().all()
    backbone.load_state_dict(good)
    check(backbone, pictures)


@torch.no_grad()
def test_pytorch_may_do_with_weights_what_it_did() -> None:
    backbone = make("batch")
    check(backbone, drawn())
    weight, other = backbone[0].weight, nn.Parameter(torch.randn(64, 3, 7, 7))
    torch.utils.swap_tensors(weight, other)
    check(backbone, drawn())
    storage = backbone[0].weight.untyped_storage()
    storage.resize_(0)  # as who shards weights does
    assert storage.nbytes() == 0


@torch.no_grad()
def test_transformed_calls_are_left_to_the_layers() -> None:
    backbone, pictures = make("group"), drawn(2)
    wanted = backbone(pictures)
    assert_equal(torch.vmap(lambda one: encode(backbone, one[None])[0])(pictures), wanted)
    assert_equal(make_fx(lambda x: encode(backbone, x))(pictures)(pictures), wanted)
    with forward_ad.dual_level():
        made = encode(backbone, forward_ad.make_dual(pictures, torch.ones_like(pictures)))
        assert forward_ad.unpack_dual(made).tangent is not None


@torch.no_grad()
def test_threads_share_it() -> None:
    backbone, pictures = make("batch"), drawn()
    wanted, found = backbone(pictures), list[Tensor]()

    def work() -> None:
        with torch.no_grad():
            for _ in range(5):
                found.append(encode(backbone, pictures))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for one in found:
        assert_equal(one, wanted)


@torch.no_grad()
def test_it_goes_with_its_network() -> None:
    backbone = make("group")
    check(backbone, drawn())
    held = [weakref.ref(backbone), weakref.ref(KEPT[backbone])]
    del backbone
    gc.collect()
    assert [one() for one in held] == [None, None]


@torch.no_grad()
def test_a_copy_has_its_own() -> None:
    backbone = make("batch")
    check(backbone, drawn())
    other = copy.deepcopy(backbone)
    average(other)
    check(other, drawn())
    check(backbone, drawn())
