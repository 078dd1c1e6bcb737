"""Counts what a forward pass keeps for the backward pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

MEBI = 2**20


@dataclass(frozen=True)
class Saved:
    """MiB that a forward pass keeps for the backward pass, whole storages, parameters left out.

    Attributes:
        mb: all of it.
        own_mb: without the inputs, which the caller may hold anyway.
    """

    mb: float
    own_mb: float


def saved(forward: Callable[[], object], module: nn.Module, inputs: Iterable[Tensor]) -> Saved:
    """Counts what ``forward`` keeps, which calls ``module`` on ``inputs``."""
    parameters, given = _storages(module.parameters()), _storages(inputs)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    del out  # held until here, so that no storage was freed and its address taken again
    own = sum(size for address, size in kept.items() if address not in given)
    return Saved(sum(kept.values()) / MEBI, own / MEBI)


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}
