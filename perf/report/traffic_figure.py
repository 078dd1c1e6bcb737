"""The figure of a traffic report: passes that each plan moves and saves, from the CSV alone."""

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from perf.report.looks import SMALL, look

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
