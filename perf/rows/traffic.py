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


SIZES = ("B", "C", "H", "W")
SCHEMA = Schema(
    columns=(
        *columns_of(Traffic),
        *(Column(name, int) for name in SIZES),
        *columns_of(Environment),
    ),
    key=("M", "layout", "dtype", "provider", *SIZES),
)
