"""What is made of reports: comparisons, figures, tables, documents. Nothing is measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from perf.commands.options import check_providers, check_times, read_report, whole_file
from perf.report import tables
from perf.report.documents import published
from perf.report.tables import text_table
from perf.rows import UsageError, env
from perf.rows.schema import TRAFFIC
from perf.rows.typed_csv import contents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
_TRAFFIC_HEADER = ",".join(TRAFFIC.names[:4]).encode()
_COLUMNS = ("case", "provider", "old ms", "new ms", "ratio", "verdict")


def add_compare(parser: argparse.ArgumentParser) -> None:
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


def compare(args: argparse.Namespace) -> int:
    """Compare two reports and exit with 1 where the new one is slower beyond noise.

    Rows are joined on the key columns. A row regressed where its median grew by more than
    --max-regression and by more than twice the wider p20 to p80 of both runs, or where it was ok
    and no longer is. Load that only one of the runs had looks like a regression.
    """
    old, new = _with_times(args.old), _with_times(args.new)
    result = tables.compare(old, new, args.max_regression)
    if result.rows.empty:
        raise UsageError(f"{args.old} and {args.new} have no measured row in common")
    for line in tables.environment_changes(old, new):
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
    check_times(path, report)
    return report


def _line(row: pd.Series[float]) -> list[str]:
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


def _spread(row: pd.Series[float], side: str) -> str:
    p50, p20, p80 = (row[f"ms_{name}_{side}"] for name in ("p50", "p20", "p80"))
    return f"{p50:.3g} ({p20:.3g} to {p80:.3g})"


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Declares the report and where the figures go."""
    parser.add_argument("report", type=Path, metavar="FILE.csv")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the figures (default: beside the report)"
    )


def plot(args: argparse.Namespace) -> int:
    """Draw a report: speed-up, bandwidth, passes, and how time grows with batch and image size.

    A file that traffic wrote is drawn as passes moved and tensors saved by each plan, beside the
    minimum. Every figure is written as PNG and SVG, named after the report.
    """
    from perf.report.figures import figures, traffic_figure

    if contents(args.report).startswith(_TRAFFIC_HEADER):
        table = TRAFFIC.read(args.report)
        check_providers(args.report, table)
        if table.empty:
            raise UsageError(f"{args.report} has no row")
        drawn: Iterable[tuple[str, Figure]] = [("moved", traffic_figure(table))]
    else:
        frame = read_report(args.report)
        if not (frame.status == "ok").any():
            raise UsageError(f"{args.report} has no measured row")
        drawn = figures(frame)
    folder = args.out or args.report.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: {folder} is no folder: {error.strerror}") from error
    for name, figure in drawn:
        for suffix in ("png", "svg"):
            path = folder / f"{args.report.stem}-{name}.{suffix}"
            with whole_file(path) as file:
                figure.savefig(file, format=suffix, dpi=DPI)
            print(path)
    return 0


def publish(args: argparse.Namespace) -> int:
    """Write every table of the READMEs from the reports in perf/reports.

    Nothing is measured. A document whose tables already say what the reports say is left alone.
    """
    for path, text in published(env.CHECKOUT).items():
        if text != path.read_text(encoding="utf-8"):
            with whole_file(path) as file:
                file.write(text.encode())
            print(path.relative_to(env.CHECKOUT))
    return 0


def add_summary(parser: argparse.ArgumentParser) -> None:
    """Declares the report."""
    parser.add_argument("report", type=Path, metavar="FILE.csv")
    parser.add_argument("--pairs", action="store_true", help="before and after, side by side")


def summary(args: argparse.Namespace) -> int:
    """Print a report as Markdown, for a README.

    With --pairs every provider of this package stands beside the plain module that was called the
    same way in the same run: time, ratio, and what is kept for the backward pass.
    """
    frame = read_report(args.report)
    if frame.empty:
        raise UsageError(f"{args.report} has no row")
    print(f"{_environment(frame)}\n")
    show = tables.pairs if args.pairs else tables.table
    print(show(frame, markdown=True))
    for line in tables.not_measured(frame):
        print(f"\n{line}")
    return 0


def _environment(frame: pd.DataFrame) -> str:
    where = (
        _values(frame, "gpu") or f"{_values(frame, 'cpu')}, {_values(frame, 'threads')} thread(s)"
    )
    versions = ", ".join(f"{name} {_values(frame, name)}" for name in ("torch", "triton", "python"))
    dirty = " with changes" if frame.git_dirty.any() else ""
    commit = ", ".join(sha[:10] for sha in frame.git_sha.unique())
    return f"{where}; {versions}; commit {commit}{dirty}; {frame.timestamp_utc.max()[:10]}"


def _values(frame: pd.DataFrame, column: str) -> str:
    return ", ".join(str(value) for value in frame[column].unique() if value != "")
