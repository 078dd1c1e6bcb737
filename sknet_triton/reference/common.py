"""What every formula of the reference shares."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that sums over ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Returns a context that leaves every dtype as it is on the device of ``x``.

    A forward under autocast and its backward outside it then compute in the same dtypes.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


@overload
def cast(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def cast(x: None, dtype: torch.dtype) -> None: ...
def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns ``x`` in ``dtype``: itself where it is None or has that dtype."""
    # A cast that casts nothing costs a call of an operator. Under torch.compile of torch 2.11 it
    # costs an output its gradient: it returns the tensor itself, and Dynamo counts two outputs.
    return x if x is None or x.dtype == dtype else x.to(dtype)


def over_space(per_channel: Tensor, spatial_axes: int) -> Tensor:
    """Views [..., C] as [..., C, 1, ...], ready to broadcast over so many axes of space."""
    return per_channel.reshape(*per_channel.shape, *(1,) * spatial_axes)


def sum_over(group: "ProcessGroup | None", x: Tensor) -> Tensor:
    """Returns the sum of ``x`` over the processes of ``group``; ``x`` itself for no group."""
    if group is None:
        return x
    # PyTorch's functional collectives are those that torch.compile traces.
    from torch.distributed import _functional_collectives as collectives

    reduced = collectives.all_reduce(x.contiguous(), "sum", group)
    total: Tensor = collectives.wait_tensor(reduced)  # type: ignore[no-untyped-call]
    return total
