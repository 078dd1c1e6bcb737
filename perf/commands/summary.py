"""Print a report as Markdown, for a README.

With --pairs every provider of this package stands beside the plain module that was called the same
way in the same run: time, ratio, and what is kept for the backward pass.
"""

import argparse
from pathlib import Path

import pandas as pd

from perf.commands.files import read_report
from perf.report import tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the report."""
    parser.add_argument("report", type=Path, metavar="FILE.csv")
    parser.add_argument("--pairs", action="store_true", help="before and after, side by side")


def main(args: argparse.Namespace) -> int:
    """Prints the environment, the table, and what was not measured and why."""
    frame = read_report(args.report)
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
