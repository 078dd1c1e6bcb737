"""Sizes at the edges: more than 2^31 elements, grids of a million rows, one of everything, none."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perf.static.specialisations import LAYOUTS, Setting, streaming_kernel
from sknet_kernels.config import DeviceFacts, LaunchConfig, cdiv
from sknet_kernels.norms import Norms
from sknet_kernels.sk_fuse import sk_fuse_fwd
from sknet_kernels.sk_fuse_select import sk_fuse_select_dx, sk_fuse_select_sums
from sknet_kernels.sk_moments import sk_moments
from sknet_kernels.sk_select import sk_select_bwd, sk_select_fwd
from sknet_triton import Backend, SKConv, functional, reference, use_backend
from sknet_triton.reference import steps
from tests.address_arithmetic import narrow_offsets
from tests.helpers import (
    BACKENDS,
    DEVICE,
    Seen,
    assert_same,
    averaged,
    beside_branches,
    outcome,
    run_python,
    trained,
    weighed,
    weights,
)
from tests.launchers import kernel_names, select, select_bwd, tiled

both = pytest.mark.parametrize("backend", BACKENDS)


# --- more than 2^31 elements, by strides --------------------------------------------------------

# Every tensor lies in the second half of the storage: an offset that wraps around, between -2^31
# and 2^31, still hits memory of this test, zeros, rather than none.
STORAGE = 2**32 + 2**20
START = 2**31 + 5
ROOM = 256  # elements between the tensors' first elements


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tensor]:
    """Eight GiB of zeros in float16: on a CPU a sparse file, of which touched pages exist."""
    if torch.cuda.is_available():
        if torch.cuda.mem_get_info()[0] < 3 * STORAGE:
            pytest.skip("needs 13 GB of free GPU memory")
        yield torch.zeros(STORAGE, dtype=torch.float16, device="cuda")
        return
    path = tmp_path_factory.mktemp("sparse") / "storage"
    yield torch.from_file(str(path), shared=True, size=STORAGE, dtype=torch.float16)
    assert 512 * path.stat().st_blocks < 2**24  # nothing was written but what the tests placed
    path.unlink()


@dataclass(frozen=True)
class Far:
    """Strides [B, C, S] by which a small tensor spans more than 2^31 elements, and its sizes."""

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    why: str

    def __str__(self) -> str:
        return self.why


# The products of index and stride pass 2^31 where the strides themselves do not, or at once.
FAR = (
    Far((3, 2, 4), (2**30 + 8, 8, 1), "images"),
    Far((2, 2, 4), (2**31 + 8, 8, 1), "images by one stride"),
    Far((3, 2, 4), (2**30 + 8, 1, 2), "images, channels last"),
    Far((2, 3, 4), (16, 2**30 + 8, 1), "channels"),
    Far((2, 2, 4), (16, 2**31 + 8, 1), "channels by one stride"),
    Far((2, 3, 2), (3, 1, 2**31 + 8), "positions, channels last"),
    Far((1, 1, 2), (1, 1, 2**31 + 8), "positions of one plane"),
)


Place = Callable[[Tensor, Sequence[int]], Tensor]


@pytest.fixture
def place(storage: Tensor) -> Place:
    """Places tensors by strides, one after the other in the storage."""
    starts = itertools.count(START, ROOM)

    def placed(values: Tensor, strides: Sequence[int]) -> Tensor:
        return storage.as_strided(values.shape, strides, next(starts)).copy_(values)

    return placed


WHOLE = LaunchConfig(block_c=2, block_s=2, splits=1, num_warps=1)
SPLIT = LaunchConfig(block_c=2, block_s=2, splits=2, num_warps=1)


both_tilings = pytest.mark.parametrize("config", [WHOLE, SPLIT], ids=["whole", "split"])


@both_tilings
@pytest.mark.parametrize("far", FAR, ids=str)
def test_fuse_and_select_beyond_2_to_the_31(far: Far, config: LaunchConfig, place: Place) -> None:
    (B, C, _), values = far.shape, [randn(i, *far.shape) for i in range(2)]
    dout, logits = randn(8, *far.shape), randn(9, B, 2, C)
    xs = tuple(place(x, far.strides) for x in values)
    out, *dxs = (place(torch.zeros_like(dout), far.strides) for _ in range(3))
    with tiled(config):
        pooled = sk_fuse_fwd(xs)
        sk_select_fwd(out, xs, logits)
        dlogits = sk_select_bwd(tuple(dxs), place(dout, far.strides), xs, logits)
    exact_dxs, exact_dlogits = reference.sk_select_bwd(dout, values, logits)
    exact = (reference.sk_fuse(values), reference.sk_select(values, logits), exact_dlogits)
    all_close((pooled, out, dlogits, *dxs), (*exact, *exact_dxs))


@both_tilings
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 2, 2), (2**30 + 8, 2, 1)),
        ((2, 3, 2), (2, 2**30 + 8, 1)),
        ((2, 2, 3), (2, 1, 2**30 + 8)),
    ],
    ids=["images", "branches", "channels"],
)
def test_logits_beyond_2_to_the_31(
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    config: LaunchConfig,
    place: Place,
) -> None:
    (B, M, C), logits = shape, randn(9, *shape)
    far_logits = place(logits, strides)
    xs, dout = [randn(i, B, C, 4) for i in range(M)], randn(8, B, C, 4)
    out = select(xs, far_logits, config=config)
    _, dlogits = select_bwd(dout, xs, far_logits, config=config)
    exact = reference.sk_select(xs, logits), reference.sk_select_bwd(dout, xs, logits)[1]
    all_close((out, dlogits), exact)


@pytest.mark.parametrize("far", FAR, ids=str)
def test_fuse_select_beyond_2_to_the_31(far: Far, place: Place) -> None:
    (B, C, _), values = far.shape, [randn(i, *far.shape) for i in range(2)]
    xs, dout = tuple(place(x, far.strides) for x in values), randn(8, *far.shape)
    dxs = tuple(place(torch.zeros_like(dout), far.strides) for _ in range(2))
    far_dout = place(dout, far.strides)
    mean, gamma = randn(10, 2, C).float(), randn(11, 2, C).float()
    # Most of what is normalised passes the ReLU.
    var, beta = torch.ones_like(mean), torch.full_like(mean, 3.0)
    norms = Norms(tuple(mean), tuple(var), tuple(gamma), tuple(beta), 0.0)
    logits, share, drift = randn(12, B, 2, C), randn(13, B, C).float(), randn(14, 2, 2, C).float()

    with tiled(SPLIT):
        close(sk_moments(xs)[0], steps.moments(values)[0])
        sums = sk_fuse_select_sums(far_dout, xs, norms)
    close(sums.sum(0), steps.sums(dout, values, norms))
    with tiled(WHOLE):
        sk_fuse_select_dx(dxs, far_dout, xs, norms, logits, share, drift)
    all_close(dxs, steps.dx(dout, values, logits.float(), norms, share, drift))


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).half().to(DEVICE)


def close(actual: Tensor, exact: Tensor) -> None:
    # Four numbers or fewer are added, in float32: of a result in float16 its one rounding, which
    # falls on the neighbour where the sum lies half between two; and nothing is zero by chance.
    eps = torch.finfo(actual.dtype).eps
    assert not torch.equal(exact, torch.zeros_like(exact))
    torch.testing.assert_close(actual, exact.to(actual.dtype), rtol=16 * eps, atol=16 * eps)


def all_close(actual: Iterable[Tensor], exact: Iterable[Tensor]) -> None:
    for x, expected in zip(actual, exact, strict=True):
        close(x, expected)


# --- the same in what the compiler makes --------------------------------------------------------


@pytest.mark.slow
def test_no_compiled_offset_is_32_bits_wide() -> None:
    """The interpreter's widths are not the compiler's: it counts positions in 32 bits."""
    printed = run_python("-m", "tests.address_arithmetic", TRITON_INTERPRET="0")
    assert set(printed.splitlines()) == kernel_names()  # and no line with a find


NARROW = """
    %n = arith.muli %i, %stride : i32
    %w = arith.extsi %n : i32 to i64
    %last = scf.for %k = %c0 to %c9 step %c1 iter_args(%o = %c0_i64) -> (i64)  : i64 {
      %p = tt.addptr %x, %o : !tt.ptr<f32>, i64
      %next = arith.addi %o, %w : i64
      scf.yield %next : i64
    }
"""


def test_a_32_bit_product_is_found_through_a_loop() -> None:
    assert narrow_offsets(NARROW) == ["%n = arith.muli %i, %stride : i32"]
    assert narrow_offsets(NARROW.replace("%o", "%sum.0")) == narrow_offsets(NARROW)
    assert narrow_offsets(NARROW.replace("%stride : i32", "%stride : i64")) == []
    known_multiple = "    %i = arith.divsi %m, %stride : i32\n"
    assert narrow_offsets(known_multiple + NARROW) == []


# --- grids --------------------------------------------------------------------------------------

H100 = DeviceFacts(multiprocessors=132, warp_size=32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (1_000_000, 1, 1),
        (1, 1_000_000, 1),
        (1000, 1000, 1),
        (65_536, 1, 49),
        (1, 65_536, 49),
        (512, 2048, 49),
        (256, 256, 3136),
        (1, 1, 2**31 + 1),
    ],
    ids=str,
)
def test_grids_stay_within_their_limit(shape: tuple[int, int, int], layout: str) -> None:
    B, C, S = shape
    launches = Setting(2, layout, torch.bfloat16, shape).launches(H100)
    for launch in launches:
        assert 1 <= launch.programs < 2**31, launch.kernel
    for launch in filter(streaming_kernel, launches):
        tile, splits = launch.constants["TILE"], launch.scalars["splits"]
        blocks, covered = cdiv(C, tile.block_c), launch.scalars["tiles"] * splits * tile.block_s
        if launch.kernel.__name__ == "_sk_moments_kernel":
            assert launch.programs == blocks * splits
            assert covered >= B * S
        else:
            assert launch.programs == B * blocks * splits, launch.kernel
            assert covered >= S, launch.kernel


# The interpreter has no limit that a grid could break, and takes minutes for 70,000 programs.
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 70_000, 1), (70_000, 1, 1), (70_000, 3, 5)], ids=str)
def test_more_rows_than_a_grid_has_in_y_and_z(shape: tuple[int, int, int]) -> None:
    xs, (B, C, _) = [randn(i, *shape) for i in range(2)], shape
    logits, dout = randn(2, B, 2, C), randn(3, *shape)
    leaves = [t.requires_grad_() for t in (*xs, logits)]
    results = []
    for backend in BACKENDS:
        with use_backend(backend):
            out = functional.sk_select(leaves[:2], leaves[2])
            pooled = functional.sk_fuse(leaves[:2])
            results.append([out, pooled, *torch.autograd.grad(out, leaves, dout)])
    all_close(*results)


# --- one position, no image, no channel ---------------------------------------------------------

EMPTY = ((0, 3, 4, 4), (2, 0, 4, 4), (0, 0, 4, 4), (0, 3, 1), (0, 3, 2, 2, 2))
ONE_POSITION = ((1, 1, 1), (3, 5, 1), (2, 3, 1, 1), (2, 3, 1, 1, 1))


@both
@pytest.mark.parametrize("shape", EMPTY + ONE_POSITION, ids=str)
def test_stages_of_nothing_and_of_one_position(shape: tuple[int, ...], backend: Backend) -> None:
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2)]
    leaves.append(torch.randn(shape[0], 2, shape[1], device=DEVICE, requires_grad=True))
    *xs, logits = (x.detach().double().requires_grad_() for x in leaves)
    with use_backend(backend):
        pooled, out = functional.sk_fuse(leaves[:2]), functional.sk_select(leaves[:2], leaves[2])
        grads = torch.autograd.grad(out.sum() + pooled.sum(), leaves)
    exact = averaged(xs), weighed(xs, weights(logits))
    exact_grads = torch.autograd.grad(exact[0].sum() + exact[1].sum(), [*xs, logits])
    for actual, expected in zip((pooled, out, *grads), (*exact, *exact_grads), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("batch_stats", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 1, 1), (1, 3, 1, 1)], ids=str)
def test_fuse_select_with_little_or_nothing(
    shape: tuple[int, ...], batch_stats: bool, backend: Backend
) -> None:
    xs = [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2)]
    some = shape[1] > 0  # torch's batch norm of no channels takes no weight
    options: dict[str, Any] = {"batch_stats": batch_stats, "dtype": torch.float32}
    arguments = beside_branches(2, shape[1], affine=some, **options)
    arguments["fc1_norm"] = beside_branches(2, 1, **options)["fc1_norm"]
    leaves = [*xs, *trained(arguments)]
    refused = batch_stats and shape[0] < 2
    raised = pytest.raises(ValueError, match="batch") if refused else nullcontext()
    with use_backend(backend), raised:
        out, *statistics = functional.sk_fuse_select(xs, **arguments)
    if refused:
        return
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert out.shape == shape
    assert out.isfinite().all()
    assert [x is not None and bool(x.isfinite().all()) for x in statistics] == 4 * [batch_stats]
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()
        assert not (0 in shape and grad.any())


@pytest.mark.parametrize("size", [(0, 5, 5), (2, 1, 1), (1, 1, 1)], ids=str)
def test_skconv_in_eval_mode_with_little_or_nothing(size: tuple[int, int, int]) -> None:
    B, H, W = size
    sk = SKConv(4, 8, G=2, d=4, device=DEVICE).eval()
    x = torch.randn(B, 4, H, W, device=DEVICE)
    seen: list[Seen] = []
    for backend in BACKENDS:
        with use_backend(backend):
            seen.append(outcome(sk, sk, x))
    exact, actual = seen
    assert_same(actual, exact, bound=1e-5)
    assert exact["out"].shape == (B, 8, H, W)


@both
def test_an_empty_batch_in_training_is_what_it_is_to_batch_norm(backend: Backend) -> None:
    sk = SKConv(4, 8, G=2, d=4, device=DEVICE).train()
    x = torch.randn(0, 4, 5, 5, device=DEVICE)
    bn = nn.BatchNorm2d(8, device=DEVICE).train()
    bn(torch.empty(0, 8, 5, 5, device=DEVICE))
    with use_backend(backend):
        seen = outcome(sk, sk, x)
    assert seen["out"].shape == (0, 8, 5, 5)
    for branch in sk.branches:
        for name, buffer in bn.named_buffers():
            assert torch.equal(branch.get_submodule("bn").get_buffer(name), buffer), name
    for name, _ in sk.named_parameters():
        assert not seen[f"grad {name}"].any(), name
