"""A report as text, from its CSV alone, and two reports against each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perf.rows.schema import (
    CASE_COLUMNS,
    KEY_COLUMNS,
    LEVELS,
    Case,
    by_the_clock_that_counts,
    counts_call_to_call,
)
from perf.sweep.providers import BASELINE, BEFORE

# Columns are this much wider than their names at least, so that names stand apart.
_PADDING = 2
# Of numbers the ends stand below each other, of these the beginnings.
_WORDS = {"case", "provider", "before, after", "note"}

_COLUMNS = (
    *("case", "provider", "ms", "p20 to p80"),
    *(f"x {BASELINE}", "images/s", "% of copy", "note"),
)
_PAIR_COLUMNS = (
    *("case", "before, after", "ms before (p20 to p80)", "ms after (p20 to p80)"),
    *("ratio", "saved MiB", "without inputs"),
)


def table(frame: pd.DataFrame, *, markdown: bool = False) -> str:
    """Returns the measured rows of ``frame`` as a table, for a terminal or a document.

    ``x plain-eager`` is the speed-up over the baseline in the same case.
    """
    lines = [line for _, case in by_case(frame) for line in _lines(case)]
    return text_table(lines, _COLUMNS, markdown=markdown)


def pairs(frame: pd.DataFrame, *, markdown: bool = False) -> str:
    """Returns a line for each measured provider of ours and the plain module called likewise.

    ``ratio`` is before over after. Memory is what is kept for the backward pass, in MiB, with the
    inputs and without them.
    """
    lines = [line for _, case in by_case(frame[frame.status == "ok"]) for line in _pairs(case)]
    return text_table(lines, _PAIR_COLUMNS, markdown=markdown)


def not_measured(frame: pd.DataFrame) -> list[str]:
    """Returns a line for each status and reason of the rows that have no time."""
    rest = frame[frame.status != "ok"]
    lines = []
    for (status, reason), rows in rest.groupby(["status", "reason"], sort=False):
        names = ", ".join(rows.provider.unique())
        count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
        lines.append(f"{status}: {names} ({count}): {reason}")
    return lines


def by_case(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Returns the rows of each case under its label, ordered by level and the other axes."""
    frame = by_the_clock_that_counts(frame)
    ordered = frame.assign(level=pd.Categorical(frame.level, LEVELS, ordered=True))
    groups = ordered.groupby(list(CASE_COLUMNS), sort=True, observed=True)
    return [(case_label(rows.iloc[0]), rows) for _, rows in groups]


def case_label(row: pd.Series) -> str:
    """Returns the case of a row in one short line."""
    return Case(**{name: row[name] for name in CASE_COLUMNS}).label


def speedups(case: pd.DataFrame) -> "pd.Series[float]":
    """Returns how many times as fast as the baseline each row of one case is."""
    baseline = case.loc[case.provider == BASELINE, "ms_p50"]
    if baseline.empty:
        return pd.Series(float("nan"), index=case.index)
    return float(baseline.iloc[0]) / case.ms_p50


def _lines(case: pd.DataFrame) -> list[list[str]]:
    measured = case.assign(speedup=speedups(case))
    lines: list[list[str]] = []
    for _, row in measured[measured.status == "ok"].iterrows():
        lines.append(
            [
                case_label(row) if not lines else "",
                row.provider,
                _number(row.ms_p50),
                f"{_number(row.ms_p20)} to {_number(row.ms_p80)}",
                _number(row.speedup),
                _number(row.images_per_s, 0),
                _number(row.pct_copy, 0),
                _note(row),
            ]
        )
    return lines


def _pairs(case: pd.DataFrame) -> list[list[str]]:
    rows = {str(row.provider): row for _, row in case.iterrows()}
    lines: list[list[str]] = []
    for name, counterpart in BEFORE.items():
        if name not in rows or counterpart not in rows:
            continue
        before, after = rows[counterpart], rows[name]
        lines.append(
            [
                case_label(after) if not lines else "",
                f"{counterpart}, {name}",
                *(
                    f"{_number(row.ms_p50)} ({_number(row.ms_p20)} to {_number(row.ms_p80)})"
                    for row in (before, after)
                ),
                f"{before.ms_p50 / after.ms_p50:.2f}",
                *(
                    _change(before[column], after[column])
                    for column in ("saved_mb", "saved_own_mb")
                ),
            ]
        )
    return lines


def _change(before: float, after: float) -> str:
    return "" if pd.isna(before) or pd.isna(after) else f"{before:.1f} to {after:.1f}"


def _note(row: pd.Series) -> str:
    notes = []
    if counts_call_to_call(row.B, row.call_ms_p50):
        notes.append("from call to call")
    if pd.notna(row.accuracy):
        notes.append(f"held-out accuracy {row.accuracy:.1%}")
    if pd.notna(row.compile_s):
        notes.append(f"compiled in {row.compile_s:.0f} s")
    return ", ".join(notes)


def _number(value: float, decimals: int | None = None) -> str:
    if pd.isna(value):
        return ""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def text_table(
    lines: Sequence[Sequence[str]], columns: Sequence[str], *, markdown: bool = False
) -> str:
    """Returns ``lines`` under the names of ``columns``, words to the left, numbers to the right."""
    widths = [
        max(len(name) + _PADDING, *(len(line[i]) for line in lines), 0)
        for i, name in enumerate(columns)
    ]
    placed = [
        [
            cell.ljust(width) if name in _WORDS else cell.rjust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ]
        for line in (columns, *lines)
    ]
    if markdown:
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        rows = [f"| {' | '.join(cells)} |" for cells in placed]
    else:
        rule = "  ".join("-" * width for width in widths)
        rows = ["  ".join(cells).rstrip() for cells in placed]
    return "\n".join([rows[0], rule, *rows[1:]])


# Two reports, row by row.

ENVIRONMENT_COLUMNS = ("gpu", "driver", "cuda", "cpu", "threads", "ranks", "torch", "triton")

# Repeats on a machine with steady other work moved medians by up to 1.3 times that range, over 144
# pairs of rows: the samples of one row see the same neighbours, those of a repeat others. Load that
# only one of the runs had moves them by more, and no row can tell.
NOISE = 2


@dataclass(frozen=True)
class Comparison:
    """Rows of both reports joined on the key, with ``ratio`` and ``verdict``, and the leftovers.

    A verdict is "slower" where the median grew by more than the limit and by more than the noise:
    `NOISE` times the wider p20 to p80 of both runs. "faster" is the mirror image, "lost" a row that
    was ok and no longer is.
    """

    rows: pd.DataFrame
    only_old: int
    only_new: int

    @property
    def regressed(self) -> bool:
        """Whether a row is slower or lost."""
        return bool(self.rows.verdict.isin(("slower", "lost")).any())


def compare(old: pd.DataFrame, new: pd.DataFrame, max_regression: float) -> Comparison:
    """Joins two reports; of rows that were not ok before only their number matters."""
    both = pd.merge(
        old, new, on=list(KEY_COLUMNS), how="outer", suffixes=("_old", "_new"), indicator=True
    )
    rows = both[(both["_merge"] == "both") & (both.status_old == "ok")].copy()
    limit = 1 + max_regression
    rows["ratio"] = rows.ms_p50_new / rows.ms_p50_old
    rows["verdict"] = "same"
    growth = rows.ms_p50_new - rows.ms_p50_old
    noise = NOISE * np.maximum(rows.ms_p80_old - rows.ms_p20_old, rows.ms_p80_new - rows.ms_p20_new)
    slower = (rows.ratio > limit) & (growth > noise)
    faster = (rows.ratio < 1 / limit) & (growth < -noise)
    rows.loc[slower, "verdict"] = "slower"
    rows.loc[faster, "verdict"] = "faster"
    rows.loc[rows.status_new != "ok", "verdict"] = "lost"
    return Comparison(
        rows=rows,
        only_old=int((both["_merge"] == "left_only").sum()),
        only_new=int((both["_merge"] == "right_only").sum()),
    )


def environment_changes(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Returns a line for each part of the environment that differs between the reports."""
    changes = []
    for column in ENVIRONMENT_COLUMNS:
        before, after = (sorted(map(str, frame[column].unique())) for frame in (old, new))
        if before != after:
            changes.append(f"{column}: {', '.join(before)} -> {', '.join(after)}")
    return changes
