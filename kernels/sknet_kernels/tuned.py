"""Launch configurations that were timed on a device, in the place of the heuristics there.

A device's table is ``tuned/<its name>.csv`` in this package: a row a kernel and problem, named by
the fields of `Problem` and `LaunchConfig`, or of `SmallProblem` and `SmallConfig`, and empty in the
others' columns; what else stands in a row says where it is from. ``python -m
perf tune`` writes it. It is read once, when the device is first asked for; results are the same bit
by bit for as long as the table is.
"""

import csv
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sknet_kernels.config import STREAMING_KERNELS, DeviceFacts, LaunchConfig, Problem
from sknet_kernels.small import SMALL_KERNELS, SmallConfig, SmallProblem

FOLDER = Path(__file__).with_name("tuned")

# By what a row is read into, its problem and its configuration.
_RECORDS: dict[str, tuple[type, type]] = {
    **{kernel.name: (Problem, LaunchConfig) for kernel in STREAMING_KERNELS},
    **{kernel.name: (SmallProblem, SmallConfig) for kernel in SMALL_KERNELS},
}
_KINDS: dict[Any, Callable[[str], Any]] = {
    int: int,
    bool: {"True": True, "False": False}.__getitem__,
}


def choice(kernel: Any, problem: Any, device: DeviceFacts) -> Any:
    """Returns what ``device``'s table has, or where it has nothing what the heuristics suggest.

    Raises:
        ValueError: the table is damaged.
    """
    found = table(device.name).get((kernel.name, problem))
    return found or kernel.heuristic(problem, device)


def table_path(name: str) -> Path:
    """Returns where the table of the device called ``name`` is, if there is one."""
    stem = re.sub(r"\W+", "-", name.lower())
    return FOLDER / f"{stem}.csv"


@functools.cache
def table(name: str) -> Mapping[tuple[str, Any], Any]:
    """Returns the table of the device called ``name``, without rows where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = table_path(name)
    return read(path) if name and path.is_file() else {}


def read(path: Path) -> Mapping[tuple[str, Any], Any]:
    """Returns the configurations in ``path``, by kernel and problem.

    Raises:
        ValueError: a row is damaged.
    """
    text = path.read_text(encoding="utf-8")
    # A line that is still being written has no end.
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows = {}
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            problem, config = (
                kind(**{field.name: _KINDS[field.type](row[field.name]) for field in fields(kind)})
                for kind in _RECORDS[row["kernel"]]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}:{number}: expected a problem and its launch, got {row}"
            ) from error
        rows[row["kernel"], problem] = config
    return rows
