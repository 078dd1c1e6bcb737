"""Launch configurations of the small kernels: of sizes and device alone.

A small kernel lies between two passes and reads no branch. Its tensors are in the second-level
cache, and its programs, all resident at once where the sizes are a network's, wait for it: what
counts is how much the busiest multiprocessor reads, and how often it waits.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from sknet_kernels.config import MAX_BRANCHES, DeviceFacts, cdiv, next_power_of_two

# Tiles of images and elements of the hidden layer, by the number of branches up to the limit: more
# of either spill registers. Two images read a weight half as often.
_IMAGES_AND_HIDDEN = (
    (2, ((1, 32), (1, 16), (2, 32))),
    (4, ((1, 32), (1, 16))),
    (MAX_BRANCHES, ((1, 16),)),
)
# Images and rows of fc2 in a tile, and warps, with which its product compiles without spills; a
# matrix product has 16 of each at least.
_LOGITS_TILES = ((16, 16, 8), (32, 32, 4))


@dataclass(frozen=True)
class SmallProblem:
    """Sizes of one call; those that a kernel does not depend on are 1.

    Attributes:
        B: images.
        C: channels.
        num_branches: M of them.
        d: elements of the hidden layer.
        parts: that a sum over positions comes in.
        itemsize: bytes of an element of the sums.
    """

    B: int
    C: int
    num_branches: int
    d: int = 1
    parts: int = 1
    itemsize: int = 4

    def extents(self) -> dict[str, int]:
        """Returns how much there is of what each field of a configuration counts."""
        return {
            "block_b": self.B,
            "block_c": self.C,
            "block_d": self.d,
            "block_n": self.num_branches * self.C,
            "block_r": self.B,
            "block_p": self.parts,
        }


@dataclass(frozen=True)
class SmallConfig:
    """Tile sizes of a small kernel, powers of two where they are an axis, and warps a program.

    Attributes:
        block_b: images.
        block_c: channels.
        block_d: elements of the hidden layer.
        block_n: rows of a weight.
        block_r: images that statistics are taken of at once.
        block_p: parts of a sum that are loaded together.
        num_warps: warps a program.
    """

    block_b: int = 1
    block_c: int = 1
    block_d: int = 1
    block_n: int = 1
    block_r: int = 1
    block_p: int = 1
    num_warps: int = 8


@dataclass(frozen=True, eq=False)
class SmallKernel(ABC):
    """A small kernel, as far as its launches depend on it.

    Attributes:
        name: what figures call it.
        sizes: the fields of its configuration that are there to be chosen, with the least and the
            most that are worth timing.
    """

    name: str
    sizes: Mapping[str, tuple[int, int]]

    @abstractmethod
    def heuristic(self, problem: SmallProblem, device: DeviceFacts) -> SmallConfig:
        """Returns the configuration that is taken where none was timed."""

    @abstractmethod
    def programs(self, problem: SmallProblem, config: SmallConfig) -> int:
        """Returns the programs of a launch."""

    @abstractmethod
    def reads(self, problem: SmallProblem, config: SmallConfig) -> int:
        """Returns the elements that a program reads, about."""

    def busiest(self, problem: SmallProblem, config: SmallConfig, device: DeviceFacts) -> int:
        """Returns the elements that the multiprocessor with the most programs reads."""
        programs = cdiv(self.programs(problem, config), device.multiprocessors)
        return programs * self.reads(problem, config)

    def candidates(self, problem: SmallProblem, device: DeviceFacts) -> tuple[SmallConfig, ...]:
        """Returns the heuristics' configuration, then those with one size halved or doubled."""
        first = self.heuristic(problem, device)
        return tuple(dict.fromkeys([first, *self._neighbours(first, problem)]))

    def _neighbours(self, first: SmallConfig, problem: SmallProblem) -> Iterator[SmallConfig]:
        extents = problem.extents()
        for name, (least, most) in self.sizes.items():
            covered = next_power_of_two(max(least, extents.get(name, most)))
            for size in (getattr(first, name) // 2, getattr(first, name) * 2):
                if least <= size <= min(most, covered):
                    yield replace(first, **{name: size})


@dataclass(frozen=True, eq=False)
class _ByImages(SmallKernel):
    """Programs read the parts of a few images' sums and a block of a weight, channel by channel.

    Attributes:
        sums: a branch, which come in parts.
        others: vectors of channels beside them, a branch.
    """

    sums: int
    others: int

    def heuristic(self, problem: SmallProblem, device: DeviceFacts) -> SmallConfig:
        M = problem.num_branches
        tiles = next(tiles for limit, tiles in _IMAGES_AND_HIDDEN if limit >= M)
        block_c = min(256, next_power_of_two(problem.C))
        configs = [
            SmallConfig(
                block_b=block_b,
                block_c=block_c,
                block_d=block_d,
                # Loads that a thread waits for together: 16 of fc1's parts, 32 of the four sums',
                # which is what fits (234 registers at M = 8).
                block_p=max(1, 16 // (block_b * block_b * M)),
                # Threads that share an element of a vector would each compute it, loads included.
                num_warps=max(1, min(8, block_c // 32)),
            )
            for block_b, block_d in tiles
        ]
        best = min(configs, key=lambda config: self.busiest(problem, config, device))
        return replace(best, block_d=min(best.block_d, next_power_of_two(problem.d)))

    def programs(self, problem: SmallProblem, config: SmallConfig) -> int:
        return cdiv(problem.B, config.block_b) * cdiv(problem.d, config.block_d)

    def reads(self, problem: SmallProblem, config: SmallConfig) -> int:
        an_image = self.sums * problem.parts + self.others
        vectors = config.block_b * an_image + config.block_d
        return problem.num_branches * problem.C * vectors


@dataclass(frozen=True, eq=False)
class _Logits(SmallKernel):
    """Programs read all images' hidden layer, for its statistics, and a tile of fc2's product."""

    def heuristic(self, problem: SmallProblem, device: DeviceFacts) -> SmallConfig:
        # Of 64 images' statistics a thread holds 16 elements, and waits for them together.
        block_d = min(64, max(16, next_power_of_two(problem.d)))
        configs = [
            SmallConfig(block_b, 1, block_d, block_n, block_r=64, num_warps=num_warps)
            for block_b, block_n, num_warps in _LOGITS_TILES
        ]
        return min(configs, key=lambda config: self.busiest(problem, config, device))

    def programs(self, problem: SmallProblem, config: SmallConfig) -> int:
        rows = problem.num_branches * problem.C
        # Without images or channels there are still statistics to be written.
        return cdiv(max(1, problem.B), config.block_b) * cdiv(max(1, rows), config.block_n)

    def reads(self, problem: SmallProblem, config: SmallConfig) -> int:
        return problem.d * (problem.B + config.block_b + config.block_n)


@dataclass(frozen=True, eq=False)
class _ChannelsBwd(SmallKernel):
    """Programs read, of all images, a few channels, or what some rows of a weight take."""

    def heuristic(self, problem: SmallProblem, device: DeviceFacts) -> SmallConfig:
        whole_d = max(16, next_power_of_two(problem.d))
        # With 8 branches 64 images spill on gfx942, and 8 channels take 163 registers on sm_90.
        # 4,096 elements of the hidden layer are 16 a thread.
        most = 64 if problem.num_branches <= 4 else 32
        return SmallConfig(
            block_b=max(16, min(most, 4096 // whole_d)),
            block_c=8,
            block_d=min(64, whole_d),
            block_n=32,
        )

    def programs(self, problem: SmallProblem, config: SmallConfig) -> int:
        C, M = problem.C, problem.num_branches
        # fc1's vectors are there without channels.
        rows = cdiv(max(1, C), config.block_n) + cdiv(M * C, config.block_n)
        return cdiv(C, config.block_c) + rows * cdiv(problem.d, config.block_d)

    def reads(self, problem: SmallProblem, config: SmallConfig) -> int:
        # Hidden and dz, twice for the means of fc1's norm; four sums and the logits.
        channels = 4 * problem.d + 5 * problem.num_branches * config.block_c
        weights = 4 * config.block_d + config.block_n
        return problem.B * max(channels, weights)


@dataclass(frozen=True, eq=False)
class _Joining(SmallKernel):
    """Programs join the parts of the sums of a few channels.

    Attributes:
        chosen: the configuration of all sizes.
        rows: elements that are read of a part for each channel.
        by_image: whether channels are an image's with all branches; else all lie end to end.
    """

    chosen: SmallConfig
    rows: int
    by_image: bool = False

    def heuristic(self, problem: SmallProblem, device: DeviceFacts) -> SmallConfig:
        return self.chosen

    def programs(self, problem: SmallProblem, config: SmallConfig) -> int:
        B, C, M = problem.B, problem.C, problem.num_branches
        if self.by_image:
            return B * cdiv(C, config.block_c)
        return cdiv(B * C * M, config.block_c)

    def reads(self, problem: SmallProblem, config: SmallConfig) -> int:
        branches = problem.num_branches if self.by_image else 1
        return branches * self.rows * problem.parts * config.block_c


_VECTOR_SIZES = {
    "block_b": (1, 4),
    "block_c": (32, 512),
    "block_d": (8, 64),
    "block_p": (1, 16),
    "num_warps": (1, 8),
}
HIDDEN = _ByImages("sk_hidden", _VECTOR_SIZES, sums=1, others=0)
HIDDEN_BWD = _ByImages("sk_hidden_bwd", _VECTOR_SIZES, sums=4, others=1)
LOGITS = _Logits(
    "sk_logits",
    {
        "block_b": (16, 64),
        "block_d": (16, 128),
        "block_n": (16, 128),
        "block_r": (16, 128),
        "num_warps": (2, 8),
    },
)
CHANNELS_BWD = _ChannelsBwd(
    "sk_channels_bwd",
    {
        "block_b": (16, 128),
        "block_c": (8, 32),
        "block_d": (16, 128),
        "block_n": (16, 64),
        "num_warps": (4, 8),
    },
)
# A turn over parts is two waits for memory: with as many parts a turn there is one, or they take a
# fifth at most of the pass that made the parts.
MOMENTS_FINISH = _Joining(
    "sk_moments_finish",
    {"block_c": (1, 32), "block_p": (64, 1024), "num_warps": (2, 8)},
    chosen=SmallConfig(block_c=4, block_p=512),
    rows=5,
)
FUSE_COMBINE = _Joining(
    "sk_fuse_combine",
    {"block_c": (32, 1024), "num_warps": (1, 4)},
    chosen=SmallConfig(block_c=256, num_warps=1),
    rows=1,
)
SELECT_BWD_COMBINE = _Joining(
    "sk_select_bwd_combine",
    {"block_c": (32, 512), "num_warps": (1, 4)},
    chosen=SmallConfig(block_c=128, num_warps=1),
    rows=1,
    by_image=True,
)
SMALL_KERNELS = (
    MOMENTS_FINISH,
    HIDDEN,
    LOGITS,
    HIDDEN_BWD,
    CHANNELS_BWD,
    FUSE_COMBINE,
    SELECT_BWD_COMBINE,
)
