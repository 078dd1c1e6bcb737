"""The tables of the documents, from the committed reports alone.

A table stands between the lines ``<!-- name: begin -->`` and ``<!-- name: end -->``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from perf.rows import UsageError, schema
from perf.rows.schema import LAYOUTS
from perf.rows.typed_csv import Schema
from perf.sweep.workloads import LEVEL_OF

REPORTS = "perf/reports"
# The header and then the cells of every row.
Rows = Iterator[tuple[str, ...]]

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
        markdown: makes the header and the cells of the rows.
        numbers: columns at the end that are set to the right.
    """

    document: str
    name: str
    report: str
    schema: Schema
    markdown: Callable[[pd.DataFrame], Rows]
    numbers: int = 0

    def lines(self, checkout: Path) -> list[str]:
        """Returns the lines of the table from the report in ``checkout``.

        Raises:
            UsageError: the report cannot be read, or a row is missing.
        """
        report = self.schema.read(checkout / REPORTS / self.report)
        try:
            header, *rows = self.markdown(report)
        except KeyError as error:
            raise UsageError(f"{REPORTS}/{self.report}: no row of {error}") from error
        rule = "|---" * (len(header) - self.numbers) + "|---:" * self.numbers + "|"
        first, *rest = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
        return [first, rule, *rest]

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


def compiled_steps(report: pd.DataFrame) -> Rows:
    """Training steps of fuse_select under torch.compile: p50, p20 to p80, plain and ours."""
    yield "layout, image size", "plain modules", "this package", "ratio"
    rows = report[(report.workload == "sk_fuse_select") & (report.status == "ok")]
    for (layout, resolution), pair in rows.groupby(["layout", "resolution"]):
        times = pair.set_index("provider")
        if set(_COMPILED) <= set(times.index):
            plain, ours = (times.loc[provider] for provider in _COMPILED)
            yield (
                f"{layout}, {resolution}",
                *(
                    f"{row.ms_p50:.2f} ms ({row.ms_p20:.2f} to {row.ms_p80:.2f})"
                    for row in (plain, ours)
                ),
                f"{plain.ms_p50 / ours.ms_p50:.2f}",
            )


def traffic_of_providers(report: pd.DataFrame) -> Rows:
    """Passes in training and inference and branch tensors saved, a column for each provider."""
    return _by_provider(
        report,
        "passes in training / inference, saved",
        lambda row: f"{row.training:.1f} / {row.inference:.1f}, {row.saved:.2f}",
    )


def launches_of_providers(report: pd.DataFrame) -> Rows:
    """Launches in training and inference, a column for each provider."""
    return _by_provider(
        report,
        "launches in training / inference",
        lambda row: f"{row.launches_training} / {row.launches_inference}",
    )


def host_times(report: pd.DataFrame) -> Rows:
    """The host's time of a call, ours over the plain modules', p20 to p80 beside the median."""
    yield "M", "inference", "training"
    cells = {
        (row.M, row.mode): f"{row.ratio:.2f} ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})"
        for row in report.itertuples()
    }
    for M in dict.fromkeys(report.M):
        yield str(M), cells[M, "infer"], cells[M, "train"]


def _by_provider(report: pd.DataFrame, title: str, cell: Callable[[Any], str]) -> Rows:
    yield title, *_TRAFFIC_PROVIDERS
    for (M, layout), rows in report.groupby(["M", "layout"], sort=False):
        by_provider = {row.provider: row for row in rows.itertuples()}
        yield f"M = {M}, {layout}", *(cell(by_provider[name]) for name in _TRAFFIC_PROVIDERS)


def families(report: pd.DataFrame) -> Rows:
    """Times before over times after, and what is kept beyond the inputs, family by family."""
    yield (
        *("family", "layout", "inference", "training"),
        *("inference, compiled", "training, compiled", "MiB kept, eager"),
    )
    by_row = report.set_index(["workload", "layout", "mode", "provider"]).sort_index()
    times = by_row.ms_p50.dropna()

    def ratio(name: str, layout: str, mode: str, pair: tuple[str, str]) -> str:
        keys = [(name, layout, mode, provider) for provider in pair]
        if not all(key in times.index for key in keys):
            return ""
        before, after = (float(times[key]) for key in keys)
        return f"{before / after:.2f}"

    for name in [name for name in LEVEL_OF if name in set(report.workload)]:
        for layout in LAYOUTS:
            kept = by_row.saved_own_mb[name, layout, "train"]
            yield (
                *(f"`{name}`", layout),
                *(
                    ratio(name, layout, mode, pair)
                    for pair in (_EAGER, _COMPILED)
                    for mode in ("infer", "train")
                ),
                " → ".join(f"{kept[provider]:.1f}" for provider in _EAGER),
            )


_STEPS, _FAMILIES, _TRAFFIC, _HOST = (
    f"{name}-cpu-torch2.13.0.csv"
    for name in ("perf-op-train-compiled", "perf-family", "traffic", "host")
)
_KERNELS = "kernels/README.md"
TABLES = (
    Table("README.md", "table", _STEPS, schema.SCHEMA, compiled_steps),
    Table(_KERNELS, "traffic", _TRAFFIC, schema.TRAFFIC, traffic_of_providers),
    Table(_KERNELS, "launches", _TRAFFIC, schema.TRAFFIC, launches_of_providers),
    Table(_KERNELS, "host", _HOST, schema.HOST, host_times),
    Table(f"{REPORTS}/README.md", "families", _FAMILIES, schema.SCHEMA, families, numbers=5),
)
