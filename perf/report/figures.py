"""Figures of a report and of a traffic report, from the CSV alone.

A provider looks the same in all of them: colour for whose code, the rest for how it is called. The
colours are Okabe and Ito's, which differ under every common colour blindness; ours are blue and
green. Lines, markers and hatches differ in print.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

from perf.report import tables
from perf.rows.schema import CASE_COLUMNS
from perf.sweep.providers import BASELINE, PROVIDERS, Wrap
from perf.sweep.workloads import DTYPE_OF

SMALL = 8
_LEGEND_COLUMNS = 5


@dataclass(frozen=True)
class Look:
    """Colour, marker of a point, style of a line and hatch of a bar."""

    colour: str
    marker: str
    line: str
    hatch: str


# By whose code it is: the colour, and what it is.
_CODES = {
    "plain": ("#D55E00", "PyTorch as in tutorials"),
    "port": ("#E69F00", "PyTorch as in common ports"),
    "ours-pytorch": ("#0072B2", "this package, no Triton"),
    "ours-triton": ("#009E73", "this package, Triton kernels"),
    "timm-sk": ("#CC79A7", "timm's selective kernels"),
    "timm-se": ("#8C8C8C", "timm's squeeze and excitation"),
}
# By how it is called: marker, line, hatch, and what that is.
_WRAPS: dict[Wrap, tuple[str, str, str, str]] = {
    "eager": ("o", "-", "", ""),
    "compile": ("s", "--", "///", ", torch.compile"),
    "reduce-overhead": ("P", "-.", "++", ", reduce-overhead"),
    "max-autotune": ("D", "-.", "xxx", ", max-autotune"),
    "max-autotune-no-cudagraphs": ("v", ":", "...", ", max-autotune, no graphs"),
    "cudagraph": ("^", ":", "|||", ", CUDA graph"),
}


def explained(provider: str) -> str:
    """Returns the name of a provider, and below it whose code runs and how."""
    chosen = PROVIDERS[provider]
    return f"{provider}\n({_CODES[chosen.code][1]}{_WRAPS[chosen.wrap][3]})"


def look(provider: str) -> Look:
    """Returns the look of a provider."""
    chosen = PROVIDERS[provider]
    return Look(_CODES[chosen.code][0], *_WRAPS[chosen.wrap][:3])


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


# How time grows with batch and image size: a figure for each workload.

_FIXED = [name for name in CASE_COLUMNS if name not in ("B", "resolution", "H", "W")]
_COPY = "bytes that must move\n(at the speed of a large copy; caches are faster)"
_MEANING = {
    "sk_fuse": "the average over space of the sum of the branches",
    "sk_select": "the weighted sum of the branches",
    "sk_fuse_select": "everything between the convolutions and the output",
}
_MODES = {
    "infer": "time of inference",
    "train": "time of a training step, forward and backward",
    "bwd": "time of the backward pass",
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
    figure = Figure(figsize=(4.2 * max(len(sweeps), 2), 6), layout="constrained")
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    slowest_first = rows.groupby("provider").ms_p50.median().sort_values(ascending=False).index
    for panel, sweep in zip(panels, sweeps, strict=True):
        for provider in slowest_first:
            _draw_provider(panel, provider, sweep)
        _draw_copy(panel, sweep, rows.copy_gbps.max())
        _scale(panel, sweep)
    panels[0].set_ylabel("ms, lower is faster (band: p20 to p80)")
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    order = [label for label in (*slowest_first, _COPY) if label in handles]
    figure.legend(
        [handles[label] for label in order],
        [label if label == _COPY else explained(label) for label in order],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        handlelength=3,
        labelspacing=0.8,
    )
    figure.suptitle(_title(rows.iloc[0]), fontsize=SMALL + 3, x=0.01, ha="left")
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


def _draw_copy(panel: Axes, sweep: Sweep, gbps: float) -> None:
    # One for all rows, which may be from several runs: the fastest copy was disturbed the least.
    counted = sweep.rows[sweep.rows.bytes_needed.notna() & (sweep.rows.bytes_needed > 0)]
    if counted.empty:
        return
    ms = counted.bytes_needed.astype(float) / gbps / 1e6
    least = ms.groupby(counted[sweep.axis]).median()
    panel.plot(least.index, least, color="0.8", linewidth=6, zorder=1.5, label=_COPY)


def _scale(panel: Axes, sweep: Sweep) -> None:
    ticks = sorted(sweep.rows[sweep.axis].unique())
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel(sweep.label)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    _open(panel, "both")


def _title(row: "pd.Series[Any]") -> str:
    meaning = f": {_MEANING[row.workload]}" if row.workload in _MEANING else ""
    channels = f" of {row.C} channels (stage {row.stage})" if row.stage else ""
    threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
    return (
        f"{row.workload}{meaning}\n"
        f"{_MODES[row['mode']]}, over batch and image size\n"
        f"M = {row.M} branches{channels}, {row['dtype']}, {row.layout}\n"
        f"on {row.gpu or f'{threads} of {row.cpu}'}, torch {row.torch}"
    )


def _short_name(rows: pd.DataFrame, sets: list[pd.DataFrame]) -> str:
    """Returns workload, mode and whatever else tells ``rows`` from the other sets."""
    firsts = pd.DataFrame([other.iloc[0] for other in sets])
    names = ["workload", "mode", *(c for c in _FIXED[3:] if firsts[c].nunique() > 1)]
    return "-".join(str(rows.iloc[0][name]) for name in names)


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
    _open(panel, "y")


def _open(panel: Axes, axis: Literal["both", "y"]) -> None:
    """Draws a grid below the data, and no frame above and beside it."""
    panel.grid(visible=True, axis=axis, color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
