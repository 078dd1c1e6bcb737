"""Launch configurations that were timed on a device, in the place of the heuristics there.

A device's table is ``tuned/<its name>.csv`` in this package: a row a kernel and problem, named by
the fields of `Problem` and `LaunchConfig`; other columns say where the row is from. ``python -m
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

from sknet_kernels.config import DeviceFacts, LaunchConfig, Problem, Stage

FOLDER = Path(__file__).with_name("tuned")

_KINDS: dict[Any, Callable[[str], Any]] = {
    int: int,
    bool: {"True": True, "False": False}.__getitem__,
}


def choice(stage: Stage, problem: Problem, device: DeviceFacts) -> LaunchConfig:
    """Returns what ``device``'s table has, or where it has nothing what the heuristics suggest.

    Raises:
        ValueError: the table is damaged.
    """
    found = table(device.name).get((stage.name, problem))
    return found or LaunchConfig.from_heuristic(stage, problem, device)


def table_path(name: str) -> Path:
    """Returns where the table of the device called ``name`` is, if there is one."""
    stem = re.sub(r"\W+", "-", name.lower())
    return FOLDER / f"{stem}.csv"


@functools.cache
def table(name: str) -> Mapping[tuple[str, Problem], LaunchConfig]:
    """Returns the table of the device called ``name``, without rows where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = table_path(name)
    if not name or not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    # A line that is still being written has no end.
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows = {}
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            rows[row["stage"], _record(Problem, row)] = _record(LaunchConfig, row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}:{number}: expected a problem and its launch, got {row}"
            ) from (error)
    return rows


def _record(kind: type, row: Mapping[str, str]) -> Any:
    return kind(**{field.name: _KINDS[field.type](row[field.name]) for field in fields(kind)})
