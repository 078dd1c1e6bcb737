"""Figures of a report, from its CSV alone.

A provider has the same colour and marker in every figure: the colours of Okabe and Ito, which
differ under every common colour blindness, and markers that differ in print.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from perf.report import tables
from perf.rows.schema import CASE_COLUMNS
from perf.sweep.providers import BASELINE, PROVIDERS
from perf.sweep.workloads import DTYPE_OF

_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8C8C8C")
_MARKERS = "osD^vP*X"
_PANELS_PER_ROW = 3
_LEGEND_COLUMNS = 5
_SMALL = 8
_LINE_LABELS = {"ms_p50": "ms (band: p20 to p80)", "speedup": f"times as fast as {BASELINE}"}
# The columns that change with an axis.
_FOLLOWING = {"B": ("B",), "resolution": ("resolution", "H", "W")}


@dataclass(frozen=True)
class Look:
    """How a provider is drawn."""

    colour: str
    marker: str


def look(provider: str) -> Look:
    """Returns the look of a provider; with more providers than colours the marks go on."""
    i = list(PROVIDERS).index(provider)
    return Look(_COLOURS[i % len(_COLOURS)], _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)])


def figures(frame: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Yields every figure that the measured rows allow, by name."""
    measured = with_derived(frame[frame.status == "ok"])
    for name, view in DOT_PLOTS.items():
        rows = measured[measured[view.column].notna()]
        if not rows.empty:
            yield name, dots(rows, view)
    for axis, unit in (("B", "batch"), ("resolution", "resolution")):
        for name, column in (("latency", "ms_p50"), ("speedup", "speedup")):
            groups = _swept(measured[measured[column].notna()], axis)
            if groups:
                yield f"{name}-over-{unit}", lines(groups, axis, unit, column)


def with_derived(measured: pd.DataFrame) -> pd.DataFrame:
    """Adds the speed-up over the baseline, and times and bytes in passes over one branch."""
    bytes_of_pass = measured.B * measured.C * measured.H * measured.W * _itemsize(measured)
    speedup = [tables.speedups(case) for _, case in tables.by_case(measured)]
    return measured.assign(
        speedup=pd.concat(speedup) if speedup else float("nan"),
        passes_needed=measured.bytes_needed / bytes_of_pass,
        passes_of_copy=measured.ms_p50 * measured.copy_gbps * 1e6 / bytes_of_pass,
    )


@dataclass(frozen=True)
class View:
    """What a dot plot shows: a column, its label, and what a dot is to be compared with."""

    column: str
    label: str
    line: float | None = None
    least: str | None = None


DOT_PLOTS = {
    "speedup": View("speedup", f"times as fast as {BASELINE}", line=1.0),
    "bandwidth": View("pct_copy", "bytes needed per second, in % of a large copy", line=100.0),
    "passes": View(
        "passes_of_copy",
        "time, in passes over one branch at the speed of a large copy",
        least="passes_needed",
    ),
}


def dots(measured: pd.DataFrame, view: View) -> Figure:
    """Draws one line of dots for each case, a dot for each provider."""
    cases = tables.by_case(measured)
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(cases)), layout="constrained")
    panel = figure.subplots()
    heights = range(len(cases))
    if view.line is not None:
        panel.axvline(view.line, color="0.5", linewidth=1, zorder=0)
    if view.least is not None:
        least = [rows[view.least].iloc[0] for _, rows in cases]
        panel.plot(least, heights, "|", color="0.3", markersize=14, label="the mathematics")
    for provider in measured.provider.unique():
        points = [
            (rows.loc[rows.provider == provider, view.column].iloc[0], height)
            for height, (_, rows) in zip(heights, cases, strict=True)
            if (rows.provider == provider).any()
        ]
        style = look(provider)
        panel.plot(*zip(*points, strict=True), style.marker, color=style.colour, label=provider)
    panel.set_yticks(heights, labels=[label for label, _ in cases], fontsize=_SMALL)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    panel.xaxis.set_minor_formatter("{x:g}")
    panel.tick_params(axis="x", which="both", labelsize=_SMALL)
    panel.set_xlabel(view.label)
    panel.grid(visible=True, color="0.9")
    figure.legend(loc="outside upper left", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=_SMALL)
    return figure


def lines(groups: list[pd.DataFrame], axis: str, unit: str, column: str) -> Figure:
    """Draws ``column`` over ``axis``, a panel for each set of cases that differ in it alone."""
    columns = min(_PANELS_PER_ROW, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, group in zip(panels, groups, strict=False):
        _draw_lines(panel, group, axis, column)
        panel.set_title(_title(group.iloc[0], axis), fontsize=_SMALL)
        panel.set_xlabel(unit, fontsize=_SMALL)
        panel.set_ylabel(_LINE_LABELS[column], fontsize=_SMALL)
    for panel in list(panels):
        panel.set_axis_off()
    handles = {
        label: handle
        for panel in figure.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=_LEGEND_COLUMNS,
        frameon=False,
        fontsize=_SMALL,
    )
    return figure


def _draw_lines(panel: Axes, group: pd.DataFrame, axis: str, column: str) -> None:
    for provider, points in group.sort_values(axis).groupby("provider", sort=False):
        style = look(str(provider))
        panel.plot(
            points[axis],
            points[column],
            color=style.colour,
            marker=style.marker,
            markersize=4,
            label=str(provider),
        )
        if column == "ms_p50":
            panel.fill_between(
                points[axis], points.ms_p20, points.ms_p80, color=style.colour, alpha=0.15
            )
    ticks = sorted(group[axis].unique())
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.tick_params(labelsize=_SMALL)
    panel.grid(visible=True, color="0.9")


def _swept(measured: pd.DataFrame, axis: str) -> list[pd.DataFrame]:
    """Returns the rows that differ in ``axis`` alone, where it has more than one value."""
    rest = [name for name in CASE_COLUMNS if name not in _FOLLOWING[axis]]
    groups = [rows for _, rows in measured.groupby(rest, sort=True)]
    return [rows for rows in groups if rows[axis].nunique() > 1]


def _title(row: "pd.Series[float]", axis: str) -> str:
    stage = f" stage {row.stage}" if row.stage else ""
    fixed = f"{row.resolution}px" if axis == "B" else f"B={row.B}"
    first = f"{row.workload}{stage} {row['mode']}"
    return f"{first}, {row['dtype']} {row.layout} M={row.M} {fixed}"


def _itemsize(frame: pd.DataFrame) -> "pd.Series[int]":
    return frame["dtype"].map({name: dtype.itemsize for name, dtype in DTYPE_OF.items()})
