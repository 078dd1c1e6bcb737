"""The columns of every CSV, which are the fields of the dataclasses here.

First the report of a sweep, a row for each case and provider; then the other tables: passes and
launches counted, the host's time, launches that were timed.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from perf.rows.env import Environment
from perf.rows.typed_csv import Column, Schema, columns_of
from sknet_kernels.config import LaunchConfig, Problem
from sknet_kernels.small import SmallConfig, SmallProblem

Level = Literal["pass", "op", "layer", "family", "model", "workload"]
Mode = Literal["infer", "train", "bwd"]
DType = Literal["fp32", "tf32", "bf16", "fp16", "autocast"]
Layout = Literal["nchw", "channels_last"]

LEVELS: tuple[Level, ...] = get_args(Level)
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES: tuple[DType, ...] = get_args(DType)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
STAGES = (1, 2, 3, 4)

Status = Literal["ok", "unverified", "unsupported", "oom", "error"]


@dataclass(frozen=True)
class Case:
    """One computation. The fields are the key columns of the CSV, in this order.

    ``resolution`` is that of the image; a pass, an op or a layer sees the map [B, C, H, W] that an
    SKNet has in ``stage`` at that resolution, a family the map that it has in its own network.
    ``stage`` is 0 there and for networks, whose C, H, W are those of their input.
    Mode infer is the forward pass without gradients, train the forward and the backward pass, bwd
    the backward pass of an op, a layer or a family alone; the digits workload trains to the end,
    optimiser included.
    """

    level: Level
    workload: str
    mode: Mode
    dtype: DType
    layout: Layout
    M: int
    B: int
    resolution: int
    stage: int
    C: int
    H: int
    W: int

    @property
    def differentiates(self) -> bool:
        """Whether a backward pass belongs to it."""
        return self.mode != "infer"

    @property
    def label(self) -> str:
        """The case in one short line."""
        stage = f" stage {self.stage}" if self.stage else ""
        return (
            f"{self.workload}{stage} {self.mode} {self.dtype} {self.layout} "
            f"M={self.M} B={self.B} {self.resolution}px"
        )


@dataclass(frozen=True)
class Result:
    """What came of one provider on one case; None where it does not apply."""

    # ok; unverified where the result was wrong, which is then never timed; unsupported where the
    # provider cannot carry the case out here, or cannot run the backward pass alone again; oom;
    # error. The reason is one line that says why it is not ok.
    status: Status
    reason: str = ""
    # Time of one call in milliseconds, median and 20 % and 80 % quantiles over n samples; on a GPU
    # the GPU's own, with a cold L2.
    ms_p50: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    n: int | None = None
    # At the median of the time that counts, for all but ops and passes; `counts_call_to_call` says
    # which of the two does.
    images_per_s: float | None = None
    compile_s: float | None = None  # of the first call, where it compiles, with cold caches
    # What the mathematics has to move, where no convolution moves more, and over the median time.
    bytes_needed: int | None = None
    gbps: float | None = None  # none where the bytes are 0
    copy_gbps: float | None = None  # of a large copy, measured in the same process
    pct_copy: float | None = None  # over 100 where the tensors stay in a cache
    # 1e9 operations of one call, a multiply-add being two, the backward pass two forward passes.
    gflops: float | None = None
    tflops_per_s: float | None = None
    launches: int | None = None  # kernels, copies and fills of one call, on a GPU
    # Most memory in MiB that one call allocates at a time, on a GPU; none in a graph, whose memory
    # is kept between calls.
    peak_mb: float | None = None
    # MiB that the forward pass keeps for the backward pass, and without the inputs, which the
    # caller may hold anyway.
    saved_mb: float | None = None
    saved_own_mb: float | None = None
    accuracy: float | None = None  # share of held-out images named rightly, for the workload
    # Largest errors against float64, and what they were allowed to be: of the output over its
    # largest value, of a gradient over its norm.
    out_err: float | None = None
    out_err_bound: float | None = None
    grad_err: float | None = None
    grad_err_bound: float | None = None
    judged_batch: int | None = None  # images of the float64 run; a network's batch repeats them
    # From one call to the next on a GPU, by the clock: what a user waits for where batches are
    # small.
    call_ms_p50: float | None = None
    call_ms_p20: float | None = None
    call_ms_p80: float | None = None
    # The `Switches`, as they were while it was timed.
    cudnn: bool | None = None
    cudnn_benchmark: bool | None = None
    cudnn_deterministic: bool | None = None
    cudnn_tf32: bool | None = None
    matmul_tf32: bool | None = None
    deterministic: bool | None = None
    timed_threads: int | None = None


CASE_COLUMNS = tuple(f.name for f in fields(Case))
KEY_COLUMNS = (*CASE_COLUMNS, "provider")
SCHEMA = Schema(
    columns=(
        *columns_of(Case),
        Column("provider", str),
        *columns_of(Result),
        *columns_of(Environment),
    ),
    key=KEY_COLUMNS,
)


def read(path: Path) -> pd.DataFrame:
    """Reads a report as `Schema.read` does; columns that are younger than it are empty."""
    return SCHEMA.read(path)


# Calls up to this batch are often over before the host has started the next one: a user waits for
# the host there, and the GPU's own time says little.
SMALL_BATCH = 8


def counts_call_to_call(batch: int, call_ms: float | None) -> bool:
    """Tells whether the time from call to call counts, where it was taken at all."""
    return batch <= SMALL_BATCH and pd.notna(call_ms)


def by_the_clock_that_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns ``frame`` with the times from call to call as its ms where those count."""
    small = (frame.B <= SMALL_BATCH) & frame.call_ms_p50.notna()
    names = ("ms_p20", "ms_p50", "ms_p80")
    return frame.assign(**{name: frame[name].mask(small, frame[f"call_{name}"]) for name in names})


# The other tables.


@dataclass(frozen=True)
class Traffic:
    """Passes over a branch that a provider moves in training and inference, and what it saves."""

    M: int
    layout: str
    dtype: str
    provider: str
    training: float
    inference: float
    saved: float


@dataclass(frozen=True)
class Launches:
    """What is launched between SKConv's convolutions and V; older files do not have it.

    In training that is forward, backward and running statistics. Counted are ``operators`` of eager
    PyTorch, the kernels of Inductor's ``Triton plan`` or ``CPU plan``, or launches and operators
    that reach a ``driver``.
    """

    launches_training: int | None = None
    launches_inference: int | None = None
    launches_counted: str | None = None


SIZES = ("B", "C", "H", "W")
TRAFFIC = Schema(
    columns=(
        *columns_of(Traffic),
        *columns_of(Launches),
        *(Column(name, int) for name in SIZES),
        *columns_of(Environment),
    ),
    key=("M", "layout", "dtype", "provider", *SIZES),
)


@dataclass(frozen=True)
class Host:
    """The host's time of SKConv without its branches' convolutions, beside the plain modules."""

    M: int
    mode: str  # infer, or train with the backward pass and the running statistics
    ours_us: float  # CPU time of one call, median over the rounds
    plain_us: float
    ratio: float  # ours to theirs, median and quantiles of the rounds' ratios
    ratio_p20: float
    ratio_p80: float


HOST = Schema(columns=(*columns_of(Host), *columns_of(Environment)), key=("M", "mode"))


@dataclass(frozen=True)
class Timing:
    """What a launch configuration was chosen by; times are medians with a cold L2."""

    heuristic_ms: float  # of the heuristics' configuration, and of what joins its partial sums
    ms: float  # of the chosen one: the same where nothing was faster beyond the noise
    timed: int  # configurations
    refused: int  # those whose results were wrong, or that did not run


# Of streaming and of small kernels: what one of them has and the other has not is empty there.
_PROBLEM = {column.name: column for part in (Problem, SmallProblem) for column in columns_of(part)}
_CONFIG = {
    column.name: column for part in (LaunchConfig, SmallConfig) for column in columns_of(part)
}
# The table of a device, as `sknet_kernels.tuned` reads it.
TUNED = Schema(
    columns=(
        Column("kernel", str),
        *(replace(column, optional=True) for column in (_PROBLEM | _CONFIG).values()),
        *columns_of(Timing),
        *columns_of(Environment),
    ),
    key=("kernel", *_PROBLEM),
)
