"""Launch configurations as pure functions of shape, dtype, layout and device.

A tile of BLOCK_C channels by BLOCK_S positions is what one program holds of every branch at once.
Its long side lies along the contiguous axis, for wide and coalesced accesses.
"""

import functools
from dataclasses import dataclass

import torch

MAX_BRANCHES = 8

# Elements of one branch in a tile, by the number of branches up to the limit. A backward program
# holds M branches, M sums and the incoming gradient: registers bound the product.
_TILE_ELEMENTS = ((2, 2048), (4, 1024), (MAX_BRANCHES, 512))

# A row of a tile fills whole memory transactions.
_MIN_ROW_BYTES = 128
_MAX_BLOCK_C_CHANNELS_LAST = 128
_ACCESS_BYTES = 16
_MAX_WARPS = 4
_PROGRAMS_PER_MULTIPROCESSOR = 8
_WAVES = 2
_BYTES_PER_PARTIAL_BYTE = 100
_LEAST_TILES_PER_PART = 4
# Running sums that a program holds, tiles times their elements. More of them spill registers.
_MOST_ACCUMULATORS = 6144


@dataclass(frozen=True)
class DeviceFacts:
    """What the heuristics know of a device."""

    multiprocessors: int
    warp_size: int

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> "DeviceFacts":
        """Asks ``device``; the interpreter, on a CPU, runs one program at a time."""
        if device.type in ("cpu", "meta"):
            return cls(multiprocessors=1, warp_size=32)
        properties = torch.get_device_module(device).get_device_properties(device)
        return cls(properties.multi_processor_count, getattr(properties, "warp_size", 32))


@dataclass(frozen=True)
class Problem:
    """Sizes of one call: ``num_branches`` tensors [B, C, S] of ``itemsize`` bytes an element."""

    B: int
    C: int
    S: int
    num_branches: int
    itemsize: int
    channels_last: bool


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes (powers of two), programs that share a row's positions, and warps a program."""

    block_c: int
    block_s: int
    splits: int
    num_warps: int

    @classmethod
    def elementwise(cls, problem: Problem, device: DeviceFacts) -> "LaunchConfig":
        """For a kernel that writes what it reads: a row is split as far as the device needs.

        Programs are several waves, for balance, but no more: each reads its channels' parameters.
        """
        block_c, block_s = _tile(problem, sums=1)
        rows = max(1, problem.B * cdiv(problem.C, block_c))
        wanted = cdiv(_WAVES * device.multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR, rows)
        splits = _even_splits(problem.S, block_s, wanted)
        return cls(block_c, block_s, splits, _num_warps(block_c * block_s, problem, device))

    @classmethod
    def reduction(cls, problem: Problem, device: DeviceFacts, sums: int) -> "LaunchConfig":
        """For a kernel whose programs walk along S and keep ``sums`` sums a channel and image.

        A row is split over programs as far as the device needs to be full, while the partial sums
        written and read again stay a small share of the branches' own bytes.
        """
        block_c, block_s = _tile(problem, sums)
        rows = max(1, problem.B * cdiv(problem.C, block_c))
        wanted = cdiv(device.multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR, rows)
        partial_bytes = 2 * sums * max(4, problem.itemsize)
        affordable = (
            problem.num_branches
            * problem.S
            * problem.itemsize
            // (_BYTES_PER_PARTIAL_BYTE * partial_bytes)
        )
        splits = _even_splits(problem.S, block_s, min(wanted, affordable))
        return cls(block_c, block_s, splits, _num_warps(block_c * block_s, problem, device))

    @classmethod
    def moments(cls, problem: Problem, device: DeviceFacts) -> "LaunchConfig":
        """For a kernel that reduces images and positions alike, ``splits`` parts a channel."""
        block_c, block_s = _tile(problem, sums=2)
        tiles = problem.B * cdiv(problem.S, block_s)
        columns = max(1, cdiv(problem.C, block_c))
        wanted = cdiv(device.multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR, columns)
        parts = max(1, min(wanted, tiles // _LEAST_TILES_PER_PART))
        splits = max(1, cdiv(tiles, max(1, cdiv(tiles, parts))))
        return cls(block_c, block_s, splits, _num_warps(block_c * block_s, problem, device))

    def span(self, S: int) -> int:
        """Positions that one of the ``splits`` programs of a row owns, a multiple of the tile."""
        return cdiv(cdiv(S, self.block_s), self.splits) * self.block_s


def cdiv(a: int, b: int) -> int:
    """Divides and rounds up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Returns the least power of two that is at least ``n``, for n >= 1."""
    return 1 << (n - 1).bit_length()


def _even_splits(S: int, block_s: int, wanted: int) -> int:
    """Returns at most ``wanted`` splits of a row that each own a tile at least."""
    blocks = cdiv(S, block_s)
    return cdiv(blocks, cdiv(blocks, max(1, min(wanted, blocks))))


def _tile(problem: Problem, sums: int) -> tuple[int, int]:
    elements = next(size for limit, size in _TILE_ELEMENTS if problem.num_branches <= limit)
    while elements * sums > _MOST_ACCUMULATORS:
        elements //= 2
    elements = elements * 4 // max(4, problem.itemsize)
    widest_c, widest_s = next_power_of_two(max(1, problem.C)), next_power_of_two(problem.S)
    if problem.channels_last:
        block_c = min(widest_c, _MAX_BLOCK_C_CHANNELS_LAST)
        return block_c, min(widest_s, elements // block_c)
    if problem.S % 4:
        elements //= 4  # unaligned rows are read element by element, an address each
    block_s = _tightest(problem.S, min(widest_s, elements), _MIN_ROW_BYTES // problem.itemsize)
    return min(widest_c, elements // block_s), block_s


def _tightest(S: int, most: int, least: int) -> int:
    """Returns the power of two up to ``most`` whose tiles overshoot S least, the larger on ties."""
    best = most
    block = most
    while block > least:
        block //= 2
        if cdiv(S, block) * block < cdiv(S, best) * best:
            best = block
    return best


def _num_warps(elements: int, problem: Problem, device: DeviceFacts) -> int:
    per_thread = max(1, _ACCESS_BYTES // problem.itemsize)
    warps = elements // (per_thread * device.warp_size)
    return max(1, min(_MAX_WARPS, warps))


@dataclass(frozen=True)
class MLPProblem:
    """Sizes of the MLP between fuse and select: B images, C channels, d hidden, M branches."""

    B: int
    C: int
    d: int
    M: int


@dataclass(frozen=True)
class MLPConfig:
    """Tile sizes (powers of two) of images, channels and hidden layer, and warps a program.

    ``unroll`` partial sums of an element are loaded together.
    """

    block_b: int
    block_c: int
    block_d: int
    num_warps: int
    unroll: int = 4

    @classmethod
    def hidden(cls, problem: MLPProblem, device: DeviceFacts) -> "MLPConfig":
        """For fc1: one image and the whole hidden layer a program."""
        block_c = min(128, next_power_of_two(problem.C))
        block_d = min(next_power_of_two(problem.d), 4096 // block_c)
        return cls(1, block_c, block_d, num_warps=4)

    @classmethod
    def logits(cls, problem: MLPProblem, device: DeviceFacts) -> "MLPConfig":
        """For fc2: a matrix product, whose least tile has 16 rows and columns."""
        return cls(16, 32, min(64, max(16, next_power_of_two(problem.d))), num_warps=4)

    @classmethod
    def hidden_bwd(cls, problem: MLPProblem, device: DeviceFacts) -> "MLPConfig":
        """For the backward to z: one image a program."""
        block_d = next_power_of_two(problem.d)
        block_c = min(next_power_of_two(problem.C), max(4, 4096 // block_d))
        return cls(1, block_c, block_d, num_warps=4)

    @classmethod
    def channels_bwd(cls, problem: MLPProblem, device: DeviceFacts) -> "MLPConfig":
        """For the gradients: a few channels of all images a program."""
        block_d = max(16, next_power_of_two(problem.d))
        return cls(16, 8, block_d, num_warps=4)
