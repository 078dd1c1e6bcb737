"""Launch configurations of the streaming kernels: of shape, dtype, layout and device alone.

A streaming kernel reads branches; `sknet_kernels.small` has the others. A tile of BLOCK_C channels
by BLOCK_S positions is what one program holds of every branch at once. Its long side lies along the
contiguous axis, for wide and coalesced accesses.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch

MAX_BRANCHES = 8

# Warps of a program, each thread of which holds one access of every tensor's tile: 4 programs and
# more are resident by registers, and 3 reads of 2 KB by 4 programs by 2 tiles in flight are 48 KB,
# where 21 KB keep an H200's memory busy.
_NUM_WARPS = 4
# A tile's side along the contiguous axis: one cache line; in NCHW four of them where tiles of that
# size overshoot the row by little, which saves nothing but the addresses of rows.
_LINE_BYTES = 128
_WIDE_BYTES = 512
_LEAST_FILL = 0.9
# Tiles under way together, where accesses are wide enough for asynchronous copies. Three reach
# 4.5 TB/s and more in every kernel at stage 1, one 2.3 and more.
_NUM_STAGES = 3
_LEAST_COPY_BYTES = 4
# Registers of a thread: what a kernel keeps is counted, the rest is as measured, and from here on
# the compiler spills.
_OTHER_REGISTERS = 40
_MOST_REGISTERS = 204
# Warps a multiprocessor that rows are split for: eight programs.
_WARPS_PER_MULTIPROCESSOR = 32
# Partial sums live in the second-level cache, which holds 40 MB and more.
_MOST_PARTIAL_BYTES = 8 << 20


@dataclass(frozen=True)
class DeviceFacts:
    """What the heuristics know of a device; its table is found by ``name``, where it has one.

    ``backend`` is what Triton calls the compiler, "cuda" or "hip".
    """

    multiprocessors: int
    warp_size: int
    name: str = ""
    backend: str = "cuda"

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> "DeviceFacts":
        """Asks ``device``; the interpreter, on a CPU, runs one program at a time."""
        if device.type in ("cpu", "meta"):
            return cls(multiprocessors=1, warp_size=32)
        properties = torch.get_device_module(device).get_device_properties(device)
        warp_size = getattr(properties, "warp_size", 32)
        backend = "cuda" if torch.version.hip is None else "hip"
        return cls(properties.multi_processor_count, warp_size, properties.name, backend)

    @property
    def most_registers(self) -> int | None:
        """How many registers a thread is allowed, None where the compiler is to choose.

        Left to itself, NVIDIA's compiler keeps values on the stack to let one more program be
        resident, which nothing here waits for.
        """
        return 255 if self.backend == "cuda" else None


@dataclass(frozen=True)
class Problem:
    """Sizes of one call: ``num_branches`` tensors [B, C, S] of ``itemsize`` bytes an element.

    Attributes:
        align: how many elements can be read at once.
        shifted: whether that needs tiles whose rows begin before those of the tensor; see
            `sknet_kernels.jit.tile_pointers`.
    """

    B: int
    C: int
    S: int
    num_branches: int
    itemsize: int
    channels_last: bool
    align: int
    shifted: bool = False

    @property
    def layout(self) -> str:
        """What `sknet_kernels.jit.tile_pointers` calls the way in which elements are read."""
        return "channels_last" if self.channels_last else "shifted" if self.shifted else "rows"

    @property
    def row(self) -> int:
        """Elements that the tiles of a row have to cover."""
        return self.S + self.align - 1 if self.shifted else self.S


@dataclass(frozen=True, eq=False)
class StreamingKernel:
    """A kernel that reads branches, as far as its launches depend on it.

    Attributes:
        name: what figures call it.
        reads: tensors read a branch, and beside the branches.
        writes: likewise.
        sums: kept over the positions of a channel, a branch and beside the branches.
        vectors: kept of every channel of a tile, likewise.
        joins_images: whether a program walks images and positions alike.
    """

    name: str
    reads: tuple[int, int]
    writes: tuple[int, int]
    sums: tuple[int, int]
    vectors: tuple[int, int]
    joins_images: bool = False

    def heuristic(self, problem: Problem, device: DeviceFacts) -> "LaunchConfig":
        """Returns what the figures of the model suggest."""
        tile = _tile(self, problem, device)
        return dataclasses.replace(tile, splits=_splits(self, problem, device, tile))

    def candidates(self, problem: Problem, device: DeviceFacts) -> tuple["LaunchConfig", ...]:
        """Returns the heuristics' configuration, then its legal neighbours.

        Of each it is expected that nothing spills.
        """
        first = self.heuristic(problem, device)
        changed = [_changed(first, change, self, problem, device) for change in _CHANGES]
        legal = [config for config in changed if config and _fits(config, self, problem, device)]
        return tuple(dict.fromkeys([first, *legal]))

    def passes(self, num_branches: int) -> int:
        """Returns how many tensors of a branch's size are moved."""
        return _times(self.reads, num_branches) + _times(self.writes, num_branches)

    def rows(self, problem: Problem, config: "LaunchConfig") -> int:
        """Returns how many rows of tiles there are to split."""
        images = 1 if self.joins_images else problem.B
        return images * cdiv(problem.C, config.block_c)

    def tiles(self, problem: Problem, config: "LaunchConfig") -> int:
        """Returns the tiles of a row."""
        images = problem.B if self.joins_images else 1
        return images * cdiv(problem.row, config.block_s)

    def partial_bytes(self, problem: Problem) -> int:
        """Returns the bytes of partial sums that one split writes."""
        images = 1 if self.joins_images else problem.B
        sums = _times(self.sums, problem.num_branches)
        return sums * images * problem.C * max(4, problem.itemsize)

    def registers(self, problem: Problem, access: int) -> int:
        """Returns the registers of a thread that holds ``access`` elements of every tensor."""
        M = problem.num_branches
        # Elements side by side are of as many channels, or of one, for which one sum is kept.
        channels = access if problem.channels_last else 1
        a_channel = _times(self.sums, M) + _times(self.vectors, M)
        held = (_times(self.reads, M) + 1) * access + a_channel * channels
        return held * max(4, problem.itemsize) // 4 + _OTHER_REGISTERS


def _times(counts: tuple[int, int], num_branches: int) -> int:
    a_branch, beside = counts
    return a_branch * num_branches + beside


# In moments, what a tile's image and place are carried in takes as much as a second vector. In
# select's backward a vector beside the branches stands for what 6 branches spill of on gfx942.
MOMENTS = StreamingKernel(
    "sk_moments", (1, 0), (0, 0), sums=(2, 0), vectors=(2, 0), joins_images=True
)
FUSE = StreamingKernel("sk_fuse", (1, 0), (0, 0), sums=(0, 1), vectors=(3, 0))
SELECT = StreamingKernel("sk_select_fwd", (1, 0), (0, 1), sums=(0, 0), vectors=(4, 0))
SELECT_BWD = StreamingKernel("sk_select_bwd", (1, 1), (1, 0), sums=(1, 0), vectors=(1, 1))
SUMS = StreamingKernel("sk_fuse_select_sums", (1, 1), (0, 0), sums=(4, 0), vectors=(3, 0))
DX = StreamingKernel("sk_fuse_select_dx", (1, 1), (1, 0), sums=(0, 0), vectors=(6, 1))
STREAMING_KERNELS = (MOMENTS, FUSE, SELECT, SELECT_BWD, SUMS, DX)


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


@dataclass(frozen=True)
class Tile:
    """What a program of a streaming kernel holds of a branch at once, as the kernel takes it.

    Attributes:
        block_c: channels.
        block_s: positions.
        align: elements that are read at once.
        layout: where they lie, as `Problem.layout` says.
        num_stages: tiles whose loads are under way together.
    """

    block_c: int
    block_s: int
    align: int
    layout: str
    num_stages: int

    @property
    def position(self) -> "Tile":
        """One position of the same channels, wherever it lies."""
        return Tile(self.block_c, 1, 1, "rows", 1)


def _splits(
    kernel: StreamingKernel, problem: Problem, device: DeviceFacts, tile: LaunchConfig
) -> int:
    """Splits rows as far as the device needs to be full, and partial sums allow."""
    rows, tiles = max(1, kernel.rows(problem, tile)), max(1, kernel.tiles(problem, tile))
    programs = device.multiprocessors * max(1, _WARPS_PER_MULTIPROCESSOR // tile.num_warps)
    wanted = cdiv(programs, rows)
    affordable = _MOST_PARTIAL_BYTES // max(1, kernel.partial_bytes(problem))
    most = max(1, min(wanted, affordable, tiles))
    return cdiv(tiles, cdiv(tiles, most))


def _tile(kernel: StreamingKernel, problem: Problem, device: DeviceFacts) -> LaunchConfig:
    access = problem.align
    while access > 1 and kernel.registers(problem, access) > _MOST_REGISTERS:
        access //= 2
    elements = _NUM_WARPS * device.warp_size * access
    line, wide = _LINE_BYTES // problem.itemsize, _WIDE_BYTES // problem.itemsize
    widest_c, widest_s = next_power_of_two(max(1, problem.C)), next_power_of_two(problem.row)
    if problem.channels_last:
        block_c = min(widest_c, line)
        block_s = min(widest_s, elements // block_c)
    else:
        fits = problem.row >= _LEAST_FILL * cdiv(problem.row, wide) * wide
        block_s = min(widest_s, wide if fits else line, elements)
        block_c = min(widest_c, elements // block_s)
    num_warps = max(1, min(_NUM_WARPS, block_c * block_s // (device.warp_size * access)))
    num_stages = _NUM_STAGES if access * problem.itemsize >= _LEAST_COPY_BYTES else 1
    return LaunchConfig(block_c, block_s, 1, num_warps, num_stages, access)


# Where candidates differ: exponents of two, and of ``num_stages`` the difference.
_CHANGES: tuple[dict[str, int], ...] = (
    # Fewer and more tiles under way.
    {"num_stages": -2},
    {"num_stages": -1},
    {"num_stages": 1},
    # Fewer and more programs.
    {"splits": -2},
    {"splits": -1},
    {"splits": 1},
    # Programs of fewer and of more threads that each hold the same.
    {"num_warps": -1, "block_s": -1},
    {"num_warps": -1, "block_c": -1},
    {"num_warps": 1, "block_s": 1},
    {"num_warps": 1, "block_c": 1},
    # As large a tile of another form.
    {"block_c": -1, "block_s": 1},
    {"block_c": 1, "block_s": -1},
    # Threads that hold two accesses, and half of one.
    {"block_s": 1},
    {"num_warps": -1},
    {"access": -1, "block_s": -1},
    {"access": -1, "block_c": -1},
)
_MOST_NUM_WARPS, _MOST_NUM_STAGES = 8, 4


def _changed(
    first: LaunchConfig,
    change: dict[str, int],
    kernel: StreamingKernel,
    problem: Problem,
    device: DeviceFacts,
) -> LaunchConfig | None:
    """Returns ``first`` after ``change``, None where a size would come below one."""

    def shifted(name: str) -> int:
        value, exponent = getattr(first, name), change.get(name, 0)
        return int(value << exponent if exponent >= 0 else value >> -exponent)

    sizes = {name: shifted(name) for name in ("block_c", "block_s", "num_warps", "access")}
    num_stages = first.num_stages + change.get("num_stages", 0)
    if min(*sizes.values(), num_stages) < 1:
        return None
    tile = LaunchConfig(**sizes, num_stages=num_stages)
    splits = _splits(kernel, problem, device, tile) * 2.0 ** change.get("splits", 0)
    tiles = max(1, kernel.tiles(problem, tile))
    even = cdiv(tiles, cdiv(tiles, max(1, min(int(splits), tiles))))
    return dataclasses.replace(tile, splits=even)


def _fits(
    config: LaunchConfig, kernel: StreamingKernel, problem: Problem, device: DeviceFacts
) -> bool:
    """Whether the tile is no larger than the tensor, every thread busy, and nothing spilled."""
    elements, threads = config.block_c * config.block_s, config.num_warps * device.warp_size
    held = max(config.access, elements // threads)
    return (
        config.block_c <= next_power_of_two(max(1, problem.C))
        and config.block_s <= next_power_of_two(max(1, problem.row))
        and (config.num_warps == 1 or elements >= threads * config.access)
        and config.num_warps <= _MOST_NUM_WARPS
        and config.num_stages <= _MOST_NUM_STAGES
        and kernel.registers(problem, held) <= _MOST_REGISTERS
        and (
            config.splits == 1
            or config.splits * kernel.partial_bytes(problem) <= _MOST_PARTIAL_BYTES
        )
    )


def cdiv(a: int, b: int) -> int:
    """Divides and rounds up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Returns the least power of two that is at least ``n``, for n >= 1."""
    return 1 << (n - 1).bit_length()
