"""The CSV: one row for each case and provider, its columns the fields of the dataclasses in it."""

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import pandas as pd

from perf.rows.cases import Case
from perf.rows.env import Environment

Status = Literal["ok", "unverified", "unsupported", "oom", "error"]


@dataclass(frozen=True)
class Result:
    """What came of one provider on one case; None where it does not apply.

    Attributes:
        status: ok; unverified where the result was wrong, which is then never timed; unsupported
            where the provider cannot carry the case out here, or cannot run the backward pass
            alone again; oom; error.
        reason: one line that says why the status is not ok.
        ms_p50: median time of one call, in milliseconds; on a GPU the GPU's own, with a cold L2.
        ms_p20: its 20 % quantile.
        ms_p80: its 80 % quantile.
        n: samples that the quantiles are over.
        images_per_s: images in a second at the median, for all but ops.
        compile_s: seconds of the first call, where it compiles, with cold caches.
        bytes_needed: bytes that the mathematics has to move, where no convolution moves more.
        gbps: those bytes over the median time; None where they are 0.
        copy_gbps: bandwidth of a large copy, measured in the same process.
        pct_copy: gbps as a percentage of it; over 100 where the tensors stay in a cache.
        gflops: 1e9 floating-point operations of one call, a multiply-add being two, the backward
            pass counted as two forward passes.
        tflops_per_s: those over the median time.
        launches: kernels, copies and fills of one call, on a GPU.
        peak_mb: most memory in MiB that one call allocates at a time, on a GPU; None in a graph,
            whose memory is kept between calls.
        saved_mb: MiB that the forward pass keeps for the backward pass.
        saved_own_mb: those without the inputs, which the caller may hold anyway.
        accuracy: share of held-out images named rightly, for the workload.
        out_err: largest error of the output over its largest value, against float64.
        out_err_bound: what it was allowed to be.
        grad_err: largest error of a gradient over its norm, against float64.
        grad_err_bound: what it was allowed to be.
        judged_batch: images that float64 was run on; a network's batch repeats them.
        call_ms_p50: median time from one call to the next on a GPU, by the clock, in milliseconds;
            where batches are small, this is what a user waits for (ms_p50 is then the GPU's share).
        call_ms_p20: its 20 % quantile.
        call_ms_p80: its 80 % quantile.
        cudnn: this and the rest are the `Switches`, as they were while it was timed.
    """

    status: Status
    reason: str = ""
    ms_p50: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    n: int | None = None
    images_per_s: float | None = None
    compile_s: float | None = None
    bytes_needed: int | None = None
    gbps: float | None = None
    copy_gbps: float | None = None
    pct_copy: float | None = None
    gflops: float | None = None
    tflops_per_s: float | None = None
    launches: int | None = None
    peak_mb: float | None = None
    saved_mb: float | None = None
    saved_own_mb: float | None = None
    accuracy: float | None = None
    out_err: float | None = None
    out_err_bound: float | None = None
    grad_err: float | None = None
    grad_err_bound: float | None = None
    judged_batch: int | None = None
    call_ms_p50: float | None = None
    call_ms_p20: float | None = None
    call_ms_p80: float | None = None
    cudnn: bool | None = None
    cudnn_benchmark: bool | None = None
    cudnn_deterministic: bool | None = None
    cudnn_tf32: bool | None = None
    matmul_tf32: bool | None = None
    deterministic: bool | None = None
    timed_threads: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    case: Case
    provider: str
    result: Result
    env: Environment


CASE_COLUMNS = tuple(f.name for f in fields(Case))
KEY_COLUMNS = (*CASE_COLUMNS, "provider")
COLUMNS = (
    *KEY_COLUMNS,
    *(f.name for f in fields(Result)),
    *(f.name for f in fields(Environment)),
)

# Columns that reports of an earlier version lack.
YOUNGER = tuple(f.name for f in fields(Result)[list(Result.__match_args__).index("judged_batch") :])

Key = tuple[str, ...]

_SIGNIFICANT_DIGITS = 6


class SchemaError(ValueError):
    """A file whose columns are not those of this version."""


def key_of(case: Case, provider: str) -> Key:
    """Returns what identifies a row: its key columns as the CSV spells them."""
    return (*(str(getattr(case, name)) for name in CASE_COLUMNS), provider)


def header() -> str:
    """Returns the first line of a CSV."""
    return _line(COLUMNS)


def format_row(row: Row) -> str:
    """Returns one line of a CSV."""
    parts = (row.case, row.result, row.env)
    case, result, env = ([getattr(part, f.name) for f in fields(part)] for part in parts)
    return _line([_text(value) for value in (*case, row.provider, *result, *env)])


def read(path: Path) -> pd.DataFrame:
    """Reads a report as a frame with the dtypes of the dataclasses; a torn last line is left out.

    Raises:
        SchemaError: the columns differ from `COLUMNS`, named in the message.
    """
    text = complete_lines(path)
    check_header(text, path, YOUNGER)
    dtypes = _dtypes()
    frame = pd.read_csv(io.StringIO(text), dtype=dtypes, keep_default_na=False, na_values=_NA)
    absent = {
        name: pd.Series(None, frame.index, dtypes[name]) if name not in frame else frame[name]
        for name in COLUMNS
    }
    return pd.DataFrame(absent)


def complete_lines(path: Path) -> str:
    """Returns the text of ``path`` up to its last line break: what was written whole."""
    text = path.read_bytes().decode()
    return text[: text.rfind("\n") + 1]


def check_header(text: str, path: Path, optional: Collection[str] = ()) -> None:
    """Refuses a report of another schema.

    Raises:
        SchemaError: the first line of ``text`` is not `header`, columns of ``optional`` aside.
    """
    found = next(csv.reader(io.StringIO(text)), [])
    if found == [name for name in COLUMNS if name in found or name not in optional]:
        return
    missing = [name for name in COLUMNS if name not in found and name not in optional]
    unknown = [name for name in found if name not in COLUMNS]
    difference = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    raise SchemaError(
        f"{path}: not a report of this version; columns {'; '.join(difference) or 'reordered'}"
    )


def keys(text: str) -> set[Key]:
    """Returns the keys of the rows in ``text``, which starts with a header."""
    rows: Iterable[Sequence[str]] = csv.reader(io.StringIO(text))
    return {tuple(row[: len(KEY_COLUMNS)]) for row in list(rows)[1:]}


def one_line(message: str) -> str:
    """Returns the first line of a message that says something."""
    lines = [line.strip() for line in message.splitlines()]
    return next((line for line in lines if line), "")


def _line(values: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{_SIGNIFICANT_DIGITS}g}"
    return str(value)


_PANDAS = {int: "Int64", float: "float64", bool: "bool", str: "str"}


def _dtypes() -> dict[str, Any]:
    hints = {
        **get_type_hints(Case),
        "provider": str,
        **get_type_hints(Result),
        **get_type_hints(Environment),
    }
    return {
        name: "boolean" if hint == (bool | None) else _PANDAS[_plain_type(hint)]
        for name, hint in hints.items()
    }


def _plain_type(hint: Any) -> type:
    arguments = [argument for argument in get_args(hint) if argument is not NoneType]
    if not arguments:
        return hint  # type: ignore[no-any-return]
    return type(arguments[0]) if isinstance(arguments[0], str) else arguments[0]


# Empty means none in a column of numbers and nothing else in a column of text.
_NA: dict[Any, list[str]] = {
    name: [""] for name, dtype in _dtypes().items() if dtype in ("Int64", "float64", "boolean")
}
