"""The table of recorded weights: its columns, means over classes, and its CSV."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from sknet_triton.analysis.means import Row

_WEIGHT = "weight_"


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Returns the rows as a table; `record_attention` describes its columns."""
    rows = list(rows)
    frame = pd.DataFrame(
        {
            "scale": [row.scale for row in rows],
            "path": [row.path for row in rows],
            "stage": [row.stage for row in rows],
            "index": [row.index for row in rows],
            "label": pd.array([row.label for row in rows], dtype="Int64"),
            "images": [row.images for row in rows],
            "difference": [row.difference for row in rows],
        }
    )
    weights = pd.DataFrame([dict(enumerate(row.weights)) for row in rows], dtype="float64")
    return pd.concat([frame, weights.add_prefix(_WEIGHT)], axis=1)


def with_change(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the column ``change`` beside ``difference``, which it compares with that at 1.0."""
    keys = ["path", "label"]
    base = table.loc[table.scale == 1.0, [*keys, "difference"]]
    joined = table[keys].merge(base, how="left", on=keys, validate="many_to_one")
    place = list(table.columns).index("difference")
    changed = table.copy()
    changed.insert(place + 1, "change", table.difference - joined.difference.to_numpy())
    return changed


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
    """Writes a table, whole or not at all: an earlier file is replaced at the end.

    The means keep every digit, so that `read_csv` returns the same table.
    """
    with replaced(Path(path)) as draft:
        table.to_csv(draft, index=False, lineterminator="\n")


def read_csv(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads what `write_csv` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it lacks a column that every such table has.
    """
    columns = pd.read_csv(path, nrows=0).columns
    # Python's own float is exact under every version of pandas.
    exact: dict[int | str, Callable[[str], float]] = {c: _number for c in columns if _is_mean(c)}
    # The path of a module may look like a number or a missing value, and is empty where the module
    # is the model itself.
    dtypes = {"path": "str", "label": "Int64"}
    table = pd.read_csv(
        path, dtype=dtypes, converters=exact, keep_default_na=False, na_values=[""]
    ).fillna({"path": ""})
    missing = {"path", "label", "images", "difference"} - set(table.columns)
    if missing:
        raise ValueError(f"path: expected a table of attention, got one without {sorted(missing)}")
    return table


def _is_mean(column: str) -> bool:
    return column in ("difference", "change") or column.startswith(_WEIGHT)


def _number(text: str) -> float:
    return float(text or "nan")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a draft to write to, which takes the place of ``path`` at the end, if it gets there."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
