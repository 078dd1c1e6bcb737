"""Values and files as arguments: numbers, ranges, times, devices; reports, tables and figures."""

import argparse
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import torch

from perf.rows import StopError, UsageError, env, schema
from perf.rows.schema import by_the_clock_that_counts
from perf.rows.typed_csv import SchemaError
from perf.sweep.providers import PROVIDERS
from perf.sweep.sweep import Rank

DEVICES = ("cuda", "cpu")
_LARGEST_SIZE = 1_000_000
_LONGEST_TIME = 1e7
_LONGEST_QUOTE = 40


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        # Python refuses to parse thousands of digits.
        if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not a whole number from {least} to {most:,}"
            )
        return int(text)

    return parse


seed = whole_number(0, 2**32 - 1)


def sizes(text: str) -> range:
    """Parses a positive number, or a range START:STOP:STEP that includes STOP."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{_short(text)} is neither a positive number nor a range")
    numbers = [whole_number(1, _LARGEST_SIZE)(part) for part in parts]
    start, stop, step = numbers if len(numbers) == 3 else (*numbers, *numbers, 1)
    if start > stop:
        raise argparse.ArgumentTypeError(f"the range {text!r} is empty")
    return range(start, stop + 1, step)


def duration(unit: str) -> Callable[[str], float]:
    """Returns a parser of positive numbers of a unit of time."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 < value <= _LONGEST_TIME:
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not a positive number of {unit} up to {_LONGEST_TIME:,.0f}"
            )
        return value

    return parse


def chosen_device(name: str | None, rank: Rank) -> torch.device:
    """Returns the device that ``--device`` names, this rank's one where there are several.

    Raises:
        UsageError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: there is no GPU")
    device = torch.device("cpu") if name == "cpu" else env.default_device(rank.local)
    if device.type == "cuda" and rank.local >= torch.cuda.device_count():
        raise UsageError(
            f"LOCAL_RANK: expected less than the number of GPUs, which is "
            f"{torch.cuda.device_count()}, got {rank.local}"
        )
    return device


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}...")


def add_table(parser: argparse.ArgumentParser) -> None:
    """Declares ``--out`` of a command that prints a table."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="write the table there as well"
    )


def needs_compiler(what: str) -> None:
    """Refuses ``TRITON_INTERPRET``, under which nothing is compiled.

    Raises:
        UsageError: it is set; ``what`` cannot be done.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise UsageError(f"TRITON_INTERPRET: {what} where it is 1; unset it")


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


def check_times(path: Path, report: pd.DataFrame) -> None:
    """Refuses a report with a row that is ok and has no time.

    Raises:
        SchemaError: it does, by line.
    """
    for name in ("ms_p50", "ms_p20", "ms_p80"):
        times = report[name]
        good = (report.status != "ok") | ((times > 0) & np.isfinite(times))
        check_rows(path, times, good, "a time, where status is ok")


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
