"""The recorded attention: right by hand, on every backend and wrapper, and without a trace."""

import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pandas.testing import assert_frame_equal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sknet_triton as skt
from perf.peers.rebuilt import SelectiveKernel, SKConvBlock, SKFusion, SplitAttn
from sknet_triton import Backend, analysis, use_backend
from sknet_triton.analysis import record
from tests.helpers import unchanged
from tests.plain_sknet import scramble
from tests.processes import needs_gloo

pytestmark = pytest.mark.usefixtures("on_the_device")

# Weights lie in [0, 1]: logits of float64 through two batch norms and sums of at most 300 products
# in another order are off by some hundred eps.
EXACT = 1e-12


def by_hand() -> skt.SKConv:
    """An SKConv whose weights follow from the brightness v of a constant image.

    Each branch copies its input. fc1 gives 2v, the sum of the branches, once; fc2 gives the
    dilated branch log(3) / 2 times it in the first four of eight channels: 3 ** v : 1 there.
    """
    sk = skt.SKConv(8, 8, G=8).double()
    with torch.no_grad():
        for parameter in sk.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        for module in sk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-17  # nothing beside 1; torch 2.11 refuses 0
        for branch in sk.branches:
            branch.get_parameter("conv.weight")[:, 0, 1, 1] = 1
        sk.fc1.get_parameter("conv.weight")[0, 0] = 1
        sk.fc2.weight[8:12, 0] = math.log(3) / 2
    return sk


class Calling(nn.Module):
    """A network of one unit, ``sk``, which is called as ``call`` says."""

    def __init__(self, sk: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.sk = sk
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.sk, x)


def bright(*values: float, side: int = 4) -> Tensor:
    """Constant images [B, 8, side, side] of each brightness."""
    images = torch.tensor(values, dtype=torch.float64)[:, None, None, None]
    return images.expand(-1, 8, side, side)


def dilated_weight(v: float) -> float:
    """The mean over channels: half of them share 3 ** v : 1, half are at 1 / 2."""
    return (3**v / (1 + 3**v) + 1 / 2) / 2


def small_net() -> skt.SKNet:
    """Two stages of two units and one, with weights far from 1 / M."""
    net = skt.SKNet(
        (skt.StageSpec(8, 2, 1), skt.StageSpec(16, 1)),
        num_classes=3,
        in_chans=1,
        unit_options={"G": 2, "L": 8},
    )
    return scramble(net).double()


def images_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, 32, 32)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def rows_of(table: pd.DataFrame) -> list[Any]:
    """The rows; pandas leaves open what is in them."""
    return list(table.itertuples())


def assert_same_table(actual: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert_frame_equal(actual, expected, rtol=0, atol=EXACT)


# What is recorded


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_weights_are_those_worked_out_by_hand(backend: Backend) -> None:
    loader = [(bright(1, 2), [7, 3]), (bright(0), [7])]
    with use_backend(backend):
        # Dropout is off, and running statistics are taken.
        net = nn.Sequential(nn.Dropout(0.5), by_hand()).train()
        table = analysis.record_attention(net, loader)
    assert list(table.columns) == [
        *("path", "stage", "index", "label", "images", "difference", "weight_0", "weight_1")
    ]
    assert table.path.tolist() == ["1", "1"]
    assert table.label.tolist() == [3, 7]
    assert table.images.tolist() == [1, 2]
    expected = [dilated_weight(2), (dilated_weight(1) + dilated_weight(0)) / 2]
    assert expected == pytest.approx([0.7, 0.5625])
    assert table.weight_1.tolist() == pytest.approx(expected, abs=EXACT)
    assert table.weight_0.tolist() == pytest.approx([1 - x for x in expected], abs=EXACT)
    assert table.difference.tolist() == pytest.approx([2 * x - 1 for x in expected], abs=EXACT)


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([4, 6]), [4, 6], (4, 6), np.array([4, 6])],
    ids=lambda v: type(v).__name__,
)
def test_labels_come_as_tensor_array_or_sequence(labels: Any) -> None:
    table = analysis.record_attention(by_hand(), [(bright(1, 2), labels)])
    assert table.label.tolist() == [4, 6]
    assert table.weight_1.tolist() == pytest.approx([dilated_weight(1), dilated_weight(2)])


@pytest.mark.parametrize(
    "batch", [bright(1, 2), [bright(1, 2)], (bright(1, 2), None)], ids=range(3)
)
def test_labels_may_be_left_out(batch: Any) -> None:
    (row,) = rows_of(analysis.record_attention(by_hand(), [batch]))
    assert (row.label, row.images) == (pd.NA, 2)
    assert row.weight_1 == pytest.approx((dilated_weight(1) + dilated_weight(2)) / 2)


def test_units_are_numbered_by_stage() -> None:
    units = analysis.sk_units(small_net())
    assert [(u.path, u.stage, u.index) for u in units] == [
        ("stages.0.0.sk", 1, 1),
        ("stages.0.1.sk", 1, 2),
        ("stages.1.0.sk", 2, 1),
    ]
    block = nn.ModuleDict({"conv2": by_hand()})
    other = nn.ModuleDict({"layer1": nn.ModuleList([block]), "last": by_hand(), "end": by_hand()})
    assert [(u.path, u.stage, u.index) for u in analysis.sk_units(other)] == [
        ("layer1.0.conv2", 1, 1),
        ("last", 2, 1),
        ("end", 2, 2),
    ]


def test_a_unit_of_three_branches_beside_one_of_two() -> None:
    net = nn.Sequential(by_hand(), skt.SKConv(8, 8, M=3, G=8).double())
    two, three = rows_of(analysis.record_attention(net, [bright(1)]))
    assert math.isnan(two.weight_2)
    weights = [three.weight_0, three.weight_1, three.weight_2]
    assert sum(weights) == pytest.approx(1)
    assert three.difference == weights[2] - weights[0]
    assert abs(three.difference) > 1e-6


def test_a_unit_that_is_not_called_has_no_row_and_one_called_twice_counts_twice() -> None:
    net = Calling(by_hand(), lambda sk, x: sk(x) + sk(2 * x))
    net.unused = by_hand()
    (row,) = rows_of(analysis.record_attention(net, [bright(1, 1)]))
    assert (row.path, row.images) == ("sk", 4)
    assert row.weight_1 == pytest.approx((dilated_weight(1) + dilated_weight(2)) / 2)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data() -> None:
    alive = []

    def loader() -> Iterator[tuple[Tensor, list[int]]]:
        for _ in range(4):
            gc.collect()
            alive.append(sum(type(x) is Tensor for x in gc.get_objects()))
            yield bright(1, 2), [0, 1]

    analysis.record_sizes(by_hand(), loader())
    # The first batches have not yet made the sums.
    assert alive[2] == alive[3]


# Modules of other packages


# What builds a module, the child whose output holds the weights, and M.
FOREIGN: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "timm": (lambda: SelectiveKernel(8, 4), "attn", 2),
    "timm split": (lambda: SelectiveKernel(8, 4, split=True), "attn", 2),
    "SplitAttn": (lambda: SplitAttn(8, 4, radix=4, groups=2), "rsoftmax", 4),
    "SplitAttn 1": (lambda: SplitAttn(8, 4, radix=1), "rsoftmax", 1),
}


@pytest.mark.parametrize("accelerated", [False, True], ids=["own", "accelerated"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_modules_give_the_weights_that_they_compute(
    name: str, backend: Backend, accelerated: bool
) -> None:
    build, child, M = FOREIGN[name]
    module = scramble(build()).double().eval()
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    seen: list[Tensor] = []
    handle = module.get_submodule(child).register_forward_hook(
        lambda _, __, out: seen.append(out.detach().view(3, M, 4))
    )
    module(x)
    handle.remove()
    if accelerated:
        assert skt.accelerate(module).paths("accelerated") == [""]
    with use_backend(backend):
        table = analysis.record_attention(module, [(x, [0, 1, 2])])
    weights = table.filter(regex="weight_").to_numpy()
    assert np.abs(weights - seen[0].mean(2).numpy()).max() <= EXACT
    assert M == 1 or table.difference.abs().min() > 1e-4


def test_a_swapped_module_called_by_keyword_is_recorded() -> None:
    net = Calling(scramble(SKConvBlock(8, 4, groups=2)).double(), lambda sk, x: sk(x=x))
    images = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    own = analysis.record_attention(net, [images])
    skt.accelerate(net)
    assert_same_table(analysis.record_attention(net, [images]), own)


def test_fusion_of_given_branches_is_recorded() -> None:
    net = Calling(SKFusion(8), lambda sk, x: sk([x, -x])).double()
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    (row,) = rows_of(analysis.record_attention(net, [x]))
    # The branches cancel, and the MLP has no bias: every logit is 0.
    assert (row.path, row.weight_0, row.weight_1) == ("sk", 0.5, 0.5)


# Wrappers


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["the model", "in place", "a unit", "a unit, in place"])
def test_a_compiled_model_is_recorded_and_keeps_its_graph(compiled: str) -> None:
    net, x, counter = small_net().eval(), images_of(3), CompileCounter()
    expected = analysis.record_attention(net, [x])
    model, stage = cast(Any, net), cast(Any, net.stages[0])
    if compiled == "the model":
        model = torch.compile(net, backend=counter)
    elif compiled == "a unit":
        stage[0] = torch.compile(stage[0], backend=counter)
    else:
        (net if compiled == "in place" else stage[0]).compile(backend=counter)
    with torch.no_grad():
        model(x)
        graphs = counter.frame_count
        table = analysis.record_attention(model, [x])
        model(x)
    assert counter.frame_count == graphs > 0
    table["path"] = table.path.str.replace("._orig_mod", "")
    assert_same_table(table, expected)


def test_a_data_parallel_model_is_recorded() -> None:
    net, x = small_net(), images_of(3)
    wrapped = cast(Any, torch.compile(nn.DataParallel(net), backend=CompileCounter()))
    assert_same_table(analysis.record_attention(wrapped, [x]), analysis.record_attention(net, [x]))


@needs_gloo
def test_a_distributed_model_is_recorded_without_a_word_to_the_others(one_process: None) -> None:
    net, x = small_net(), images_of(3)
    expected = analysis.record_attention(net, [x])
    wrapped = nn.parallel.DistributedDataParallel(net)
    calls: list[Any] = []
    wrapped.register_forward_pre_hook(lambda *args: calls.append(args))
    assert_same_table(analysis.record_attention(wrapped, [x]), expected)
    # Its forward sends the buffers round, and waits for processes that may have fewer images.
    assert calls == []


# What is left behind: nothing


class Counting(nn.Module):
    """Writes to a buffer and puts a new one in place, in evaluation too; may raise."""

    def __init__(self, error: type[BaseException] | None) -> None:
        super().__init__()
        self.error = error
        self.took_gradients: list[bool] = []
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        self.last = x.mean()
        self.took_gradients.append(x.requires_grad)
        torch.rand(())
        if self.error is not None:
            raise self.error
        return x


def ends(images: Tensor, error: type[BaseException]) -> Iterator[Tensor]:
    yield images
    raise error


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("nowhere", None),
        ("loader", RuntimeError),
        ("loader", KeyboardInterrupt),
        ("model", RuntimeError),
        ("model", KeyboardInterrupt),
    ],
)
def test_the_model_is_as_it_was(where: str, error: type[BaseException] | None) -> None:
    net = nn.Sequential(small_net(), Counting(error if where == "model" else None))
    net.train()
    cast(Any, net[0]).stages[0].eval()
    net[0](images_of(2)).sum().backward()
    waiting = net[0](images_of(2)).sum()
    counted = net[1].get_buffer("last")
    modes = [m.training for m in net.modules()]
    gradients = [cast(Tensor, p.grad).clone() for p in net.parameters()]
    random = torch.get_rng_state()

    loader: Iterable[Any] = [images_of(2, seed=1)]
    if where == "loader" and error is not None:
        loader = ends(images_of(2, seed=1), error)
    with unchanged(net), nullcontext() if error is None else pytest.raises(error):
        analysis.record_sizes(net, loader)

    assert [m.training for m in net.modules()] == modes
    assert net[1].get_buffer("last") is counted
    for p, before in zip(net.parameters(), gradients, strict=True):
        assert p.requires_grad
        assert torch.equal(cast(Tensor, p.grad), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert set(cast(Any, net[1]).took_gradients) == {False}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    assert not any(getattr(m, name) for m in net.modules() for name in hooks)
    # A graph that was there before still has its backward.
    waiting.backward()


def test_the_random_states_of_the_models_gpus_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu, asked = nn.Identity(), torch.device("cuda", 1), list[Any]()
    there = SimpleNamespace(is_cuda=True, device=gpu)
    monkeypatch.setattr(model, "parameters", lambda: [there, there])

    def fork_rng(gpus: list[torch.device]) -> AbstractContextManager[None]:
        asked.extend(gpus)
        return nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    with record._undisturbed(model):
        assert asked == [gpu]


# What is refused


class Sharper(SelectiveKernel):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


ONE = bright(1)
summing = partial(skt.SKConv, 32, 32, aggregate="sum")
traced = partial(torch.jit.trace, nn.Identity(), ONE)
idle = partial(Calling, by_hand(), lambda sk, x: x)
frames = partial(Calling, by_hand(), lambda sk, x: sk(x.repeat(3, 1, 1, 1)))
# A model, what the loader yields, and what is said.
REFUSED: dict[str, tuple[Callable[[], Any], list[Any], type[Exception], str]] = {
    "no unit": (lambda: nn.Linear(1, 1), [ONE], ValueError, "model: .* got Linear with none$"),
    "a sum": (summing, [ONE], ValueError, r"the model: SKConv\(aggregate='sum'\) has no weights"),
    "another formula": (
        lambda: nn.Sequential(Sharper(8, 4)),
        [ONE],
        ValueError,
        "; 0: timm SelectiveKernel: it computes something else",
    ),
    "idle": (idle, [ONE], ValueError, "got Calling, which called none of its 1"),
    "frames": (frames, [bright(1, 2)], ValueError, "each of 2 images in 'sk', got 6"),
    "no model": (lambda: by_hand, [ONE], TypeError, r"expected a torch\.nn\.Module, got function"),
    "traced": (traced, [ONE], TypeError, "got a TorchScript module"),
    "no batch": (by_hand, [], ValueError, "loader: expected at least one image, got none"),
    "no image": (by_hand, [bright()], ValueError, "loader: expected at least one image, got none"),
    "a dict": (by_hand, [{"image": ONE}], TypeError, "loader: .*got dict$"),
    "three": (by_hand, [(ONE, [0], [0])], TypeError, "loader: .*a tuple of Tensor, list, list$"),
    "a number": (by_hand, [torch.tensor(1.0)], TypeError, r"shape \(\) and torch.float32$"),
    "float labels": (by_hand, [(ONE, torch.zeros(1))], TypeError, "labels, got a tensor of shape"),
    "one-hot": (by_hand, [(ONE, torch.tensor([[0, 1]]))], TypeError, r"\(1, 2\) and torch.int64"),
    "names": (by_hand, [(ONE, ["cat"])], TypeError, "labels, got a list of str$"),
    "one label": (by_hand, [(bright(1, 2), [0])], ValueError, "2 labels, one an image, got 1$"),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(name: str) -> None:
    build, loader, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        analysis.record_attention(build(), loader)


# Sizes


def test_each_scale_sees_the_same_images_enlarged() -> None:
    net, images, labels = small_net(), images_of(4), [0, 1, 1, 0]
    table = analysis.record_sizes(net, iter([(images, labels)]), scales=(2.0, 1.0))
    assert sorted(set(table.scale)) == [1.0, 2.0]
    expected = {}
    for scale in (1.0, 2.0):
        expected[scale] = analysis.record_attention(
            net, [(analysis.enlarge(images, scale), labels)]
        )
        rows = table[table.scale == scale].drop(columns=["scale", "change"])
        assert_same_table(rows.reset_index(drop=True), expected[scale])
    change = table.loc[table.scale == 2.0, "change"].to_numpy()
    assert np.array_equal(change, (expected[2.0].difference - expected[1.0].difference).to_numpy())
    assert np.abs(change).min() > 1e-6
    assert (table.loc[table.scale == 1.0, "change"] == 0).all()


def test_the_change_is_known_where_there_are_no_labels() -> None:
    images = F.pad(bright(1, side=2), (1, 1, 1, 1))
    table = analysis.record_sizes(by_hand(), [images], scales=(1.0, 1e9))
    # A quarter of the image is bright; its middle, very much enlarged, is bright throughout.
    expected = 2 * dilated_weight(1) - 2 * dilated_weight(1 / 4)
    assert table.change.tolist() == pytest.approx([0.0, expected])


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 3.7])
@pytest.mark.parametrize("size", [(4, 7), (5, 6), (1, 3)])
def test_enlarging_a_ramp_reads_the_stated_positions(size: tuple[int, int], scale: float) -> None:
    H, W = size
    rows, columns = torch.arange(H).double()[:, None], torch.arange(W).double()
    out = analysis.enlarge((100 * rows + columns).expand(2, 3, H, W), scale)

    def read(i: Tensor, n: int) -> Tensor:
        # With the middle of pixel i at i + 1/2.
        return n / 2 + (i + 1 / 2 - n / 2) / scale - 1 / 2

    # Bilinear interpolation is exact on what is linear; a few roundings of numbers below 1000.
    assert (out - (100 * read(rows, H) + read(columns, W))).abs().max() < 1e-11


def test_enlarging_is_a_crop_and_a_resize_but_for_the_outermost_pixels() -> None:
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    crop = images[..., 2:6, 3:9]
    expected = F.interpolate(crop, size=(8, 12), mode="bilinear")
    error = analysis.enlarge(images, 2.0) - expected
    assert error[..., 1:-1, 1:-1].abs().max() < 1e-14


def test_enlarging_keeps_dtype_and_sums_in_float32() -> None:
    images = torch.randn(1, 1, 9, 9).bfloat16()
    out = analysis.enlarge(images, 1.7)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, analysis.enlarge(images.float(), 1.7).bfloat16())


@pytest.mark.parametrize(
    ("images", "scale", "error", "message"),
    [
        *(
            (torch.zeros(1, 4, 4), scale, ValueError, "scale: expected a finite number of at least")
            for scale in (0.99, 0.0, -2.0, math.inf, math.nan)
        ),
        (torch.zeros(4, 4).byte(), 2.0, TypeError, r"a floating-point tensor, got torch\.uint8"),
        ([[1.0]], 2.0, TypeError, "images: expected a floating-point tensor, got list"),
        (torch.zeros(4), 2.0, ValueError, r"images: expected shape \[..., H, W\], got \(4,\)"),
    ],
    ids=range(8),
)
def test_what_cannot_be_enlarged_is_refused(
    images: Any, scale: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        analysis.enlarge(images, scale)


def test_scales_without_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scales: expected 1.0 among them, got \(1.5, 2.0\)"):
        analysis.record_sizes(by_hand(), [bright(1)], scales=(1.5, 2.0))


# The table


@pytest.fixture(scope="module")
def sizes() -> pd.DataFrame:
    """Two runs of a network with units of two and three branches, at two scales and classes."""
    net = nn.Sequential(by_hand(), skt.SKConv(8, 8, M=3, G=8).double())
    runs = []
    for seed in (0, 1):
        images = torch.rand(5, 8, 6, 6, dtype=torch.float64)
        table = analysis.record_sizes(net, [(images, [0, 1, 1, 1, 0])], scales=(1.0, 2.0))
        runs.append(table.assign(seed=seed))
    return pd.concat(runs, ignore_index=True)


def test_means_over_classes_weigh_by_images() -> None:
    loader = [(bright(1, 2, 2), [0, 1, 1])]
    whole = analysis.record_attention(by_hand(), [bright(1, 2, 2)])
    means = analysis.over_classes(analysis.record_attention(by_hand(), loader))
    assert list(means.columns) == [c for c in whole.columns if c != "label"]
    assert_same_table(means, whole.drop(columns="label"))


def test_means_over_classes_keep_runs_scales_and_missing_weights_apart(
    sizes: pd.DataFrame,
) -> None:
    means = analysis.over_classes(sizes)
    assert len(means) == 2 * 2 * 2
    assert means.seed.tolist() == 4 * [0] + 4 * [1]
    assert means.weight_2.isna().tolist() == 4 * [True, False]
    assert means.images.tolist() == 8 * [5]


def test_a_csv_gives_the_same_table_back(sizes: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    alone = analysis.record_attention(by_hand(), [bright(1 / 3)])
    assert alone.path.tolist() == [""]
    odd = nn.ModuleDict({"null": by_hand(), "1e3": by_hand()})
    odd.forward = lambda x: odd["1e3"](odd["null"](x))
    named = analysis.record_attention(odd, [bright(1)])
    assert named.path.tolist() == ["null", "1e3"]
    some = sizes.assign(label=sizes.label.where(sizes.label == 0))
    for table in (sizes, alone, named, some):
        analysis.write_csv(table, path)
        assert_frame_equal(analysis.read_csv(path), table, check_exact=True)


def test_a_csv_that_cannot_be_written_leaves_the_earlier_one(
    sizes: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    analysis.write_csv(sizes, path)
    before = path.read_bytes()

    def half(self: pd.DataFrame, draft: Path, **kwargs: Any) -> None:
        draft.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(KeyboardInterrupt):
        analysis.write_csv(sizes, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_another_csv_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("path,images\nx,1\n")
    with pytest.raises(ValueError, match=r"got one without \['difference', 'label'\]"):
        analysis.read_csv(path)


# Figures


def test_units_are_drawn_as_a_line_for_each_scale(sizes: pd.DataFrame, tmp_path: Path) -> None:
    figure = analysis.plot_units(sizes)
    (panel,) = figure.axes
    handles, names = panel.get_legend_handles_labels()
    assert names == ["1x", "2x"]
    means = analysis.over_classes(sizes)
    for handle, scale in zip(handles, (1.0, 2.0), strict=True):
        of_scale = means[means.scale == scale]
        expected = [of_scale[of_scale.path == path].difference.mean() for path in ("0", "1")]
        assert cast(Any, handle).get_ydata().tolist() == pytest.approx(expected)
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1.1", "1.2"]
    low, high = panel.collections[0].get_datalim(panel.transData).intervaly
    of_scale = means[means.scale == 1.0]
    assert low == pytest.approx(of_scale.difference.min())
    assert high == pytest.approx(of_scale.difference.max())
    analysis.save_figure(figure, tmp_path / "units.png")
    (written,) = tmp_path.iterdir()
    assert written.read_bytes().startswith(b"\x89PNG")


def test_classes_are_drawn_in_a_panel_for_each_unit(sizes: pd.DataFrame, tmp_path: Path) -> None:
    figure = analysis.plot_classes(sizes)
    assert [panel.get_title() for panel in figure.axes] == ["1.1  (0)", "1.2  (1)"]
    for panel, path in zip(figure.axes, ("0", "1"), strict=True):
        rows = sizes[(sizes.path == path) & (sizes.scale == 2.0)]
        expected = [rows[rows.label == label].difference.mean() for label in (0, 1)]
        drawn = cast(Any, panel.get_legend_handles_labels()[0][1]).get_ydata().tolist()
        assert drawn == pytest.approx(expected)
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["0", "1"]
    analysis.save_figure(figure, tmp_path / "classes.svg")
    assert b"<svg" in (tmp_path / "classes.svg").read_bytes()


def test_a_table_without_scales_is_one_line_and_without_labels_has_no_classes() -> None:
    table = analysis.record_attention(by_hand(), [bright(1)])
    assert analysis.plot_units(table).axes[0].get_legend_handles_labels()[1] == ["1x"]
    with pytest.raises(ValueError, match="table: expected at least one row"):
        analysis.plot_classes(table)


def test_without_matplotlib_a_figure_names_the_extra(
    sizes: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sknet-triton\[analysis\]'"):
        analysis.plot_units(sizes)
