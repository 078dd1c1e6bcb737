"""What every formula of the reference shares."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that sums over ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Returns a context that leaves every dtype as it is on the device of ``x``.

    A forward under autocast and its backward outside it then compute in the same dtypes.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def over_space(per_channel: Tensor, spatial_axes: int) -> Tensor:
    """Views [B, C] as [B, C, 1, ...], ready to broadcast over so many axes of space."""
    return per_channel.reshape(*per_channel.shape, *(1,) * spatial_axes)
