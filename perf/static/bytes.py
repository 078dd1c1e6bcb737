"""Bytes, counted: what kernels ask for in Triton's interpreter, what a forward pass keeps."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

MEBI = 2**20


@dataclass
class ByteCount:
    """Bytes of unmasked lanes that kernels read and wrote while they were counted."""

    read: int = 0
    written: int = 0

    def passes(self, one_pass: int) -> float:
        """Returns all bytes in units of ``one_pass``, the bytes of one branch tensor."""
        return (self.read + self.written) / one_pass


@contextmanager
def counted_bytes() -> Iterator[ByteCount]:
    """Counts every load and store inside the block; needs ``TRITON_INTERPRET=1`` before triton."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = ByteCount()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    InterpreterBuilder.create_masked_load = _counting(load, count, "read", mask_at=1)
    InterpreterBuilder.create_masked_store = _counting(store, count, "written", mask_at=2)
    try:
        yield count
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def _counting(
    access: Callable[..., Any], count: ByteCount, field: str, mask_at: int
) -> Callable[..., Any]:
    def counted(builder: Any, *args: Any) -> Any:
        pointers, mask = args[0], args[mask_at]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        setattr(count, field, getattr(count, field) + int(mask.data.sum()) * size)
        return access(builder, *args)

    return counted


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
