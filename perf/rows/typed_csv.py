"""CSV files whose columns are the fields of dataclasses: written and read cell by cell.

What is written can be read back. What is read is checked, and refused by file and line.
"""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pandas as pd

from perf.rows import UsageError, printable

Values = dict[str, Any]
Key = tuple[str, ...]

_SIGNIFICANT_DIGITS = 6
_MOST_CHARACTERS = 1000
_DTYPES = {int: "Int64", float: "float64", bool: "boolean", str: "str"}
_LARGEST = 2**63 - 1
_INT = re.compile(r"-?[0-9]{1,19}")
_FLOAT = re.compile(r"-?([0-9]+\.?[0-9]*(e[-+]?[0-9]+)?|nan|inf)")


class SchemaError(UsageError):
    """A file that is damaged, or no file of its kind."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}:{line}: {problem}")


@dataclass(frozen=True)
class Column:
    """How the cells of one column are written and read."""

    name: str
    kind: type  # int, float, bool or str
    choices: tuple[str, ...] = ()  # the only texts, where there are any
    optional: bool = False  # whether a cell may be empty, which means none
    younger: bool = False  # whether files without it are read, as if its cells were empty

    @property
    def dtype(self) -> Any:
        """The dtype of the column in a frame."""
        return "bool" if self.kind is bool and not self.optional else _DTYPES[self.kind]

    def parse(self, text: str) -> Any:
        """Returns the value of a cell; ValueError where the column has no such value."""
        if not text and self.optional:
            return None
        if self.choices:
            expected, right = f"one of {', '.join(self.choices)}", text in self.choices
        elif self.kind is int:
            expected = "a whole number of 64 bits"
            right = bool(_INT.fullmatch(text)) and abs(int(text)) <= _LARGEST
        elif self.kind is float:
            expected, right = "a number", bool(_FLOAT.fullmatch(text))
        elif self.kind is bool:
            expected, right = "True or False", text in ("True", "False")
        else:
            return text
        if not right:
            raise ValueError(f"{self.name}: expected {expected}, got {text!r}")
        return text == "True" if self.kind is bool else self.kind(text)

    def format(self, value: object) -> str:
        """Returns ``value`` as a cell; ValueError where it could not be read back."""
        if value is None:
            text = ""
        elif isinstance(value, float):
            text = f"{value:.{_SIGNIFICANT_DIGITS}g}"
        else:
            text = printable(str(value))[:_MOST_CHARACTERS]
        self.parse(text)
        return text


def columns_of(part: type) -> tuple[Column, ...]:
    """Returns the columns of a dataclass: an optional field with a default may be missing."""
    columns = []
    for name, hint in get_type_hints(part).items():
        kinds = get_args(hint) or (hint,)
        if isinstance(kinds[0], str):
            columns.append(Column(name, str, choices=kinds))
        else:
            optional = NoneType in kinds
            younger = optional and hasattr(part, name)
            columns.append(Column(name, kinds[0], optional=optional, younger=younger))
    return tuple(columns)


def values_of(*parts: Any, **named: Any) -> Values:
    """Returns the values of a row by column: the fields of dataclasses, and others by name."""
    for part in parts:
        named |= asdict(part)
    return named


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

    def line(self, values: Values) -> str:
        """Returns one line of a file; ValueError where a value could not be read back."""
        return _line([column.format(values.get(column.name)) for column in self.columns])

    def key_of(self, values: Values) -> Key:
        """Returns what tells a row apart: its values in the columns of the key, as text."""
        return tuple(str(values.get(name)) for name in self.key)

    def read(self, path: Path) -> pd.DataFrame:
        """Reads a file as a frame with the dtypes of the dataclasses; row i is line i + 2.

        Raises:
            UsageError: it cannot be read, is damaged, cut off or of another kind.
        """
        rows = [row for _, row in self.rows(contents(path), path).values()]
        return pd.DataFrame(
            {
                column.name: pd.Series([row.get(column.name) for row in rows], dtype=column.dtype)
                for column in self.columns
            }
        )

    def rows(
        self, data: bytes, path: Path, *, exact: bool = False
    ) -> dict[Key, tuple[str, Values]]:
        """Returns the lines of ``path``, whose bytes are ``data``, and their values by key.

        With ``exact`` its columns are to be those of this version, so that it can be gone on with.

        Raises:
            SchemaError: a line is damaged, cut off or has a key twice, or the columns are others.
        """
        *lines, torn = _decoded(data, path).split("\n")
        if not lines:
            raise SchemaError(path, 1, "the line is cut off" if torn else "the file is empty")
        columns = self._columns(lines[0], path)
        if exact and f"{lines[0]}\n" != self.header():
            problem = "not exactly the columns of this version; choose another --out"
            raise SchemaError(path, 1, problem)
        if torn:
            raise SchemaError(path, len(lines) + 1, "the line is cut off")
        found: dict[Key, tuple[str, Values]] = {}
        for number, line in enumerate(lines[1:], start=2):
            try:
                cells = _cells(line)
                if len(cells) != len(columns):
                    raise ValueError(f"expected {len(columns)} fields, got {len(cells)}")
                pairs = zip(columns, cells, strict=True)
                row = {column.name: column.parse(cell) for column, cell in pairs}
                key = self.key_of(row)
                if key in found:
                    raise ValueError(f"the same key as in line {list(found).index(key) + 2}")
            except (ValueError, csv.Error) as error:
                raise SchemaError(path, number, str(error)) from error
            found[key] = f"{line}\n", row
        return found

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
        differences = {"missing": missing, "unknown": unknown}
        said = [f"{what}: {', '.join(names)}" for what, names in differences.items() if names]
        problem = "; ".join(said) or "reordered"
        raise SchemaError(path, 1, f"not the columns of this version; {problem}")


def contents(path: Path) -> bytes:
    """Returns the bytes of a file that the user named; UsageError where it cannot be read."""
    try:
        if path.is_char_device():  # some have no end
            raise UsageError(f"{path}: a device, no file")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SchemaError(path, line, f"not UTF-8: {error.reason}") from error


def _cells(line: str) -> list[str]:
    return next(csv.reader([line], strict=True), [])


def _line(values: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
