"""The table of recorded weights: means over classes, its CSV and the paper's figures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What the columns of branches' weights begin with.
WEIGHT = "weight_"
# Those of Okabe and Ito, which differ under every common colour blindness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_LABEL = "last branch - first branch"
_PANELS_PER_ROW = 3
_TICKS = 10
_SMALL = 8
_DPI = 150


def with_change(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the column ``change`` beside ``difference``, which it compares with that at 1.0."""
    keys = ["path", "label"]
    base = table.loc[table.scale == 1.0, [*keys, "difference"]]
    joined = table[keys].merge(base, how="left", on=keys, validate="many_to_one")
    change = table.difference - joined.difference.to_numpy()
    table.insert(1 + list(table.columns).index("difference"), "change", change)
    return table


def over_classes(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the means over all images: a table without ``label``.

    Columns of one's own, such as a seed, tell rows apart as ``path`` and ``scale`` do.

    Args:
        table: from `record_attention` or `record_sizes`.
    """
    values = [c for c in table.columns if _is_mean(c)]
    keys = [c for c in table.columns if c not in (*values, "label", "images")]
    # A weight that a unit does not have stays missing.
    sums = table[values].mul(table.images, axis=0).assign(images=table.images)
    groups = sums.groupby([table[key] for key in keys], sort=False, dropna=False)
    total = groups.sum(min_count=1)
    total[values] = total[values].div(total.images, axis=0)
    return total.reset_index()[[c for c in table.columns if c != "label"]]


def write_csv(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Writes a table whole or not at all, with every digit: `read_csv` returns the same."""
    with _replaced(Path(path)) as draft:
        table.to_csv(draft, index=False, lineterminator="\n")


def read_csv(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads what `write_csv` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it lacks a column that every such table has, or a mean is no number.
    """
    # The path of a module may look like a number or a missing value, and is empty where the module
    # is the model itself.
    dtypes = {"path": "str", "label": "Int64"}
    # By Python's float: pandas before 3.1 rounds the last digits.
    means = [c for c in pd.read_csv(path, nrows=0).columns if _is_mean(c)]
    numbers = dict.fromkeys(means, lambda text: float(text or "nan"))
    table = pd.read_csv(
        path, dtype=dtypes, converters=numbers, keep_default_na=False, na_values=[""]
    ).fillna({"path": ""})
    missing = {"path", "label", "images", "difference"} - set(table.columns)
    if missing:
        raise ValueError(f"path: expected a table of attention, got one without {sorted(missing)}")
    return table


def _is_mean(column: str) -> bool:
    return column in ("difference", "change") or column.startswith(WEIGHT)


def plot_units(table: pd.DataFrame) -> Figure:
    """Draws the mean difference of every unit, a line for each scale (Figure 3).

    Where rows differ in a column of one's own, such as a seed, the line is the mean over it and
    the band goes from the least to the greatest.

    Args:
        table: from `record_sizes`, or from `record_attention` for a single line.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the table has no row.
    """
    units = _units(table)
    figure = _new_figure(4 + 0.4 * len(units), 3.5)
    panel = figure.subplots()
    _draw(panel, _scaled(over_classes(table)), "path", list(units))
    panel.set_xticks(range(len(units)), labels=list(units.values()), fontsize=_SMALL)
    panel.set_xlabel("unit: stage.index", fontsize=_SMALL)
    _add_legend(figure, panel)
    return figure


def plot_classes(table: pd.DataFrame) -> Figure:
    """Draws the mean difference of every class, a panel for each unit (Figure 4).

    Rows that differ in a column of one's own are drawn as in `plot_units`.

    Args:
        table: from `record_sizes` or `record_attention`, with labels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the images had no labels, or the table has no row.
    """
    table = table[table.label.notna()]
    units, labels = _units(table), sorted(table.label.unique())
    across = min(_PANELS_PER_ROW, len(units))
    down = -(-len(units) // across)
    figure = _new_figure(4 * across, 2.5 * down + 0.6)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    step = -(-len(labels) // _TICKS)
    for panel, (path, name) in zip(panels, units.items(), strict=False):
        _draw(panel, _scaled(table[table.path == path]), "label", labels)
        panel.set_title(f"{name}  ({path})", fontsize=_SMALL)
        panel.set_xticks(range(0, len(labels), step), labels=[str(x) for x in labels[::step]])
        panel.set_xlabel("class", fontsize=_SMALL)
    for panel in panels[len(units) :]:
        panel.set_axis_off()
    _add_legend(figure, panels[0])
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure, whole or not at all, in the format that the ending of ``path`` names."""
    with _replaced(Path(path)) as draft:
        figure.savefig(draft, dpi=_DPI)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Gives a draft to write to, which takes the place of ``path`` at the end, if it gets there."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a figure needs matplotlib: pip install 'sknet-triton[analysis]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _units(table: pd.DataFrame) -> dict[str, str]:
    """Returns the paths of the units in the table's order, each with its short name."""
    if table.empty:
        raise ValueError("table: expected at least one row to draw (with a label for classes)")
    first = table.drop_duplicates("path")
    names = first.stage.astype(str) + "." + first["index"].astype(str)
    return dict(zip(first.path, names, strict=True))


def _scaled(table: pd.DataFrame) -> pd.DataFrame:
    return table if "scale" in table else table.assign(scale=1.0)


def _draw(panel: Axes, table: pd.DataFrame, axis: str, ticks: Sequence[Any]) -> None:
    """Draws the difference over ``axis``, whose values stand at ``ticks``, for each scale."""
    panel.axhline(0, color="0.5", linewidth=1)
    for i, (scale, rows) in enumerate(table.groupby("scale")):
        spread = rows.groupby(axis).difference.agg(["mean", "min", "max"]).reindex(list(ticks))
        at, colour = range(len(ticks)), _COLOURS[i % len(_COLOURS)]
        panel.plot(
            at,
            spread["mean"],
            color=colour,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4,
            label=f"{scale:g}x",
        )
        panel.fill_between(at, spread["min"], spread["max"], color=colour, alpha=0.15)
    panel.set_ylabel(_LABEL, fontsize=_SMALL)
    panel.tick_params(labelsize=_SMALL)
    panel.grid(visible=True, color="0.9")


def _add_legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        frameon=False,
        fontsize=_SMALL,
    )
