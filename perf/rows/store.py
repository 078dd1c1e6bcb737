"""The report on disk: one run at a time appends whole rows, and no row is lost or torn."""

import fcntl
import os
import signal
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from perf.rows import StopError, UsageError
from perf.rows.schema import SCHEMA
from perf.rows.typed_csv import Key, Schema, Values


class Store:
    """A CSV that one run appends to and nobody else, for as long as it is open.

    An append is on disk when it returns, or undone where it fails. A process that is killed in
    between leaves at most one torn line at the end, which `open_store` cuts off.
    """

    def __init__(self, path: Path, file: FileIO, columns: Schema) -> None:
        self.path = path
        self.columns = columns
        self.keys: set[Key] = set()
        self._file = file
        self._size = 0
        self._new = False

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if failure and self._new and not self.keys and self._is_untouched():
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Lets other runs open the file."""
        self._file.close()

    def append(self, rows: Iterable[Values]) -> None:
        """Appends rows; where they cannot be written, StopError, and the file is as before."""
        self.append_lines({self.columns.key_of(row): self.columns.line(row) for row in rows})

    def append_lines(self, lines: dict[Key, str]) -> None:
        """Appends lines of the file, by key, as `append` does."""
        self._write("".join(lines.values()), lines)

    def load(self) -> dict[Key, str]:
        """Returns the lines of the file by key, and cuts a torn one off."""
        self._file.seek(0)
        data = self._file.readall()
        whole = data[: data.rfind(b"\n") + 1]
        rows = self.columns.rows(whole, self.path, exact=True) if whole else {}
        self._size = len(whole)
        if len(data) > len(whole):
            os.ftruncate(self._file.fileno(), self._size)
        self._new = not whole
        if self._new:
            self._write(self.columns.header())
        self.keys |= rows.keys()
        return {key: line for key, (line, _) in rows.items()}

    def _write(self, text: str, keys: Iterable[Key] = ()) -> None:
        descriptor, data = self._file.fileno(), text.encode()
        with _undisturbed():
            try:
                if not self._is_untouched():
                    problem = "removed or changed by somebody else during the run"
                    raise StopError(f"{self.path}: {problem}")
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, data[written:], self._size + written)
                os.fsync(descriptor)
            except OSError as error:
                # Where this fails as well, the next `open_store` cuts the torn line off.
                with suppress(OSError):
                    os.ftruncate(descriptor, self._size)
                raise StopError(
                    f"{self.path}: {error.strerror}; what was written before is whole"
                ) from error
            self._size += len(data)
            self.keys.update(keys)

    def _is_untouched(self) -> bool:
        here = os.fstat(self._file.fileno())
        with suppress(FileNotFoundError):
            return os.path.samestat(here, self.path.stat()) and here.st_size == self._size
        return False


def open_store(path: Path, *, resume: bool, columns: Schema = SCHEMA) -> Store:
    """Opens a new report, or with ``resume`` one that may exist, for this run alone.

    ``columns`` are those of the file: a report's, or those of another kind of file.

    Raises:
        UsageError: it exists and is not to be resumed, another run has it open, it cannot be
            written, or (a SchemaError) it is damaged before its last line or has other columns.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file in it")
        # Not waited for, should it be a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | (0 if resume else os.O_EXCL)
        file = FileIO(path, "r+", opener=lambda name, _: os.open(name, flags, 0o666))
    except FileExistsError as error:
        raise UsageError(
            f"{path} exists; go on with it by --resume, or choose another --out"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    store = Store(path, file, columns)
    try:
        lock(path, file.fileno())
        store.load()
    except BaseException as error:
        store.__exit__(error)
        if isinstance(error, StopError):  # no room for the header
            raise UsageError(str(error)) from error
        raise
    return store


def collect(store: Store, parts: Iterable[Path]) -> None:
    """Moves the whole rows of ``parts`` to the end of the report; of equal keys the first stays.

    A kill in between, or a StopError where the rows cannot be written, leaves the parts, and doing
    it again changes nothing. A part that is open in another run or damaged is a UsageError.
    """
    for path in parts:
        with open_store(path, resume=True) as part:
            new = {key: line for key, line in part.load().items() if key not in store.keys}
            store.append_lines(new)
            path.unlink()


def lock(path: Path, descriptor: int) -> None:
    """Keeps other runs from the regular file at ``path``, open as ``descriptor``, or UsageError.

    The lock is the open file's: it ends with the processes that have it open, however they end.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UsageError(f"{path} is no regular file")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        taken = True
    except OSError as error:
        raise UsageError(f"{path} cannot be locked: {error.strerror}") from error
    if taken:
        raise UsageError(f"{path}: another run is writing it; choose another --out, or wait")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds ^C and the end of the budget back, so that a write is either done or undone.

    No mask does: it holds them back from one thread, and Python takes them from any.
    """
    if threading.current_thread() is not threading.main_thread():  # Python disturbs no other
        yield
        return
    came: list[int] = []

    held = (signal.SIGINT, signal.SIGALRM)
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in held}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for number in came:
            signal.raise_signal(number)
