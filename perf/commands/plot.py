"""Draw a report: speed-up, bandwidth, passes, and how time grows with batch and image size.

A file that traffic wrote is drawn as passes moved and tensors saved by each plan, beside the
minimum. Every figure is written as PNG and SVG, named after the report.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from perf.commands.files import check_providers, read_report, whole_file
from perf.rows import traffic
from perf.rows.errors import UsageError
from perf.rows.typed_csv import contents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
_TRAFFIC_HEADER = ",".join(traffic.SCHEMA.names[:4]).encode()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the report and where the figures go."""
    parser.add_argument("report", type=Path, metavar="FILE.csv")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the figures (default: beside the report)"
    )


def main(args: argparse.Namespace) -> int:
    """Writes the figures and prints their paths."""
    from perf.report.figures import figures
    from perf.report.traffic_figure import traffic_figure

    if contents(args.report).startswith(_TRAFFIC_HEADER):
        table = traffic.SCHEMA.read(args.report)
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
