"""The tables of the documents, from the committed reports alone.

A table stands between the lines ``<!-- name: begin -->`` and ``<!-- name: end -->``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from perf.rows import UsageError, schema
from perf.rows.schema import LAYOUTS
from perf.rows.typed_csv import Schema
from perf.sweep.workloads import LEVEL_OF

REPORTS = "perf/reports"
_TRAFFIC_PROVIDERS = ("plain-eager", "plain-compile", "ours-pytorch-compile", "ours-triton-eager")
_EAGER = ("plain-eager", "ours-pytorch-eager")
_COMPILED = ("plain-compile", "ours-pytorch-compile")


@dataclass(frozen=True)
class Table:
    """One table of a document.

    Attributes:
        document: its path in the checkout.
        name: what its markers say.
        report: the file in `REPORTS` that it is made of.
        schema: the report's.
        markdown: makes the lines of the table.
    """

    document: str
    name: str
    report: str
    schema: Schema
    markdown: Callable[[pd.DataFrame], list[str]]

    def lines(self, checkout: Path) -> list[str]:
        """Returns the lines of the table from the report in ``checkout``.

        Raises:
            UsageError: the report cannot be read, or a row is missing.
        """
        report = self.schema.read(checkout / REPORTS / self.report)
        try:
            return self.markdown(report)
        except KeyError as error:
            raise UsageError(f"{REPORTS}/{self.report}: no row of {error}") from error

    def placed(self, text: str, lines: list[str]) -> str:
        """Returns ``text``, the document, with ``lines`` between the markers.

        Raises:
            UsageError: it does not have the markers exactly once.
        """
        begin, end = (f"<!-- {self.name}: {side} -->\n" for side in ("begin", "end"))
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed or begin in rest or end in before + after:
            raise UsageError(f"{self.document}: expected {begin!r} and then {end!r}, once each")
        return "".join((before, begin, *(f"{line}\n" for line in lines), end, after))


def published(checkout: Path) -> dict[Path, str]:
    """Returns the text of every document with its tables made anew, by path.

    Raises:
        UsageError: a document or a report cannot be read, or a marker is missing.
    """
    texts: dict[Path, str] = {}
    for table in TABLES:
        path = checkout / table.document
        try:
            text = texts.get(path) or path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        texts[path] = table.placed(text, table.lines(checkout))
    return texts


def compiled_steps(report: pd.DataFrame) -> list[str]:
    """Training steps of fuse_select under torch.compile: p50, p20 to p80, plain and ours."""
    lines = ["| layout, image size | plain modules | this package | ratio |", "|---|---|---|---|"]
    rows = report[(report.workload == "sk_fuse_select") & (report.status == "ok")]
    for (layout, resolution), pair in rows.groupby(["layout", "resolution"]):
        times = pair.set_index("provider")
        if not set(_COMPILED) <= set(times.index):
            continue
        cells = [
            f"{row.ms_p50:.2f} ms ({row.ms_p20:.2f} to {row.ms_p80:.2f})"
            for row in (times.loc[provider] for provider in _COMPILED)
        ]
        plain, ours = (float(times.ms_p50[provider]) for provider in _COMPILED)
        lines.append(f"| {layout}, {resolution} | {' | '.join(cells)} | {plain / ours:.2f} |")
    return lines


def traffic_of_providers(report: pd.DataFrame) -> list[str]:
    """Passes in training and inference and branch tensors saved, a column for each provider."""
    return _by_provider(
        report,
        "passes in training / inference, saved",
        lambda row: f"{row.training:.1f} / {row.inference:.1f}, {row.saved:.2f}",
    )


def launches_of_providers(report: pd.DataFrame) -> list[str]:
    """Launches in training and inference, a column for each provider."""
    return _by_provider(
        report,
        "launches in training / inference",
        lambda row: f"{row.launches_training} / {row.launches_inference}",
    )


def host_times(report: pd.DataFrame) -> list[str]:
    """The host's time of a call, ours over the plain modules', p20 to p80 beside the median."""
    lines = ["| M | inference | training |", "|---|---|---|"]
    cells = {
        (row.M, row.mode): f"{row.ratio:.2f} ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})"
        for row in report.itertuples()
    }
    for M in dict.fromkeys(report.M):
        lines.append(f"| {M} | {cells[M, 'infer']} | {cells[M, 'train']} |")
    return lines


def _by_provider(report: pd.DataFrame, title: str, cell: Callable[[Any], str]) -> list[str]:
    header = (title, *_TRAFFIC_PROVIDERS)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for (M, layout), rows in report.groupby(["M", "layout"], sort=False):
        by_provider = {row.provider: row for row in rows.itertuples()}
        cells = [cell(by_provider[provider]) for provider in _TRAFFIC_PROVIDERS]
        lines.append(f"| M = {M}, {layout} | {' | '.join(cells)} |")
    return lines


def families(report: pd.DataFrame) -> list[str]:
    """Times before over times after, and what is kept beyond the inputs, family by family."""
    lines = [
        "| family | layout | inference | training | inference, compiled | training, compiled "
        "| MiB kept, eager |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    by_row = report.set_index(["workload", "layout", "mode", "provider"]).sort_index()
    for name in [name for name in LEVEL_OF if name in set(report.workload)]:
        for layout in LAYOUTS:
            cells = [
                _ratio(by_row.ms_p50, name, layout, mode, pair)
                for pair in (_EAGER, _COMPILED)
                for mode in ("infer", "train")
            ]
            kept = by_row.saved_own_mb[name, layout, "train"]
            cells.append(" → ".join(f"{kept[provider]:.1f}" for provider in _EAGER))
            lines.append(f"| `{name}` | {layout} | {' | '.join(cells)} |")
    return lines


def _ratio(
    times: "pd.Series[float]", name: str, layout: str, mode: str, pair: tuple[str, str]
) -> str:
    keys = [(name, layout, mode, provider) for provider in pair]
    if not all(key in times.dropna().index for key in keys):
        return ""
    before, after = (float(times[key]) for key in keys)
    return f"{before / after:.2f}"


TABLES = (
    Table(
        "README.md",
        "table",
        "perf-op-train-compiled-cpu-torch2.13.0.csv",
        schema.SCHEMA,
        compiled_steps,
    ),
    Table(
        "kernels/README.md",
        "traffic",
        "traffic-cpu-torch2.13.0.csv",
        schema.TRAFFIC,
        traffic_of_providers,
    ),
    Table(
        "kernels/README.md",
        "launches",
        "traffic-cpu-torch2.13.0.csv",
        schema.TRAFFIC,
        launches_of_providers,
    ),
    Table("kernels/README.md", "host", "host-cpu-torch2.13.0.csv", schema.HOST, host_times),
    Table(
        "perf/reports/README.md",
        "families",
        "perf-family-cpu-torch2.13.0.csv",
        schema.SCHEMA,
        families,
    ),
)
