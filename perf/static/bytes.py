"""Counts the bytes that kernels ask for in Triton's interpreter: unmasked lanes times size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class ByteCount:
    """Bytes read and written by the kernels that ran while they were counted."""

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
