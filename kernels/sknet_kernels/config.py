"""Launch configurations as pure functions of shape, dtype, layout and device.

A tile of BLOCK_C channels by BLOCK_S positions is what one program holds of every branch at once.
Its long side lies along the contiguous axis, for wide and coalesced accesses.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch

MAX_BRANCHES = 8

_ACCESS_BYTES = 16
_MAX_WARPS = 4
# Programs a multiprocessor that a row is split for.
_PROGRAMS_PER_MULTIPROCESSOR = 8
# Partial sums live in the second-level cache, which holds 40 MB and more.
_MOST_PARTIAL_BYTES = 8 << 20


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
    """Sizes of one call: ``num_branches`` tensors [B, C, S] of ``itemsize`` bytes an element.

    ``align`` is the number of elements that can be read at once, as `common_alignment` finds it.
    """

    B: int
    C: int
    S: int
    num_branches: int
    itemsize: int
    channels_last: bool
    align: int


@dataclass(frozen=True, eq=False)
class Stage:
    """A kind of streaming kernel, as far as its launches depend on it.

    Attributes:
        sums: sums that a program keeps of every element of a branch's tile.
        shared_sums: those that it keeps of a tile, whatever the number of branches.
        joins_images: whether a program walks images and positions alike.
    """

    sums: int = 0
    shared_sums: int = 0
    joins_images: bool = False

    def rows(self, problem: Problem, config: "LaunchConfig") -> int:
        """Returns how many rows of tiles there are to split."""
        images = 1 if self.joins_images else problem.B
        return images * cdiv(problem.C, config.block_c)

    def tiles(self, problem: Problem, config: "LaunchConfig") -> int:
        """Returns the tiles of a row."""
        images = problem.B if self.joins_images else 1
        return images * cdiv(problem.S, config.block_s)

    def accumulators(self, problem: Problem) -> int:
        """Returns the sums that a program keeps of every element of a tile."""
        return self.sums * problem.num_branches + self.shared_sums

    def partial_bytes(self, problem: Problem) -> int:
        """Returns the bytes of partial sums that one split writes."""
        images = 1 if self.joins_images else problem.B
        return self.accumulators(problem) * images * problem.C * max(4, problem.itemsize)


MOMENTS = Stage(sums=2, joins_images=True)
FUSE = Stage(shared_sums=1)
SELECT = Stage()
SELECT_BWD = Stage(sums=1)
SUMS = Stage(sums=4)
DX = Stage()


@dataclass(frozen=True)
class LaunchConfig:
    """How a streaming kernel is launched.

    Attributes:
        block_c: channels of a tile, a power of two.
        block_s: positions of a tile, a power of two.
        splits: programs that share a row of tiles.
        num_warps: warps a program.
        num_stages: tiles whose loads are under way together.
        access: the most elements that a thread reads at once, a power of two.
    """

    block_c: int
    block_s: int
    splits: int = 1
    num_warps: int = 1
    num_stages: int = 1
    access: int = 16

    @classmethod
    def from_heuristic(cls, stage: Stage, problem: Problem, device: DeviceFacts) -> "LaunchConfig":
        """Returns what the figures of the model suggest."""
        tile = _tile(stage, problem, device)
        return dataclasses.replace(tile, splits=_splits(stage, problem, device, tile))


def _splits(stage: Stage, problem: Problem, device: DeviceFacts, tile: LaunchConfig) -> int:
    """Splits rows as far as the device needs to be full, and partial sums allow."""
    rows, tiles = max(1, stage.rows(problem, tile)), max(1, stage.tiles(problem, tile))
    wanted = cdiv(device.multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR, rows)
    affordable = _MOST_PARTIAL_BYTES // max(1, stage.partial_bytes(problem))
    most = max(1, min(wanted, affordable, tiles))
    return cdiv(tiles, cdiv(tiles, most))


def _tile(stage: Stage, problem: Problem, device: DeviceFacts) -> LaunchConfig:
    access = min(problem.align, _ACCESS_BYTES // problem.itemsize)
    widest_c = next_power_of_two(max(1, problem.C))
    widest_s = next_power_of_two(max(1, problem.S))
    elements = 4 * device.warp_size * access
    if problem.channels_last:
        block_c = min(widest_c, 64)
        block_s = min(widest_s, max(1, elements // block_c))
    else:
        block_s = min(widest_s, 256)
        block_c = min(widest_c, max(1, elements // block_s))
    warps = block_c * block_s // (access * device.warp_size)
    return LaunchConfig(block_c, block_s, num_warps=max(1, min(_MAX_WARPS, warps)), num_stages=1)


def cdiv(a: int, b: int) -> int:
    """Divides and rounds up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Returns the least power of two that is at least ``n``, for n >= 1."""
    return 1 << (n - 1).bit_length()


# Tiles of images and elements of the hidden layer, by the number of branches up to the limit: more
# of either spill registers. Two images read a weight half as often.
_IMAGES_AND_HIDDEN = (
    (2, ((1, 32), (1, 16), (2, 32))),
    (4, ((1, 32), (1, 16))),
    (MAX_BRANCHES, ((1, 16),)),
)


@dataclass(frozen=True)
class MLPProblem:
    """Sizes of the MLP between fuse and select: B images, C channels, d hidden, M branches.

    ``splits`` is the number of parts that a sum over positions comes in.
    """

    B: int
    C: int
    d: int
    M: int
    splits: int = 1


@dataclass(frozen=True)
class MLPConfig:
    """Tile sizes (powers of two) of a small kernel and warps a program.

    Attributes:
        block_b: images.
        block_c: channels.
        block_d: elements of the hidden layer.
        block_n: rows of a weight.
        block_r: images that statistics are taken of at once.
        unroll: parts of a sum that are loaded together.
        num_warps: warps a program.
    """

    block_b: int = 1
    block_c: int = 1
    block_d: int = 1
    block_n: int = 1
    block_r: int = 1
    unroll: int = 4
    num_warps: int = 8

    @classmethod
    def hidden(cls, problem: MLPProblem, device: DeviceFacts) -> "MLPConfig":
        """For fc1, whose programs read the parts of a few images and a block of the weight."""
        return cls._by_images(problem, device, parts=problem.splits, weights=1)

    @classmethod
    def hidden_bwd(cls, problem: MLPProblem, device: DeviceFacts) -> "MLPConfig":
        """For the backward to z, whose programs read four sums' parts and a block of fc2."""
        parts = problem.M * (4 * problem.splits + 1)
        return cls._by_images(problem, device, parts=parts, weights=problem.M)

    @classmethod
    def _by_images(
        cls, problem: MLPProblem, device: DeviceFacts, parts: int, weights: int
    ) -> "MLPConfig":
        """Returns the tile that lets the busiest multiprocessor read least for one channel."""

        def read(tile: tuple[int, int]) -> int:
            images, block_d = tile
            programs = cdiv(problem.B, images) * cdiv(problem.d, block_d)
            return cdiv(programs, device.multiprocessors) * (images * parts + weights * block_d)

        tiles = next(tiles for limit, tiles in _IMAGES_AND_HIDDEN if limit >= problem.M)
        images, block_d = min(tiles, key=read)
        block_c = min(256, next_power_of_two(problem.C))
        return cls(
            block_b=images,
            block_c=block_c,
            block_d=min(block_d, next_power_of_two(problem.d)),
            unroll=max(1, 8 // (images * problem.M)),
            # Threads that share an element of a vector would each compute it, loads included.
            num_warps=max(1, min(8, block_c // 32)),
        )

    @classmethod
    def logits(cls, problem: MLPProblem, device: DeviceFacts) -> "MLPConfig":
        """For fc2: a matrix product, whose least tile has 16 rows and columns."""

        def read(tile: tuple[int, int]) -> int:
            programs = cdiv(problem.B, tile[0]) * cdiv(problem.M * problem.C, tile[1])
            return cdiv(programs, device.multiprocessors) * (problem.B + sum(tile))

        block_b, block_n = min(((16, 16), (32, 64)), key=read)
        block_d = min(64, max(16, next_power_of_two(problem.d)))
        return cls(block_b=block_b, block_n=block_n, block_d=block_d, block_r=128)

    @classmethod
    def channels_bwd(cls, problem: MLPProblem, device: DeviceFacts) -> "MLPConfig":
        """For the gradients: a few channels, or rows of a weight, of all images a program."""
        whole_d = max(16, next_power_of_two(problem.d))
        block_b = max(16, min(64 if problem.M <= 4 else 32, 4096 // whole_d))
        return cls(block_b=block_b, block_c=8, block_n=32, block_d=min(64, whole_d))
