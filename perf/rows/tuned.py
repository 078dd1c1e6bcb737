"""The table of a device's launch configurations, as `sknet_kernels.tuned` reads it."""

from dataclasses import astuple, dataclass, fields

from perf.rows.env import Environment
from perf.rows.typed_csv import Column, Schema, columns_of
from sknet_kernels.config import LaunchConfig, Problem, Stage


@dataclass(frozen=True)
class Timing:
    """What the choice was made by.

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


SCHEMA = Schema(
    columns=(
        Column("stage", str),
        *columns_of(Problem),
        *columns_of(LaunchConfig),
        *columns_of(Timing),
        *columns_of(Environment),
    ),
    key=("stage", *(field.name for field in fields(Problem))),
)


def key_of(stage: Stage, problem: Problem) -> tuple[str, ...]:
    """Returns what identifies a row: its key columns as the CSV spells them."""
    return (stage.name, *map(str, astuple(problem)))


def line(
    stage: Stage, problem: Problem, config: LaunchConfig, timing: Timing, env: Environment
) -> str:
    """Returns one line of a table."""
    parts = (problem, config, timing, env)
    return SCHEMA.line([stage.name, *(value for part in parts for value in astuple(part))])
