"""Files as arguments: reports that are read, and tables and figures that are written whole."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import pandas as pd
import torch

from perf.rows import env, schema
from perf.rows.clock import by_the_clock_that_counts
from perf.rows.errors import StopError, UsageError
from perf.rows.typed_csv import SchemaError
from perf.sweep.providers import PROVIDERS


def read_report(path: Path) -> pd.DataFrame:
    """Reads a report that the user named; its ms are by the clock that counts.

    Raises:
        UsageError: it cannot be read, is damaged, has other columns, or names a provider that
            there is not.
    """
    report = schema.read(path)
    check_providers(path, report)
    return by_the_clock_that_counts(report)


def check_providers(path: Path, report: pd.DataFrame) -> None:
    """Refuses a report that names a provider that there is not.

    Raises:
        SchemaError: it does, by line.
    """
    known = ", ".join(PROVIDERS)
    check_rows(path, report.provider, report.provider.isin(PROVIDERS), f"one of {known}")


def check_rows(path: Path, column: pd.Series, good: pd.Series, expected: str) -> None:
    """Refuses a report with a row that is not ``good``, by the line of the first one.

    Raises:
        SchemaError: there is one; ``expected`` says what its cell in ``column`` should be.
    """
    bad = column[~good]
    if not bad.empty:
        problem = f"{column.name}: expected {expected}, got {str(bad.iloc[0])!r}"
        raise SchemaError(path, int(bad.index[0]) + 2, problem)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A context whose file becomes ``path`` at its end, whole; where it fails, nothing changes.

    Raises:
        UsageError: the file cannot be written; the context is not entered.
        StopError: it was not written to the end, as on a full disk.
    """
    # A link stays one, to what is written.
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".draft-{os.getpid()}")
    try:
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            raise UsageError(f"--out: {path} is no regular file")
        file = draft.open("xb")
    except OSError as error:
        raise UsageError(f"--out: {path}: {error.strerror}") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StopError(f"{path}: {error.strerror}; it is as it was before") from error
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def table_file(path: Path | None) -> Iterator[Callable[[pd.DataFrame], None]]:
    """A context that yields what writes a table to ``path``, the environment beside every row.

    Nothing is written where there is no path.

    Raises:
        UsageError: the file cannot be written; the context is not entered.
        StopError: it was not written to the end.
    """
    if path is None:
        yield lambda table: None
        return

    def write(table: pd.DataFrame) -> None:
        where = asdict(env.snapshot(torch.device("cpu"), seed=0, ranks=1))
        file.write(table.assign(**where).to_csv(index=False).encode())

    with whole_file(path) as file:
        yield write
    print(f"\n{path}")
