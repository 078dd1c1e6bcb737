"""Draw a report: speed-up, bandwidth, passes, and latency over batch and resolution.

Every figure is written as PNG and SVG, named after the report.
"""

import argparse
from pathlib import Path

from perf.commands.files import read_report
from perf.errors import UsageError

DPI = 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the report and where the figures go."""
    parser.add_argument("report", type=Path, metavar="FILE.csv")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the figures (default: beside the report)"
    )


def main(args: argparse.Namespace) -> int:
    """Writes the figures and prints their paths."""
    from perf.figures import figures

    frame = read_report(args.report)
    if not (frame.status == "ok").any():
        raise UsageError(f"{args.report} has no measured row")
    folder = args.out or args.report.parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(frame):
        for suffix in ("png", "svg"):
            path = folder / f"{args.report.stem}-{name}.{suffix}"
            figure.savefig(path, dpi=DPI)
            print(path)
    return 0
