"""CSV files whose columns are the fields of dataclasses: written and read cell by cell.

What is written can be read back. What is read is checked, and refused by file and line.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pandas as pd

from perf.rows import UsageError, printable

_SIGNIFICANT_DIGITS = 6
_MOST_CHARACTERS = 1000
_DTYPES = {int: "Int64", float: "float64", bool: "boolean", str: "str"}
_LARGEST = 2**63 - 1
_INT = re.compile(r"-?[0-9]+")
_FLOAT = re.compile(r"-?([0-9]+\.?[0-9]*(e[-+]?[0-9]+)?|nan|inf)")


class SchemaError(UsageError):
    """A file that is damaged, or no file of its kind."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}:{line}: {problem}")


@dataclass(frozen=True)
class Column:
    """How the cells of one column are written and read.

    Attributes:
        name: the field's.
        kind: int, float, bool or str.
        choices: the only texts, where there are any.
        optional: whether a cell may be empty, which means none.
        younger: whether files without the column are read, as if its cells were empty.
    """

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    optional: bool = False
    younger: bool = False

    @property
    def dtype(self) -> Any:
        """The dtype of the column in a frame."""
        return "bool" if self.kind is bool and not self.optional else _DTYPES[self.kind]

    def parse(self, text: str) -> Any:
        """Returns the value of a cell.

        Raises:
            ValueError: there is no such value in this column.
        """
        if not text and self.optional:
            return None
        if self.choices:
            if text not in self.choices:
                raise self._error(f"one of {', '.join(self.choices)}", text)
            return text
        if self.kind is int:
            if not _INT.fullmatch(text) or len(text) > 20 or abs(int(text)) > _LARGEST:
                raise self._error("a whole number of 64 bits", text)
            return int(text)
        if self.kind is float:
            if not _FLOAT.fullmatch(text):
                raise self._error("a number", text)
            return float(text)
        if self.kind is bool:
            if text not in ("True", "False"):
                raise self._error("True or False", text)
            return text == "True"
        return text

    def format(self, value: object) -> str:
        """Returns ``value`` as a cell.

        Raises:
            ValueError: it could not be read back.
        """
        if value is None:
            text = ""
        elif isinstance(value, float):
            text = f"{value:.{_SIGNIFICANT_DIGITS}g}"
        else:
            text = printable(str(value))[:_MOST_CHARACTERS]
        self.parse(text)
        return text

    def _error(self, expected: str, got: str) -> ValueError:
        return ValueError(f"{self.name}: expected {expected}, got {got!r}")


def columns_of(part: type) -> tuple[Column, ...]:
    """Returns the columns of a dataclass: an optional field with a default may be missing."""
    hints = get_type_hints(part)
    return tuple(
        _column(field.name, hints[field.name], has_default=field.default is not MISSING)
        for field in fields(part)
    )


def _column(name: str, hint: Any, *, has_default: bool) -> Column:
    arguments = get_args(hint)
    optional = NoneType in arguments
    kinds = [argument for argument in arguments if argument is not NoneType] or [hint]
    if isinstance(kinds[0], str):
        return Column(name, str, choices=tuple(kinds))
    return Column(name, kinds[0], optional=optional, younger=optional and has_default)


@dataclass(frozen=True)
class Schema:
    """The columns of a kind of file, and which of them tell its rows apart."""

    columns: tuple[Column, ...]
    key: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)

    def header(self) -> str:
        """Returns the first line of a file."""
        return _line(self.names)

    def line(self, values: Iterable[object]) -> str:
        """Returns one line of a file from a value for each column.

        Raises:
            ValueError: a value could not be read back.
        """
        pairs = zip(self.columns, values, strict=True)
        return _line([column.format(value) for column, value in pairs])

    def read(self, path: Path) -> pd.DataFrame:
        """Reads a file as a frame with the dtypes of the dataclasses; row i is line i + 2.

        Raises:
            SchemaError: the file is damaged, cut off or of another kind.
            UsageError: it cannot be read.
        """
        rows = self.rows(decode(contents(path), path), path)
        return pd.DataFrame(
            {
                column.name: pd.Series([row.get(column.name) for row in rows], dtype=column.dtype)
                for column in self.columns
            }
        )

    def rows(self, text: str, path: Path) -> list[dict[str, Any]]:
        """Returns the values of every line of the text of ``path`` after its header.

        Raises:
            SchemaError: a line is damaged or cut off, has the key of an earlier one, or the columns
                are others.
        """
        *lines, torn = text.split("\n")
        if not lines:
            raise SchemaError(path, 1, "the line is cut off" if text else "the file is empty")
        columns = self._columns(lines[0], path)
        if torn:
            raise SchemaError(path, len(lines) + 1, "the line is cut off")
        rows: list[dict[str, Any]] = []
        first: dict[tuple[Any, ...], int] = {}
        for number, line in enumerate(lines[1:], start=2):
            try:
                cells = _cells(line)
                if len(cells) != len(columns):
                    raise ValueError(f"expected {len(columns)} fields, got {len(cells)}")
                row = {
                    column.name: column.parse(cell)
                    for column, cell in zip(columns, cells, strict=True)
                }
                key = tuple(row[name] for name in self.key)
                if first.setdefault(key, number) != number:
                    raise ValueError(f"the same key as in line {first[key]}")
            except (ValueError, csv.Error) as error:
                raise SchemaError(path, number, str(error)) from error
            rows.append(row)
        return rows

    def lines_by_key(self, text: str, path: Path) -> dict[tuple[str, ...], str]:
        """Returns the lines of ``text``, a file that can be gone on with, by key.

        Raises:
            SchemaError: a line is damaged, or the columns are not exactly those of this version.
        """
        rows = self.rows(text, path)
        header, *lines = text.split("\n")[:-1]
        if f"{header}\n" != self.header():
            raise SchemaError(
                path, 1, "not exactly the columns of this version; choose another --out"
            )
        keys = (tuple(str(row[name]) for name in self.key) for row in rows)
        return dict(zip(keys, (f"{line}\n" for line in lines), strict=True))

    def _columns(self, header: str, path: Path) -> list[Column]:
        """Returns the columns that a file has; those that are younger than it may be missing."""
        try:
            found = _cells(header)
        except csv.Error as error:
            raise SchemaError(path, 1, str(error)) from error
        columns = [column for column in self.columns if column.name in found or not column.younger]
        if found == [column.name for column in columns]:
            return columns
        missing = [column.name for column in columns if column.name not in found]
        unknown = [name for name in found if name not in self.names]
        difference = [
            f"{what}: {', '.join(names)}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise SchemaError(
            path, 1, f"not the columns of this version; {'; '.join(difference) or 'reordered'}"
        )


def contents(path: Path) -> bytes:
    """Returns the bytes of a file that the user named.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        if path.is_char_device():  # some have no end
            raise UsageError(f"{path}: a device, no file")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def decode(data: bytes, path: Path) -> str:
    """Returns the text of ``data``, which is from ``path``.

    Raises:
        SchemaError: it is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SchemaError(path, line, f"not UTF-8: {error.reason}") from error


def _cells(line: str) -> list[str]:
    return next(csv.reader([line], strict=True), [])


def _line(values: Iterable[str] | Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
