"""The CSV of a traffic count: passes over a branch that each provider moves, and what it saves."""

from dataclasses import dataclass

from perf.rows.env import Environment
from perf.rows.typed_csv import Column, Schema, columns_of


@dataclass(frozen=True)
class Traffic:
    """One row of the table: passes in training and inference, and branch tensors saved."""

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
SCHEMA = Schema(
    columns=(
        *columns_of(Traffic),
        *columns_of(Launches),
        *(Column(name, int) for name in SIZES),
        *columns_of(Environment),
    ),
    key=("M", "layout", "dtype", "provider", *SIZES),
)
