"""Launch configurations are pure, legal and sensible over the shapes people use."""

import itertools

import pytest
import torch

from sknet_kernels.arguments import common_alignment
from sknet_kernels.config import MAX_BRANCHES, DeviceFacts, LaunchConfig, Problem, cdiv

H200 = DeviceFacts(multiprocessors=132, warp_size=32)
MI300 = DeviceFacts(multiprocessors=304, warp_size=64)

PROBLEMS = [
    Problem(B, C, S, M, itemsize, channels_last)
    for B, C, S, M, itemsize, channels_last in itertools.product(
        (0, 1, 128),
        (1, 24, 63, 128, 1024),
        (1, 49, 101, 196, 3136, 50176),
        (1, 2, 3, MAX_BRANCHES),
        (2, 4, 8),
        (False, True),
    )
]


def is_power_of_two(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


@pytest.mark.parametrize("device", [H200, MI300], ids=["H200", "MI300"])
def test_configurations_are_legal(device: DeviceFacts) -> None:
    for problem in PROBLEMS:
        for config in (
            LaunchConfig.elementwise(problem, device),
            LaunchConfig.reduction(problem, device, sums=problem.num_branches),
        ):
            assert is_power_of_two(config.block_c), problem
            assert is_power_of_two(config.block_s), problem
            assert is_power_of_two(config.num_warps), problem
            assert config.num_warps <= 4, problem
            tile_bytes = config.block_c * config.block_s * problem.itemsize
            assert tile_bytes <= 8192, problem
            assert config.splits >= 1, problem
            assert config.span(problem.S) * config.splits >= problem.S, problem
            assert config.span(problem.S) * (config.splits - 1) < problem.S, problem


def test_elementwise_programs_fill_the_device_and_no_more() -> None:
    enough = 2 * H200.multiprocessors * 8
    for problem in PROBLEMS:
        config = LaunchConfig.elementwise(problem, H200)
        rows = max(1, problem.B * cdiv(problem.C, config.block_c))
        tiles = cdiv(problem.S, config.block_s)
        assert config.splits <= max(1, cdiv(enough, rows)), problem
        # Even spans can leave up to half of the programs that were wanted.
        assert config.splits * rows >= min(tiles * rows, enough) / 2, problem


def test_moments_split_images_and_positions_into_parts() -> None:
    for problem in PROBLEMS:
        config = LaunchConfig.moments(problem, H200)
        tiles = problem.B * cdiv(problem.S, config.block_s)
        per_part = cdiv(tiles, config.splits)
        assert per_part * config.splits >= tiles, problem
        assert config.splits == 1 or per_part * (config.splits - 1) < tiles, problem


def test_partial_sums_stay_under_a_hundredth_of_the_branches() -> None:
    for problem in PROBLEMS:
        config = LaunchConfig.reduction(problem, H200, sums=2)
        if config.splits > 1:
            written_and_read = 2 * 2 * config.splits * max(4, problem.itemsize)
            assert written_and_read <= problem.num_branches * problem.S * problem.itemsize / 100


def test_a_small_batch_is_split_and_a_large_one_is_not() -> None:
    small = LaunchConfig.reduction(Problem(1, 128, 3136, 2, 2, False), H200, sums=1)
    large = LaunchConfig.reduction(Problem(1024, 128, 3136, 2, 2, False), H200, sums=1)
    assert small.splits > 1
    assert large.splits == 1


def test_rows_lie_along_the_contiguous_axis() -> None:
    nchw = LaunchConfig.elementwise(Problem(8, 128, 3136, 2, 2, False), H200)
    nhwc = LaunchConfig.elementwise(Problem(8, 128, 3136, 2, 2, True), H200)
    assert nchw.block_s * 2 >= 128
    assert nhwc.block_c * 2 >= 128


@pytest.mark.parametrize(
    ("shape", "channels_last", "alignment"),
    [
        ((2, 8, 3136), False, 16),
        ((2, 8, 196), False, 4),
        ((2, 8, 49), False, 1),
        ((2, 16, 3136), True, 1),
    ],
)
def test_alignment_is_what_every_row_shares(
    shape: tuple[int, int, int], channels_last: bool, alignment: int
) -> None:
    x = torch.empty(shape, device="meta")
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert common_alignment([x]) == alignment


def test_alignment_drops_with_the_least_aligned_tensor() -> None:
    x = torch.empty(2, 8, 16, device="meta")
    odd_rows = torch.empty(2, 8, 17, device="meta")[:, :, :16]
    assert common_alignment([x]) == 16
    assert common_alignment([x, odd_rows]) == 1
    assert common_alignment([x, x.sum().expand(2, 8, 16)]) == 16
