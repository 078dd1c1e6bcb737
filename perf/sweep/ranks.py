"""The processes that share one sweep, as torchrun starts them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from perf.rows import StopError, UsageError, one_line

PATIENCE = timedelta(minutes=1)
# A rank may be busy with its last case for long while the others wait.
_LONGEST_CASE = timedelta(days=1)


@dataclass(frozen=True)
class Rank:
    """This process among those that share the sweep; ``local`` counts on this host."""

    index: int
    local: int
    count: int


def this_rank() -> Rank:
    """Returns what torchrun says, or the only one where it did not start this process.

    Raises:
        UsageError: the environment variables name no rank.
    """
    index = _number("RANK", os.environ.get("RANK", "0"))
    local = _number("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0"))
    count = _number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if index >= count:
        raise UsageError(f"RANK: expected less than WORLD_SIZE, which is {count}, got {index}")
    return Rank(index, local, count)


def _number(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"{name}: expected a whole number, got {text!r}")
    return int(text)


class Team:
    """The ranks of one sweep, which can wait for each other."""

    def __init__(self, rank: Rank, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self._group = group

    def wait(self) -> None:
        """Returns when every rank has come here.

        Raises:
            StopError: a rank is gone.
        """
        if self._group is None:
            return
        try:
            dist.barrier(self._group)
        except RuntimeError as error:
            raise StopError(
                "another rank is gone; --resume collects the rows that every rank left behind"
            ) from error

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A context that every rank leaves, or none: the mistake of one stops all, said once."""
        mistake = ""
        try:
            yield
        except UsageError as error:
            mistake = str(error)
        mistakes = [mistake]
        if self._group is not None:
            mistakes = [""] * self.rank.count
            dist.all_gather_object(mistakes, mistake, self._group)
        saying = next((i for i, said in enumerate(mistakes) if said), None)
        if saying == self.rank.index:
            raise UsageError(mistake)
        if saying is not None:
            raise SystemExit(2)


@contextmanager
def together(rank: Rank) -> Iterator[Team]:
    """A context in which the ranks are a team; a lone process is one by itself.

    Raises:
        UsageError: the others have not come within `PATIENCE`.
    """
    if rank.count == 1:
        yield Team(rank, None)
        return
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
        group = dist.new_group(timeout=_LONGEST_CASE)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"rank {rank.index} of {rank.count} (RANK, WORLD_SIZE) met no others within "
            f"{PATIENCE.seconds} seconds: {one_line(str(error))}"
        ) from error
    try:
        yield Team(rank, group)
    finally:
        dist.destroy_process_group()


def part_of(path: Path, rank: Rank) -> Path:
    """Returns the file that this rank writes: the report itself where it is alone."""
    return path if rank.count == 1 else path.with_name(f"{path.name}.part{rank.index}")


def parts_of(path: Path) -> list[Path]:
    """Returns the parts of a report that ranks have left behind, in the order of the ranks."""
    found = {}
    for other in path.parent.iterdir():
        index = other.name.removeprefix(f"{path.name}.part")
        if index != other.name and re.fullmatch("[0-9]+", index):
            found[int(index)] = other
    return [found[index] for index in sorted(found)]
