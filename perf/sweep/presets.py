"""The sweeps as data: which cases, in which order, and how long each is sampled."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from perf.rows.cases import LAYOUTS, LEVEL_OF, Case, DType, Layout, Level, Mode, make_case

CORE = (
    "plain-eager",
    "plain-compile",
    "ours-pytorch-eager",
    "ours-pytorch-compile",
    "ours-triton-eager",
    "ours-triton-compile",
)
UNCOMPILED = ("plain-eager", "ours-pytorch-eager", "ours-triton-eager")
ON_GPU = (
    "plain-eager",
    "plain-compile",
    "plain-max-autotune",
    "ours-triton-eager",
    "ours-triton-compile",
)
GRAPHED = (*ON_GPU, "ours-triton-cudagraph")
YARDSTICKS = (*GRAPHED, "timm-sk-eager", "timm-se-eager")


@dataclass(frozen=True)
class Grid:
    """Every combination of its axes. Workloads of one grid have one level."""

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
    def level(self) -> Level:
        """The level of the grid's workloads."""
        return LEVEL_OF[self.workloads[0]]

    @property
    def axes(self) -> tuple[tuple[Any, ...], ...]:
        """What the cases are all combinations of."""
        return (
            self.workloads,
            self.modes,
            self.dtypes,
            self.layouts,
            self.Ms,
            self.batches,
            self.resolutions,
            self.stages,
        )

    def cases(self) -> Iterator[Case]:
        """Yields the cases, each once: axes that a workload does not have are left out."""
        seen = set()
        for workload, mode, dtype, layout, M, batch, resolution, stage in itertools.product(
            *self.axes
        ):
            case = make_case(
                workload,
                mode,
                dtype=dtype,
                layout=layout,
                M=M,
                batch=batch,
                resolution=resolution,
                stage=stage,
            )
            if case not in seen:
                seen.add(case)
                yield case


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
        cases = list(grid.cases())
        shuffle(cases)
        for case in cases:
            before = wanted.get(case, ())
            wanted[case] = (*before, *(name for name in grid.providers if name not in before))
    return [Job(case, providers) for case, providers in wanted.items()]


# Restoration networks work on maps as large as the image.
FAMILIES = (
    Grid(("mirnet_skff",), batches=(2,), resolutions=(128,)),
    Grid(("dehazeformer_sk_fusion",), batches=(2,), resolutions=(256,)),
    Grid(
        (
            "timm_selective_kernel",
            "resnest_split_attention",
            "simclr_sk_conv",
            "cycle_mlp",
            "vision_permutator",
        ),
        batches=(4,),
    ),
)

PRESETS = {
    # A laptop: under two minutes on two quiet cores without a GPU, three at most, and most of
    # it torch.compile, so that the dearest compilations are left to flags.
    "quick": Preset(
        grids=(
            Grid(("sk_fuse", "sk_select"), resolutions=(112,)),
            Grid(("sk_fuse_select",), modes=("infer",), resolutions=(112,)),
            Grid(("sk_fuse_select",), modes=("train",), resolutions=(112,), providers=UNCOMPILED),
            Grid(("digits",), modes=("train",), batches=(64,), providers=UNCOMPILED),
            Grid(("sk_conv",), resolutions=(64,), providers=UNCOMPILED),
            Grid(("sknet26",), modes=("infer",), resolutions=(64,)),
            Grid(
                ("sknet26",),
                modes=("train",),
                batches=(4,),
                resolutions=(64,),
                providers=UNCOMPILED,
            ),
        ),
        seconds=0.4,
        rounds=4,
        budget=170,
    ),
    # The modules that `accelerate` knows, before (plain) and after it (ours), in the
    # batches that two cores take. Compiling takes most of the time: it is left to flags in
    # channels_last, and where the compiled graph is that of timm's module.
    "family": Preset(
        grids=(
            *FAMILIES,
            *(replace(grid, layouts=("channels_last",), providers=UNCOMPILED) for grid in FAMILIES),
            Grid(
                ("port_sk_conv", "pytorchcv_sk_conv"),
                layouts=LAYOUTS,
                batches=(4,),
                providers=UNCOMPILED,
            ),
        ),
        seconds=1.2,
        rounds=6,
        budget=590,
    ),
    # One GPU: as much of this as fits, in this order, under --budget 500.
    "full": Preset(
        grids=(
            Grid(
                ("sk_fuse_select", "sk_fuse", "sk_select"),
                dtypes=("bf16",),
                layouts=("channels_last", "nchw"),
                batches=(32, 128),
                providers=GRAPHED,
            ),
            Grid(
                ("sk_conv",),
                dtypes=("bf16",),
                layouts=("channels_last",),
                batches=(32,),
                providers=YARDSTICKS,
            ),
            Grid(
                ("sknet50",),
                dtypes=("autocast",),
                layouts=("channels_last",),
                batches=(64,),
                providers=(*CORE, "timm-sk-eager", "timm-se-eager"),
            ),
            Grid(("digits",), modes=("train",), batches=(64,), providers=UNCOMPILED),
            Grid(
                ("sk_fuse_select", "sk_select"),
                modes=("bwd",),
                dtypes=("bf16",),
                layouts=("channels_last",),
                batches=(32,),
                providers=(
                    "plain-eager",
                    "plain-compile",
                    "ours-triton-eager",
                    "ours-triton-compile",
                ),
            ),
            Grid(
                ("sk_conv",),
                modes=("bwd",),
                dtypes=("bf16",),
                layouts=("channels_last",),
                batches=(32,),
                providers=(
                    "plain-eager",
                    "plain-compile",
                    "ours-triton-eager",
                    "ours-triton-compile",
                ),
            ),
            Grid(
                ("sk_fuse_select", "sk_fuse", "sk_select"),
                dtypes=("bf16",),
                layouts=("channels_last", "nchw"),
                batches=(32,),
                stages=(2, 3, 4),
                providers=("plain-eager", "plain-compile", "ours-triton-eager"),
            ),
            Grid(
                ("sk_fuse_select", "sk_fuse", "sk_select"),
                dtypes=("fp32", "fp16"),
                layouts=("nchw",),
                Ms=(2, 3),
                batches=(32,),
                providers=("plain-eager", "plain-compile", "ours-triton-eager"),
            ),
            Grid(
                ("sk_fuse_select", "sk_fuse", "sk_select"),
                dtypes=("bf16",),
                layouts=("channels_last",),
                batches=(1, 8, 256),
                resolutions=(160, 224, 320),
                providers=("plain-eager", "plain-compile", "ours-triton-eager"),
            ),
            Grid(
                ("sk_unit",),
                dtypes=("bf16", "tf32"),
                layouts=("channels_last",),
                batches=(32,),
                stages=(1, 3),
                providers=ON_GPU,
            ),
            Grid(
                ("sknet50",),
                dtypes=("bf16",),
                layouts=("channels_last",),
                batches=(1, 8, 128),
                resolutions=(224, 320),
                providers=(
                    "plain-eager",
                    "ours-triton-eager",
                    "ours-triton-cudagraph",
                    "timm-sk-eager",
                    "timm-se-eager",
                ),
            ),
            Grid(
                ("sknet26", "sknet101"),
                dtypes=("autocast",),
                layouts=("channels_last",),
                batches=(32,),
                providers=("plain-eager", "ours-triton-eager"),
            ),
        ),
        seconds=0.3,
        rounds=3,
    ),
}
