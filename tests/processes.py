"""Two processes of one gloo group, for tests.

Starting a pair takes longer than most cases do: a test file starts one and asks it everything.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.interpreter import patch_the_language_once_a_launch

WORLD = 2

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed's gloo"
)


def in_two_processes(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Runs ``work(rank, *args)`` in two processes; returns what each of them returned.

    ``work`` stands at the top of its module, for it is pickled by name. What it returns goes
    through a file in ``folder``: tensors, numbers and strings in plain containers.
    """
    cast(Any, spawn)(_process, (str(folder), work, args), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def share(x: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Returns a process's images, of which each has its count."""
    return x.narrow(0, sum(counts[:rank]), counts[rank])


def fill_fresh_memory_with_nan() -> None:
    """Fills what is allocated from now on with NaN, so that an element nobody writes is seen.

    The public `torch.use_deterministic_algorithms` would change what Inductor compiles as well.
    """
    torch._C._set_deterministic_algorithms(True, warn_only=True)


def _process(rank: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    fill_fresh_memory_with_nan()
    if not torch.cuda.is_available():
        patch_the_language_once_a_launch()
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=180),
    )
    torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
