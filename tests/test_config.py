"""Launch configurations are pure, legal and sensible over the shapes people use."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from perf.static.specialisations import NETWORK_STAGES, Setting
from sknet_kernels.arguments import problem_of
from sknet_kernels.config import (
    FUSE,
    MAX_BRANCHES,
    MOMENTS,
    SELECT,
    STREAMING_KERNELS,
    SUMS,
    DeviceFacts,
    Problem,
    StreamingKernel,
    cdiv,
    next_power_of_two,
)
from sknet_kernels.small import (
    HIDDEN,
    HIDDEN_BWD,
    LOGITS,
    MOMENTS_FINISH,
    SMALL_KERNELS,
    SmallConfig,
    SmallKernel,
    SmallProblem,
)

H200 = DeviceFacts(multiprocessors=132, warp_size=32)
MI300 = DeviceFacts(multiprocessors=304, warp_size=64, backend="hip")


def branch(B: int, C: int, S: int, itemsize: int, channels_last: bool) -> Tensor:
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    if channels_last:
        return torch.empty(B, S, C, dtype=dtype, device="meta").transpose(1, 2)
    return torch.empty(B, C, S, dtype=dtype, device="meta")


PROBLEMS = [
    problem_of([branch(B, C, S, itemsize, channels_last)] * M, M)
    for B, C, S, M, itemsize, channels_last in itertools.product(
        (0, 1, 128),
        (1, 24, 63, 128, 1024),
        (1, 49, 101, 196, 3136, 50176),
        (1, 2, 3, MAX_BRANCHES),
        (2, 4, 8),
        (False, True),
    )
]

kernels = pytest.mark.parametrize("kernel", STREAMING_KERNELS, ids=lambda kernel: kernel.name)


def is_power_of_two(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


@kernels
@pytest.mark.parametrize("device", [H200, MI300], ids=["H200", "MI300"])
def test_heuristics_and_candidates_are_legal_and_few(
    device: DeviceFacts, kernel: StreamingKernel
) -> None:
    for problem in PROBLEMS:
        found = kernel.candidates(problem, device)
        first = found[0]
        assert first == kernel.heuristic(problem, device), problem
        assert first.num_warps <= 4, problem
        assert first.block_c * first.block_s <= 4 * device.warp_size * first.access, problem
        assert len(set(found)) == len(found) <= 17, problem
        for config in found:
            sizes = (config.block_c, config.block_s, config.num_warps, config.access)
            assert all(map(is_power_of_two, sizes)), problem
            assert config.block_c <= next_power_of_two(problem.C), problem
            assert config.block_s <= next_power_of_two(problem.row), problem
            assert config.access <= problem.align, problem
            assert 1 <= config.num_stages <= 4, problem
            assert config.num_warps <= 8, problem
            elements, threads = config.block_c * config.block_s, device.warp_size * config.num_warps
            assert config.num_warps == 1 or elements >= threads * config.access, problem
            held = max(config.access, elements // threads)
            assert config == first or kernel.registers(problem, held) <= 204, problem
            tiles = kernel.tiles(problem, config)
            each = cdiv(tiles, config.splits)
            # Every split has a tile, and none is left over.
            assert each * config.splits >= tiles, problem
            assert config.splits == 1 or each * (config.splits - 1) < tiles, problem
            # Partial sums fit into the second-level cache.
            assert config.splits == 1 or config.splits * kernel.partial_bytes(problem) <= 8 << 20


@pytest.mark.parametrize(("hip", "warp_size", "backend"), [(None, 32, "cuda"), ("6.4", 64, "hip")])
def test_a_device_is_asked_for_what_launches_depend_on(
    hip: str | None, warp_size: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", warp_size)  # what is asked is remembered: no device of others
    said = SimpleNamespace(multi_processor_count=304, warp_size=warp_size, name="a GPU")
    module = SimpleNamespace(get_device_properties={device: said}.get)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert DeviceFacts.of(device) == DeviceFacts(304, warp_size, "a GPU", backend)


def test_candidates_differ_in_every_field_where_the_heuristics_leave_room() -> None:
    problem = problem_of([branch(32, 256, 784, 2, True)] * 2, 2)
    first, *rest = FUSE.candidates(problem, H200)
    assert len(rest) >= 10
    for name in ("block_c", "block_s", "splits", "num_warps", "num_stages", "access"):
        assert any(getattr(config, name) != getattr(first, name) for config in rest), name


@kernels
def test_rows_are_split_until_the_device_is_full_and_no_further(kernel: StreamingKernel) -> None:
    for problem in PROBLEMS:
        config = kernel.heuristic(problem, H200)
        rows, tiles = max(1, kernel.rows(problem, config)), max(1, kernel.tiles(problem, config))
        enough = 132 * 32 // config.num_warps
        assert config.splits <= max(1, cdiv(enough, rows)), problem
        partial = kernel.partial_bytes(problem)
        if 2 * config.splits * partial <= 8 << 20:
            # Even parts can leave up to half of the programs that were wanted.
            assert config.splits * rows >= min(tiles * rows, enough) / 2, problem


def test_a_thread_may_take_all_registers_where_there_is_such_an_option() -> None:
    for M in (1, 2, MAX_BRANCHES):
        asked = Setting(M, "contiguous", torch.bfloat16, (2, 16, 64)).training(H200)
        assert {launch.options["maxnreg"] for launch in asked} == {255}
        for launch in Setting(M, "contiguous", torch.bfloat16, (2, 16, 64)).training(MI300):
            assert "maxnreg" not in launch.options


# A pass, the small kernel that joins its parts, how often a turn over parts waits for memory, and
# the rows that a part has of a channel for each that the pass sums.
JOINS: tuple[tuple[StreamingKernel, SmallKernel, int, float], ...] = (
    (MOMENTS, MOMENTS_FINISH, 2, 3 / 2),  # sizes beside means and deviations
    (FUSE, HIDDEN, 1, 1.0),
    (SUMS, HIDDEN_BWD, 2, 1.0),
)


@pytest.mark.parametrize(
    ("pass_", "joining", "waits_of_turn", "rows"), JOINS, ids=lambda x: getattr(x, "name", "")
)
def test_parts_are_joined_in_a_fifth_of_the_time_of_the_pass_that_made_them(
    pass_: StreamingKernel, joining: SmallKernel, waits_of_turn: int, rows: float
) -> None:
    """Modelled, not measured: waits of 1,100 cycles at 1.7 GHz; 3.0 TB/s, 5.5 from the cache.

    Joining is what more than one part costs.
    """
    for channels_last, (C, S), B, M in itertools.product(
        (False, True), NETWORK_STAGES, (32, 128), (2, 3)
    ):
        problem = problem_of([branch(B, C, S, 2, channels_last)] * M, M)
        splits = pass_.heuristic(problem, H200).splits
        branches = M if pass_.sums[0] else 1
        small = SmallProblem(B, C, branches, d=max(32, C // 16), parts=splits)
        config = joining.heuristic(small, H200)
        # The parts of moments are those of a program's channels, of the others one block's in turn.
        blocks = 1 if joining is MOMENTS_FINISH else cdiv(C, config.block_c)
        waits = (cdiv(splits, config.block_p) - 1) * blocks * waits_of_turn
        joined = (splits - 1) * rows * pass_.partial_bytes(problem)
        moved = pass_.passes(M) * B * C * S * 2
        seconds = waits * 1100 / 1.7e9 + joined / 5.5e12
        assert seconds <= moved / 3.0e12 / 5, (problem, splits, config)


@pytest.mark.parametrize("kernel", SMALL_KERNELS, ids=lambda kernel: kernel.name)
def test_candidates_of_small_kernels_differ_in_one_size_within_its_limits(
    kernel: SmallKernel,
) -> None:
    sizes = itertools.product((0, 1, 128), (1, 24, 1024), (1, 2, 8), (1, 5, 128), (1, 7, 1024))
    for problem in [SmallProblem(B, C, M, d, parts) for B, C, M, d, parts in sizes]:
        first, *rest = kernel.candidates(problem, H200)
        assert first == kernel.heuristic(problem, H200), problem
        assert kernel.programs(problem, first) >= (problem.B > 0), problem
        for config in rest:
            (name,) = [n for n in vars(config) if getattr(config, n) != getattr(first, n)]
            least, most = kernel.sizes[name]
            size, before = getattr(config, name), getattr(first, name)
            assert least <= size <= most, problem
            assert size in (before // 2, before * 2), problem
            assert is_power_of_two(size) or name == "block_p", problem
        assert len(set(rest)) == len(rest), problem


def test_every_size_of_a_small_kernel_is_tried_where_there_is_room() -> None:
    for kernel in SMALL_KERNELS:
        problem = SmallProblem(128, 4096, 2, 256, 1024)
        first, *rest = kernel.candidates(problem, H200)
        changed = {n for config in rest for n in kernel.sizes if vars(config)[n] != vars(first)[n]}
        assert changed == set(kernel.sizes)


def test_small_kernels_take_the_tile_whose_busiest_multiprocessor_reads_least() -> None:
    # A wave of tiles of 16 rows of 16 images, or eight of them where two of 32 do.
    assert LOGITS.heuristic(SmallProblem(128, 128, 2, 32), H200).block_n == 16
    assert LOGITS.heuristic(SmallProblem(128, 1024, 2, 64), H200).block_n == 32
    problem = SmallProblem(128, 128, 2, 32, 4)
    config = SmallConfig(block_b=16, block_n=16)
    assert LOGITS.busiest(problem, config, H200) == 32 * (128 + 16 + 16)
    config = SmallConfig(block_b=1, block_d=32)
    assert HIDDEN_BWD.busiest(problem, config, H200) == 2 * 128 * (4 * 4 + 1 + 32)


def test_rows_lie_along_the_contiguous_axis() -> None:
    nchw = SELECT.heuristic(problem_of([branch(8, 128, 3136, 2, False)], 1), H200)
    nhwc = SELECT.heuristic(problem_of([branch(8, 128, 3136, 2, True)], 1), H200)
    assert nchw.block_s * 2 >= 128
    assert nhwc.block_c * 2 >= 128


def test_a_thread_holds_less_where_a_kernel_keeps_more() -> None:
    few, many = (problem_of([branch(8, 128, 3136, 2, True)] * M, M) for M in (2, MAX_BRANCHES))
    for kernel in (SUMS, MOMENTS):
        assert kernel.heuristic(few, H200).access == 8
        assert kernel.heuristic(many, H200).access < 8
    assert MOMENTS.heuristic(many, H200).access == 4


@pytest.mark.parametrize(
    ("shape", "channels_last", "align", "layout"),
    [
        ((2, 8, 3136), False, 8, "rows"),
        ((2, 8, 196), False, 4, "rows"),
        ((2, 8, 49), False, 8, "shifted"),
        ((2, 4, 49), False, 4, "shifted"),
        ((2, 3, 49), False, 1, "rows"),
        ((2, 16, 49), True, 8, "channels_last"),
        ((2, 12, 49), True, 4, "channels_last"),
        ((2, 16, 1), False, 8, "channels_last"),
    ],
)
def test_how_many_elements_are_read_at_once_and_where(
    shape: tuple[int, int, int], channels_last: bool, align: int, layout: str
) -> None:
    problem = problem_of([branch(*shape, 2, channels_last)], 1)
    assert (problem.align, problem.layout) == (align, layout)


def test_alignment_drops_with_the_least_aligned_tensor() -> None:
    x, odd_rows = branch(2, 8, 16, 2, False), branch(2, 8, 17, 2, False)[:, :, :16]
    assert problem_of([x], 1).align == 8
    assert problem_of([x, odd_rows], 2).align == 1
    assert problem_of([x, x.sum().expand(2, 8, 16)], 2).align == 8


def test_rows_with_gaps_between_them_are_not_read_across() -> None:
    gaps = branch(2, 8, 50, 2, False)[:, :, :49]
    assert problem_of([gaps], 1) == Problem(2, 8, 49, 1, 2, False, 1)
