"""How time grows with batch and image size: a figure for each workload, from the CSV alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from perf.report.looks import SMALL, explained, look
from perf.rows.schema import CASE_COLUMNS

_FIXED = [name for name in CASE_COLUMNS if name not in ("B", "resolution", "H", "W")]
_COPY = "bytes that must move\n(at the speed of a large copy;\nless only within a cache)"
_MEANING = {
    "sk_fuse": "the average over space of the sum of the branches",
    "sk_select": "the weighted sum of the branches",
    "sk_fuse_select": "everything between the convolutions and the output",
}
_MODES = {
    "infer": "time of a forward pass",
    "train": "time of a forward and a backward pass",
    "bwd": "time of a backward pass",
}


@dataclass(frozen=True)
class Sweep:
    """One panel: the axis, its name, and rows that differ in it alone."""

    axis: str
    label: str
    rows: pd.DataFrame


def growths(measured: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Yields a figure for every set of cases that differ in batch and image size alone."""
    sets = [rows for _, rows in measured.groupby(_FIXED, sort=True)]
    for rows in sets:
        sweeps = [
            *_sweeps(rows, "B", "resolution", "batch size, images of {0} x {0} px"),
            *_sweeps(rows, "resolution", "B", "side of an image in px, batch size {0}"),
        ]
        if sweeps:
            yield f"growth-{_short_name(rows, sets)}", growth(rows, sweeps)


def growth(rows: pd.DataFrame, sweeps: list[Sweep]) -> Figure:
    """Draws time over batch and over image size, above what a copy of the bytes would take."""
    figure = Figure(figsize=(3.8 * len(sweeps) + 2.4, 4.4), layout="constrained")
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    slowest_first = rows.groupby("provider").ms_p50.median().sort_values(ascending=False).index
    for panel, sweep in zip(panels, sweeps, strict=True):
        for provider in slowest_first:
            _draw_provider(panel, provider, sweep)
        _draw_copy(panel, sweep)
        _scale(panel, sweep)
    panels[0].set_ylabel("milliseconds (band: p20 to p80); lower is faster", fontsize=SMALL + 1)
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    order = [label for label in (*slowest_first, _COPY) if label in handles]
    figure.legend(
        [handles[label] for label in order],
        [label if label == _COPY else explained(label) for label in order],
        loc="outside right center",
        frameon=False,
        fontsize=SMALL + 1,
        handlelength=3,
        labelspacing=1,
    )
    figure.suptitle(_title(rows.iloc[0]), fontsize=SMALL + 2, x=0.01, ha="left")
    return figure


def _sweeps(rows: pd.DataFrame, axis: str, other: str, label: str) -> list[Sweep]:
    """Returns the longest sweep over ``axis``: of equally long ones that of the largest ``other``.

    There is none where the axis has one value.
    """
    lengths = rows.groupby(other)[axis].nunique()
    if lengths.max() < 2:
        return []
    fixed = lengths[lengths == lengths.max()].index.max()
    return [Sweep(axis, label.format(fixed), rows[rows[other] == fixed])]


def _draw_provider(panel: Axes, provider: str, sweep: Sweep) -> None:
    points = sweep.rows[sweep.rows.provider == provider].sort_values(sweep.axis)
    if points.empty:
        return
    style = look(provider)
    panel.plot(
        points[sweep.axis],
        points.ms_p50,
        style.line,
        color=style.colour,
        marker=style.marker,
        markersize=5,
        label=provider,
    )
    panel.fill_between(
        points[sweep.axis], points.ms_p20, points.ms_p80, color=style.colour, alpha=0.15, lw=0
    )


def _draw_copy(panel: Axes, sweep: Sweep) -> None:
    counted = sweep.rows[sweep.rows.bytes_needed.notna() & (sweep.rows.bytes_needed > 0)]
    if counted.empty:
        return
    ms = counted.bytes_needed.astype(float) / counted.copy_gbps / 1e6
    least = ms.groupby(counted[sweep.axis]).median()
    panel.plot(least.index, least, color="0.8", linewidth=6, zorder=1.5, label=_COPY)


def _scale(panel: Axes, sweep: Sweep) -> None:
    ticks = sorted(sweep.rows[sweep.axis].unique())
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel(sweep.label, fontsize=SMALL + 1)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=SMALL + 1)
    panel.set_axisbelow(True)
    panel.grid(visible=True, color="0.9")
    panel.spines[["top", "right"]].set_visible(False)


def _title(row: "pd.Series[Any]") -> str:
    meaning = f", {_MEANING[row.workload]}" if row.workload in _MEANING else ""
    stage = f", stage {row.stage}" if row.stage else ""
    threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
    return (
        f"{row.workload}{meaning}: {_MODES[row['mode']]}\n"
        f"{row['dtype']}, {row.layout}, M = {row.M}{stage}, "
        f"on {row.gpu or f'{threads} of {row.cpu}'}, torch {row.torch}"
    )


def _short_name(rows: pd.DataFrame, sets: list[pd.DataFrame]) -> str:
    """Returns workload, mode and whatever else tells ``rows`` from the other sets."""
    firsts = pd.DataFrame([other.iloc[0] for other in sets])
    names = ["workload", "mode", *(c for c in _FIXED[3:] if firsts[c].nunique() > 1)]
    return "-".join(str(rows.iloc[0][name]) for name in names)
