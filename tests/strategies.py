"""What the property tests draw: sizes, dtypes and memory layouts, as data that prints itself.

A `Sample` holds numbers only and its tensors follow from them, by generators of their own. The
text that hypothesis prints for a failing example is therefore the whole example: paste it after
``@example(sample=...)``, or the printed ``@reproduce_failure(...)`` over the test.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from sknet_kernels.config import MAX_BRANCHES, LaunchConfig
from tests.helpers import DEVICE, DTYPES

_T = TypeVar("_T")

# A suite that guards changes draws the same examples every time: red means the change, not luck.
# It prints the first that fails as it was drawn: to shrink it takes the interpreter minutes.
# SKNET_HYPOTHESIS_PROFILE=search draws new ones (those of one seed by --hypothesis-seed=N), and
# shrinks. Nothing is kept on disk between runs; the interpreter has no deadline to keep.
settings.register_profile(
    "same",
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    database=None,
    print_blob=True,
)
settings.register_profile(
    "search",
    settings.get_profile("same"),
    derandomize=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
PROFILE = settings.get_profile(os.environ.get("SKNET_HYPOTHESIS_PROFILE", "same"))


@dataclass(frozen=True)
class Placement:
    """How a tensor lies in its storage, one entry an axis."""

    order: tuple[int, ...]  # the axes from the slowest to the fastest
    steps: tuple[int, ...]  # elements from one index to the next, in units of what lies inside
    gaps: tuple[int, ...]  # indices of the storage that are left out at the end of the axis
    expanded: tuple[bool, ...]  # whether the axis has stride 0
    offset: int = 0  # elements before the first

    @classmethod
    def dense(cls, order: Sequence[int], offset: int = 0) -> "Placement":
        """Leaves nothing out."""
        rank = len(order)
        return cls(tuple(order), (1,) * rank, (0,) * rank, (False,) * rank, offset)

    def hold(self, values: Tensor) -> Tensor:
        """Returns ``values`` placed so among NaN; an expanded axis repeats its first index."""
        shape = values.shape
        for axis, expanded in enumerate(self.expanded):
            values = values.narrow(axis, 0, min(1, values.shape[axis])) if expanded else values
        strides, inside = [0] * values.dim(), 1
        for axis in reversed(self.order):
            strides[axis] = inside * self.steps[axis]
            inside = strides[axis] * (max(1, values.shape[axis]) + self.gaps[axis])
        storage = values.new_full((self.offset + inside,), float("nan"))
        return storage.as_strided(values.shape, strides, self.offset).copy_(values).expand(shape)


@dataclass(frozen=True)
class Sample:
    """Branches [B, C, *spatial], an incoming gradient like them, and logits [B, M, C]."""

    shape: tuple[int, ...]  # of a branch
    dtype: torch.dtype  # of the branches and of dout
    branches: tuple[Placement, ...]  # M of them
    dout: Placement
    logits_dtype: torch.dtype  # may be another than that of the branches
    logits: Placement
    spread: float  # of the logits
    seed: int  # of every value

    def random_branches(self) -> list[Tensor]:
        """Returns M normally distributed branches."""
        return [
            placement.hold(self._normal(i, self.shape).to(self.dtype))
            for i, placement in enumerate(self.branches)
        ]

    def random_logits(self) -> Tensor:
        """Returns logits wide enough for weights far from 1 / M, or so wide that few are not 0."""
        shape = self.shape[0], len(self.branches), self.shape[1]
        return self.logits.hold((self.spread * self._normal(98, shape)).to(self.logits_dtype))

    def random_dout(self) -> Tensor:
        """Returns a gradient like a branch."""
        return self.dout.hold(self._normal(99, self.shape).to(self.dtype))

    def small(self, stream: int, *shape: int) -> Tensor:
        """Returns a contiguous float64 tensor, normally distributed."""
        return self._normal(1000 + stream, shape)

    def _normal(self, stream: int, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(10_000 * self.seed + stream)
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE)


def examples(count: int) -> settings:
    """Returns the settings of a property that is to be shown on ``count`` examples."""
    return settings(PROFILE, max_examples=count)


# The largest size of an axis of space, and how many axes there are then.
_AXES_BY_LARGEST = {40: 1, 7: 2, 3: 3}
# Few branches as often as any number that the kernels take.
_BRANCHES = st.integers(1, 3) | st.integers(1, MAX_BRANCHES)
_KINDS = ("contiguous", "channels_last", "sliced", "any", "any")


@st.composite
def placements(draw: st.DrawFn, rank: int, kinds: Sequence[str] = _KINDS) -> Placement:
    """Draws the layouts that people have, and as often any other."""
    axes = tuple(range(rank))
    offset, kind = draw(st.integers(0, 3)), draw(st.sampled_from(kinds))
    if kind == "contiguous":
        return Placement.dense(axes, offset)
    if kind == "channels_last":
        return Placement.dense((0, *axes[2:], 1), offset)
    gaps = draw(_per_axis(st.integers(0, 2), rank))
    if kind == "sliced":
        return Placement(axes, (1,) * rank, gaps, (False,) * rank, offset)
    order = tuple(draw(st.permutations(axes)))
    steps = draw(_per_axis(st.sampled_from((1, 1, 1, 2)), rank))
    expanded = draw(_per_axis(st.sampled_from((False,) * 5 + (True,)), rank))
    return Placement(order, steps, gaps, expanded, offset)


@st.composite
def samples(
    draw: st.DrawFn,
    branches: st.SearchStrategy[int] = _BRANCHES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    batches: Sequence[int] = (2, 1, 2, 1, 3, 2, 1, 0),
    first_kinds: Sequence[str] = _KINDS,
) -> Sample:
    """Draws samples small enough for the interpreter, one, two or three axes of space."""
    B, M = draw(st.sampled_from(batches)), draw(branches)
    C = draw(st.sampled_from((1, 2, 3, 4, 5, 8, 17)))
    largest = draw(st.sampled_from(tuple(_AXES_BY_LARGEST)))
    spatial = draw(_per_axis(st.integers(1, largest), _AXES_BY_LARGEST[largest]))
    placement = placements(2 + len(spatial))
    alike = draw(st.booleans())
    first = draw(placements(2 + len(spatial), first_kinds))
    dtype = draw(st.sampled_from(dtypes))
    return Sample(
        shape=(B, C, *spatial),
        dtype=dtype,
        branches=(first, *(first if alike else draw(placement) for _ in range(M - 1))),
        dout=draw(placement),
        logits_dtype=draw(st.sampled_from(_logits_dtypes(dtype))),
        logits=draw(placements(3)),
        spread=draw(st.sampled_from((2.0, 2.0, 2.0, 50.0))),
        seed=draw(st.integers(0, 2**16)),
    )


def launch_configs() -> st.SearchStrategy[LaunchConfig]:
    """Draws tiles and splits that fit no shape in particular."""
    return st.builds(
        LaunchConfig,
        block_c=st.sampled_from((2, 4, 8, 16)),
        block_s=st.sampled_from((4, 8, 16, 32)),
        splits=st.integers(1, 5),
        num_warps=st.just(1),
    )


def _logits_dtypes(branches: torch.dtype) -> tuple[torch.dtype, ...]:
    # Triton's interpreter casts float64 to bfloat16 as if both were integers.
    if branches == torch.float64 and DEVICE.type == "cpu":
        return tuple(dtype for dtype in DTYPES if dtype != torch.bfloat16)
    return DTYPES


def _per_axis(entries: st.SearchStrategy[_T], rank: int) -> st.SearchStrategy[tuple[_T, ...]]:
    return st.lists(entries, min_size=rank, max_size=rank).map(tuple)
