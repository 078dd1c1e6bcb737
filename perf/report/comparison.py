"""Two reports against each other, row by row."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from perf.rows.schema import KEY_COLUMNS

ENVIRONMENT_COLUMNS = ("gpu", "driver", "cuda", "cpu", "threads", "ranks", "torch", "triton")

# Repeats on a machine with steady other work moved medians by up to 1.3 times that range, over 144
# pairs of rows: the samples of one row see the same neighbours, those of a repeat others. Load that
# only one of the runs had moves them by more, and no row can tell.
NOISE = 2


@dataclass(frozen=True)
class Comparison:
    """Rows of both reports joined on the key, with ``ratio`` and ``verdict``, and the leftovers.

    A verdict is "slower" where the median grew by more than the limit and by more than the noise:
    `NOISE` times the wider p20 to p80 of both runs. "faster" is the mirror image, "lost" a row that
    was ok and no longer is.
    """

    rows: pd.DataFrame
    only_old: int
    only_new: int

    @property
    def regressed(self) -> bool:
        """Whether a row is slower or lost."""
        return bool(self.rows.verdict.isin(("slower", "lost")).any())


def compare(old: pd.DataFrame, new: pd.DataFrame, max_regression: float) -> Comparison:
    """Joins two reports; of rows that were not ok before only their number matters."""
    both = pd.merge(
        old, new, on=list(KEY_COLUMNS), how="outer", suffixes=("_old", "_new"), indicator=True
    )
    rows = both[(both["_merge"] == "both") & (both.status_old == "ok")].copy()
    limit = 1 + max_regression
    rows["ratio"] = rows.ms_p50_new / rows.ms_p50_old
    rows["verdict"] = "same"
    growth = rows.ms_p50_new - rows.ms_p50_old
    noise = NOISE * np.maximum(rows.ms_p80_old - rows.ms_p20_old, rows.ms_p80_new - rows.ms_p20_new)
    slower = (rows.ratio > limit) & (growth > noise)
    faster = (rows.ratio < 1 / limit) & (growth < -noise)
    rows.loc[slower, "verdict"] = "slower"
    rows.loc[faster, "verdict"] = "faster"
    rows.loc[rows.status_new != "ok", "verdict"] = "lost"
    return Comparison(
        rows=rows,
        only_old=int((both["_merge"] == "left_only").sum()),
        only_new=int((both["_merge"] == "right_only").sum()),
    )


def environment_changes(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Returns a line for each part of the environment that differs between the reports."""
    changes = []
    for column in ENVIRONMENT_COLUMNS:
        before, after = (sorted(map(str, frame[column].unique())) for frame in (old, new))
        if before != after:
            changes.append(f"{column}: {', '.join(before)} -> {', '.join(after)}")
    return changes
