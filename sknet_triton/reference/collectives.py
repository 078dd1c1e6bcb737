"""Sums over a process group that an operator names by a string."""

from torch import Tensor


def sum_over(group: str, x: Tensor) -> Tensor:
    """Returns the sum of ``x`` over the processes of ``group``; ``x`` itself for no group."""
    if not group:
        return x
    # An operator's schema carries strings but no process group. PyTorch's functional collectives
    # take the name, and torch.compile traces them.
    from torch.distributed import _functional_collectives as collectives

    reduced = collectives.all_reduce(x.contiguous(), "sum", group)  # type: ignore[arg-type]  # a str
    total: Tensor = collectives.wait_tensor(reduced)  # type: ignore[no-untyped-call]
    return total
