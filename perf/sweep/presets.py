"""The sweeps as data: which cases, in which order, and how long each is sampled."""

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

from perf.peers.families import FAMILIES
from perf.rows.schema import LAYOUTS, STAGES, Case, DType, Layout, Mode
from perf.sweep.workloads import make_case

CORE = (
    *("plain-eager", "plain-compile", "ours-pytorch-eager", "ours-pytorch-compile"),
    *("ours-triton-eager", "ours-triton-compile"),
)
UNCOMPILED = ("plain-eager", "ours-pytorch-eager", "ours-triton-eager")
BOTH_CALLED_ALIKE = ("plain-eager", "plain-compile", "ours-triton-eager", "ours-triton-compile")


@dataclass(frozen=True)
class Grid:
    """Every combination of its axes."""

    workloads: tuple[str, ...]
    modes: tuple[Mode, ...] = ("infer", "train")
    dtypes: tuple[DType, ...] = ("fp32",)
    layouts: tuple[Layout, ...] = ("nchw",)
    Ms: tuple[int, ...] = (2,)
    batches: tuple[int, ...] = (8,)
    resolutions: tuple[int, ...] = (224,)
    stages: tuple[int, ...] = (1,)
    providers: tuple[str, ...] = CORE

    @property
    def axes(self) -> tuple[tuple[Any, ...], ...]:
        """What the cases are all combinations of: `make_case`'s arguments in their order."""
        return (
            *(self.workloads, self.modes, self.dtypes, self.layouts),
            *(self.Ms, self.batches, self.resolutions, self.stages),
        )

    def cases(self) -> list[Case]:
        """Returns the cases, each once: axes that a workload does not have are left out."""
        return list(dict.fromkeys(itertools.starmap(make_case, itertools.product(*self.axes))))


@dataclass(frozen=True)
class Preset:
    """Grids, the most valuable first, how each provider of a case is sampled, and a time limit."""

    grids: tuple[Grid, ...]
    seconds: float
    rounds: int
    budget: float | None = None


@dataclass(frozen=True)
class Job:
    """One case and the providers that are to carry it out."""

    case: Case
    providers: tuple[str, ...]


def jobs(grids: tuple[Grid, ...], seed: int) -> list[Job]:
    """Returns the cases of all grids in their order, shuffled within each grid, each case once."""
    shuffle = random.Random(seed).shuffle
    wanted: dict[Case, tuple[str, ...]] = {}
    for grid in grids:
        cases = grid.cases()
        shuffle(cases)
        for case in cases:
            before = wanted.get(case, ())
            wanted[case] = (*before, *(name for name in grid.providers if name not in before))
    return [Job(case, providers) for case, providers in wanted.items()]


def _bf16(*workloads: str, layouts: tuple[Layout, ...] = ("channels_last",), **axes: Any) -> Grid:
    """Returns a grid in bfloat16, at batch 32 unless the axes say otherwise."""
    return Grid(workloads, **{"dtypes": ("bf16",), "layouts": layouts, "batches": (32,), **axes})


# Small enough for a sanitizer, which watches every access: all dtypes, both layouts, rows that end
# inside a tile, one and three branches.
_CHECKED = Grid(
    ("sk_fuse_select",),
    modes=("train",),
    dtypes=("bf16",),
    layouts=LAYOUTS,
    batches=(3,),
    providers=("ours-triton-eager",),
)
CHECKS = (
    replace(_CHECKED, dtypes=("fp32", "bf16", "fp16"), resolutions=(96,)),
    replace(_CHECKED, Ms=(1, 3), resolutions=(200,), stages=(4,)),
    replace(_CHECKED, workloads=("sk_fuse", "sk_select"), resolutions=(100,)),
    replace(
        _CHECKED,
        modes=("infer",),
        dtypes=("fp32",),
        layouts=("nchw",),
        resolutions=(160,),
        stages=(2, 3),
    ),
    replace(
        _CHECKED,
        workloads=("sk_conv",),
        dtypes=("fp32", "autocast"),
        layouts=("channels_last",),
        resolutions=(64,),
    ),
    replace(_CHECKED, workloads=("sk_unit",), resolutions=(64,)),
)

# Copies first: what the passes are measured against.
_ALONE = Grid(
    ("copy",),
    modes=("infer",),
    dtypes=("bf16", "fp32"),
    batches=(32, 128),
    stages=STAGES,
    providers=("plain-eager",),
)
_STREAMING = replace(
    _ALONE,
    workloads=("moments", "fuse", "select", "sums", "dx"),
    layouts=LAYOUTS,
    providers=("ours-triton-eager",),
)
PASSES = (_ALONE, replace(_STREAMING, dtypes=("bf16",)), replace(_STREAMING, dtypes=("fp32",)))

# The dearest comparison at the commonest setting first; then the other batches and layout, without
# compiling ours, and both in graphs.
_PAIR = ("plain-compile", "ours-triton-eager")
FUSE_SELECT = (
    _bf16("sk_fuse_select", stages=STAGES, providers=BOTH_CALLED_ALIKE),
    _bf16("sk_fuse_select", batches=(128, 8), stages=STAGES, providers=_PAIR),
    _bf16("sk_fuse_select", layouts=("nchw",), stages=STAGES, providers=_PAIR),
)

CONV = (
    _bf16(
        "sk_conv",
        stages=(1, 3),
        providers=(*BOTH_CALLED_ALIKE, "port-compile", "timm-sk-compile", "timm-sk-eager"),
    ),
    _bf16("sk_conv", layouts=("nchw",), providers=_PAIR),
)

_SKNET50 = _bf16(
    "sknet50",
    dtypes=("autocast",),
    batches=(128,),
    providers=(
        *("ours-triton-eager", "ours-triton-compile", "timm-sk-compile", "timm-se-compile"),
        *("plain-compile", "port-compile", "ours-triton-cudagraph", "plain-eager", "timm-sk-eager"),
    ),
)
NETWORK = (
    _SKNET50,
    replace(
        _SKNET50, layouts=("nchw",), providers=("ours-triton-eager", "timm-sk-eager", "plain-eager")
    ),
)

_GRAPHED = ("plain-eager", "plain-cudagraph", "ours-triton-eager", "ours-triton-cudagraph")
_SMALL_FUSE_SELECT = _bf16(
    "sk_fuse_select",
    modes=("infer",),
    batches=(1, 8),
    stages=(1, 4),
    providers=(*_GRAPHED, "plain-reduce-overhead"),
)
SMALL = (
    _SMALL_FUSE_SELECT,
    replace(_SKNET50, modes=("infer",), batches=(1, 8), providers=(*_GRAPHED, "timm-sk-eager")),
    replace(_SMALL_FUSE_SELECT, modes=("train",), batches=(8,)),
)

_THREE = ("plain-eager", *_PAIR)
REST = (
    Grid(("digits",), modes=("train",), batches=(64,), providers=UNCOMPILED),
    _bf16("sk_fuse_select", "sk_select", modes=("bwd",), providers=BOTH_CALLED_ALIKE),
    _bf16("sk_conv", modes=("bwd",), providers=BOTH_CALLED_ALIKE),
    _bf16("sk_fuse", "sk_select", layouts=LAYOUTS, stages=STAGES, providers=BOTH_CALLED_ALIKE),
    _bf16(
        "sk_fuse_select", dtypes=("fp32", "fp16"), layouts=("nchw",), Ms=(2, 3), providers=_THREE
    ),
    _bf16("sk_fuse_select", batches=(256,), resolutions=(160, 224, 320), providers=_THREE),
    _bf16("sk_fuse_select", providers=("plain-max-autotune", "plain-max-autotune-no-cudagraphs")),
    _bf16("sk_unit", dtypes=("bf16", "tf32"), stages=(1, 3), providers=BOTH_CALLED_ALIKE),
    _bf16(
        "sknet26", "sknet101", dtypes=("autocast",), providers=("plain-eager", "ours-triton-eager")
    ),
)

# The modules that `accelerate` knows, before (plain) and after it (ours), those with the largest
# maps first. Compiling takes most of the time: it is left to flags in channels_last, and where the
# graph is that of another family.
FAMILY = tuple(
    Grid(
        (name,),
        layouts=(layout,),
        batches=(family.batch,),
        resolutions=(family.resolution,),
        providers=UNCOMPILED if family.alike or layout == "channels_last" else CORE,
    )
    for layout in LAYOUTS
    for name, family in sorted(
        FAMILIES.items(), key=lambda item: (item[1].alike, item[1].reduction)
    )
)

# A laptop: under two minutes on two quiet cores without a GPU, three at most, and most of it
# torch.compile, so that the dearest compilations are left to flags.
QUICK = (
    Grid(("sk_fuse", "sk_select"), resolutions=(112,)),
    Grid(("sk_fuse_select",), modes=("infer",), resolutions=(112,)),
    Grid(("sk_fuse_select",), modes=("train",), resolutions=(112,), providers=UNCOMPILED),
    Grid(("digits",), modes=("train",), batches=(64,), providers=UNCOMPILED),
    Grid(("sk_conv",), resolutions=(64,), providers=UNCOMPILED),
    Grid(("sknet26",), modes=("infer",), resolutions=(64,)),
    Grid(("sknet26",), modes=("train",), batches=(4,), resolutions=(64,), providers=UNCOMPILED),
)

PRESETS = {
    "quick": Preset(QUICK, seconds=0.4, rounds=4, budget=170),
    # Batches that two cores take.
    "family": Preset(FAMILY, seconds=1.2, rounds=6, budget=590),
    # One GPU, for as long as there is one: the parts of `python -m perf campaign`, then the rest of
    # the axes. As much of this as fits, in this order, under --budget 500.
    "gpu-checks": Preset(CHECKS, seconds=0.05, rounds=1),
    "gpu-passes": Preset(PASSES, seconds=0.1, rounds=2),
    "gpu-fuse-select": Preset(FUSE_SELECT, seconds=0.2, rounds=2),
    "gpu-conv": Preset(CONV, seconds=0.2, rounds=2),
    "gpu-network": Preset(NETWORK, seconds=0.8, rounds=2),
    "gpu-small": Preset(SMALL, seconds=0.3, rounds=2),
    "full": Preset((*PASSES, *FUSE_SELECT, *CONV, *NETWORK, *SMALL, *REST), seconds=0.3, rounds=3),
}
