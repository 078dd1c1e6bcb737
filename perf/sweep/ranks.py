"""The processes that share one sweep, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


@dataclass(frozen=True)
class Rank:
    """This process among those that share the sweep; ``local`` counts on this host."""

    index: int
    local: int
    count: int


def this_rank() -> Rank:
    """Returns what torchrun says, or the only one where it did not start this process."""
    return Rank(
        index=int(os.environ.get("RANK", "0")),
        local=int(os.environ.get("LOCAL_RANK", "0")),
        count=int(os.environ.get("WORLD_SIZE", "1")),
    )


@contextmanager
def together(rank: Rank) -> Iterator[None]:
    """A context in which the ranks can `wait_for_all`; a lone process needs none."""
    if rank.count == 1:
        yield
        return
    # A rank may be busy with its last case for long while the others wait.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all(rank: Rank) -> None:
    """Returns when every rank has come here."""
    if rank.count > 1:
        dist.barrier()


def part_of(path: Path, rank: Rank) -> Path:
    """Returns the file that this rank writes: the report itself where it is alone."""
    return path if rank.count == 1 else path.with_name(f"{path.name}.part{rank.index}")


def parts_of(path: Path) -> list[Path]:
    """Returns the parts of a report that ranks have left behind."""
    return sorted(path.parent.glob(f"{path.name}.part*"))
