"""The processes that share one sweep, as torchrun starts them."""

import os
from dataclasses import dataclass


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
