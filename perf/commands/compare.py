"""Compare two reports and exit with 1 where the new one is slower beyond noise.

Rows are joined on the key columns. A row regressed where its median grew by more than
--max-regression and by more than twice the wider p20 to p80 of both runs, or where it was ok and
no longer is. Load that only one of the runs had looks like a regression.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from perf.commands.files import check_rows, read_report
from perf.report import comparison, tables
from perf.report.text import Align, text_table
from perf.rows.errors import UsageError

_COLUMNS: dict[str, Align] = {
    "case": "left",
    "provider": "left",
    "old ms": "right",
    "new ms": "right",
    "ratio": "right",
    "verdict": "right",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the two reports and the limit."""
    parser.add_argument("old", type=Path, metavar="OLD.csv")
    parser.add_argument("new", type=Path, metavar="NEW.csv")
    parser.add_argument(
        "--max-regression",
        type=percentage,
        default=0.05,
        metavar="PERCENT",
        help="how much slower a median may be, such as 5%% (default: 5%%)",
    )


def main(args: argparse.Namespace) -> int:
    """Prints every joined row and the verdict."""
    old, new = _with_times(args.old), _with_times(args.new)
    result = comparison.compare(old, new, args.max_regression)
    if result.rows.empty:
        raise UsageError(f"{args.old} and {args.new} have no measured row in common")
    for line in comparison.environment_changes(old, new):
        print(f"different environment: {line}")
    lines = [_line(row) for _, row in result.rows.iterrows()]
    print(text_table(lines, _COLUMNS))
    counts = result.rows.verdict.value_counts()
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if result.only_old or result.only_new:
        print(f"not compared: {result.only_old} rows only in OLD, {result.only_new} only in NEW")
    return 1 if result.regressed else 0


def percentage(text: str) -> float:
    """Parses a percentage, with or without its sign, as a fraction."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage")
    return value / 100


def _with_times(path: Path) -> pd.DataFrame:
    report = read_report(path)
    for name in ("ms_p50", "ms_p20", "ms_p80"):
        times = report[name]
        good = (report.status != "ok") | ((times > 0) & np.isfinite(times))
        check_rows(path, times, good, "a time, where status is ok")
    return report


def _line(row: "pd.Series[float]") -> list[str]:
    verdict = str(row["verdict"])
    lost = verdict == "lost"
    return [
        tables.case_label(row),
        str(row["provider"]),
        _spread(row, "old"),
        f"{row.status_new}: {row.reason_new}" if lost else _spread(row, "new"),
        "" if lost else f"{row.ratio:.3f}",
        verdict,
    ]


def _spread(row: "pd.Series[float]", side: str) -> str:
    p50, p20, p80 = (row[f"ms_{name}_{side}"] for name in ("p50", "p20", "p80"))
    return f"{p50:.3g} ({p20:.3g} to {p80:.3g})"
