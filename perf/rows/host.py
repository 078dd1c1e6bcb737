"""The CSV of the host's time: a call of ours beside one of the plain modules."""

from dataclasses import dataclass

from perf.rows.env import Environment
from perf.rows.typed_csv import Schema, columns_of


@dataclass(frozen=True)
class Host:
    """One row of the table: SKConv without its branches' convolutions.

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


SCHEMA = Schema(columns=(*columns_of(Host), *columns_of(Environment)), key=("M", "mode"))
