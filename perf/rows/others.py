"""The columns of the other CSVs: passes and launches counted, the host's time, tuned launches."""

from dataclasses import astuple, dataclass, fields

from perf.rows.env import Environment
from perf.rows.typed_csv import Column, Schema, columns_of
from sknet_kernels.config import LaunchConfig, Problem, Stage


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

    Attributes:
        launches_training: forward, backward and running statistics.
        launches_inference: forward in evaluation mode.
        launches_counted: what was counted: ``operators`` of eager PyTorch, the kernels of
            Inductor's ``CPU plan``, or launches and operators that reach a ``driver``.
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
    """The host's time of SKConv without its branches' convolutions, beside the plain modules.

    Attributes:
        M: branches.
        mode: ``infer``, or ``train`` with the backward pass and the running statistics.
        ours_us: CPU time of one call, median over the rounds.
        plain_us: the same of the plain modules.
        ratio: ours to theirs, median of the rounds' ratios.
        ratio_p20: of the rounds' ratios.
        ratio_p80: likewise.
    """

    M: int
    mode: str
    ours_us: float
    plain_us: float
    ratio: float
    ratio_p20: float
    ratio_p80: float


HOST = Schema(columns=(*columns_of(Host), *columns_of(Environment)), key=("M", "mode"))


@dataclass(frozen=True)
class Timing:
    """What a launch configuration was chosen by.

    Attributes:
        heuristic_ms: median time of the heuristics' configuration, with a cold L2, and of what
            joins its partial sums.
        ms: of the chosen one, which is the same where nothing was faster beyond the noise.
        timed: how many configurations were timed.
        refused: how many were not, since their results were wrong or they did not run.
    """

    heuristic_ms: float
    ms: float
    timed: int
    refused: int


# The table of a device, as `sknet_kernels.tuned` reads it.
TUNED = Schema(
    columns=(
        Column("stage", str),
        *columns_of(Problem),
        *columns_of(LaunchConfig),
        *columns_of(Timing),
        *columns_of(Environment),
    ),
    key=("stage", *(field.name for field in fields(Problem))),
)


def tuned_key(stage: Stage, problem: Problem) -> tuple[str, ...]:
    """Returns what identifies a row of it: its key columns as the CSV spells them."""
    return (stage.name, *map(str, astuple(problem)))


def tuned_line(
    stage: Stage, problem: Problem, config: LaunchConfig, timing: Timing, env: Environment
) -> str:
    """Returns one line of that table."""
    parts = (problem, config, timing, env)
    return TUNED.line([stage.name, *(value for part in parts for value in astuple(part))])
