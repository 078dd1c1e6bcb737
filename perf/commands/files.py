"""Reports as arguments."""

from pathlib import Path

import pandas as pd

from perf.rows import schema
from perf.rows.cases import DTYPES, LAYOUTS, LEVELS, MODES
from perf.rows.errors import UsageError
from perf.sweep.providers import PROVIDERS

_KNOWN = {
    "level": LEVELS,
    "mode": MODES,
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "provider": tuple(PROVIDERS),
}


def read_report(path: Path) -> pd.DataFrame:
    """Reads a report that the user named.

    Raises:
        UsageError: it does not exist, has other columns, or names what there is not.
    """
    try:
        report = schema.read(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except schema.SchemaError as error:
        raise UsageError(str(error)) from error
    for column, known in _KNOWN.items():
        unknown = report[column][~report[column].isin(known)]
        if not unknown.empty:
            raise UsageError(
                f"{path}: {column}: expected one of {', '.join(known)}, got {unknown.iloc[0]!r}"
            )
    return report
