"""Figures of a report and of a traffic report, from the CSV alone.

A provider looks the same in every figure (`perf.report.looks`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator

from perf.report import tables
from perf.report.growth import growths
from perf.report.looks import SMALL, look
from perf.sweep.providers import BASELINE
from perf.sweep.workloads import DTYPE_OF

_LEGEND_COLUMNS = 5


def figures(frame: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Yields every figure that the measured rows allow, by name."""
    measured = with_derived(frame[frame.status == "ok"])
    for name, view in DOT_PLOTS.items():
        rows = measured[measured[view.column].notna()]
        if not rows.empty:
            yield name, dots(rows, view)
    yield from growths(measured)


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
    panel.set_yticks(heights, labels=[label for label, _ in cases], fontsize=SMALL)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    panel.xaxis.set_minor_formatter("{x:g}")
    panel.tick_params(axis="x", which="both", labelsize=SMALL)
    panel.set_xlabel(view.label)
    panel.grid(visible=True, color="0.9")
    figure.legend(loc="outside upper left", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=SMALL)
    return figure


def _itemsize(frame: pd.DataFrame) -> "pd.Series[int]":
    return frame["dtype"].map({name: dtype.itemsize for name, dtype in DTYPE_OF.items()})


# A traffic report.

# What the mathematics needs: passes in both modes, and the branches kept for the backward pass.
_MEASURES: dict[str, tuple[str, Callable[[int], int]]] = {
    "training": ("passes in training", lambda M: 6 * M + 3),
    "inference": ("passes in inference", lambda M: 2 * M + 1),
    "saved": ("branch tensors saved", lambda M: M),
}
_GROUP = ["M", "layout", "dtype"]
_WIDTH = 0.8
_OUTLINE = withStroke(linewidth=3, foreground="white")


def traffic_figure(table: pd.DataFrame) -> Figure:
    """Draws a panel for each measure, with a group of bars for each M and layout."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(_MEASURES), squeeze=False)[0]
    for panel, column in zip(panels, _MEASURES, strict=True):
        _draw(panel, table, column)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=SMALL
    )
    return figure


def _draw(panel: Axes, table: pd.DataFrame, column: str) -> None:
    label, needed = _MEASURES[column]
    providers = table.provider.unique()
    width = _WIDTH / len(providers)
    groups = list(table.groupby(_GROUP, sort=False))
    for i, provider in enumerate(providers):
        style = look(provider)
        values = [rows.loc[rows.provider == provider, column].sum() for _, rows in groups]
        places = [x - _WIDTH / 2 + (i + 0.5) * width for x in range(len(groups))]
        bars = panel.bar(
            places,
            values,
            width,
            color=style.colour,
            hatch=style.hatch,
            edgecolor="white",
            label=provider,
        )
        panel.bar_label(bars, fmt="{:.0f}", fontsize=SMALL - 2, padding=2)
    for x, (_, rows) in enumerate(groups):
        panel.hlines(
            needed(int(rows.M.iloc[0])),
            x - 0.48,
            x + 0.48,
            color="black",
            linewidth=1.5,
            linestyle="--",
            path_effects=[_OUTLINE],
            label="the mathematics" if x == 0 else "",
        )
    names = [f"M={M}\n{layout}\n{dtype}" for (M, layout, dtype), _ in groups]
    panel.set_xticks(range(len(groups)), labels=names, fontsize=SMALL - 1)
    panel.tick_params(axis="y", labelsize=SMALL)
    panel.set_title(label, fontsize=SMALL + 1)
    panel.set_ylim(bottom=0)
    panel.grid(visible=True, axis="y", color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
