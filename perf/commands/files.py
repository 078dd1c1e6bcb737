"""Reports as arguments."""

from pathlib import Path

import pandas as pd

from perf import schema
from perf.errors import UsageError


def read_report(path: Path) -> pd.DataFrame:
    """Reads a report that the user named.

    Raises:
        UsageError: it does not exist or has other columns.
    """
    try:
        return schema.read(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except schema.SchemaError as error:
        raise UsageError(str(error)) from error
