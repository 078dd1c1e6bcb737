"""Sums over a process group that an operator names by a string."""

from torch import Tensor


def sum_over(group: str, x: Tensor) -> Tensor:
    """Returns the sum of ``x`` over the processes of ``group``; ``x`` itself for no group."""
    if not group:
        return x
    import torch.distributed as dist
    from torch._C._distributed_c10d import _resolve_process_group

    total = x.contiguous().clone()
    # An operator's schema carries strings but no process group; PyTorch's own collectives as
    # operators resolve the name the same way.
    dist.all_reduce(total, group=_resolve_process_group(group))  # type: ignore[arg-type]  # a str
    return total
