"""The report on disk: rows are appended whole, and survive a kill at any moment."""

import os
from collections.abc import Iterable
from pathlib import Path

from perf.rows import schema
from perf.rows.schema import Key, Row


class Store:
    """A CSV that is only ever appended to.

    Every append is one write of whole lines that is on disk when it returns. A process that is
    killed in between leaves at most one torn line at the end, which `open_store` cuts off.
    """

    def __init__(self, path: Path, keys: set[Key]) -> None:
        self.path = path
        self.keys = keys

    def append(self, rows: Iterable[Row]) -> None:
        """Appends the rows of one case."""
        rows = list(rows)
        _append(self.path, "".join(schema.format_row(row) for row in rows))
        self.keys |= {schema.key_of(row.case, row.provider) for row in rows}


def open_store(path: Path, *, resume: bool) -> Store:
    """Opens a new report, or with ``resume`` one that may exist.

    Raises:
        FileExistsError: the report exists and is not to be resumed.
        SchemaError: it exists and has other columns.
    """
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists; go on with it by --resume, or choose another --out")
    text = schema.complete_lines(path) if path.exists() else ""
    if not text:
        _replace(path, schema.header())
        return Store(path, set())
    schema.check_header(text, path)
    os.truncate(path, len(text.encode()))
    return Store(path, schema.keys(text))


def merge(path: Path, parts: Iterable[Path]) -> None:
    """Moves the whole rows of ``parts`` to the end of the report; of equal keys the first stays.

    A kill in between leaves the parts, and doing it again changes nothing.

    Raises:
        SchemaError: a part has other columns.
    """
    parts = list(parts)
    if not parts:
        return
    seen: set[Key] = set()
    lines = [schema.header()]
    for source in (path, *parts):
        text = schema.complete_lines(source) if source.exists() else ""
        if not text:
            continue
        schema.check_header(text, source)
        for line in text.splitlines(keepends=True)[1:]:
            (key,) = schema.keys(schema.header() + line)
            if key not in seen:
                seen.add(key)
                lines.append(line)
    _replace(path, "".join(lines))
    for part in parts:
        part.unlink()


def _append(path: Path, text: str) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    """Writes ``path`` anew, so that it is seen either as it was or whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
