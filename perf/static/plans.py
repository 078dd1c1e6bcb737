"""The plans that Inductor makes, without their code: nothing is built and nothing computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import fresh_cache


@contextmanager
def planning() -> Iterator[None]:
    """Makes Inductor plan for a CPU, and not take a plan from its cache.

    What it compiles in here leaves its results as they were allocated.
    """
    pick_vec_isa()  # which compiles, once for all that a cache keeps
    with fresh_cache(), mock.patch.object(AsyncCompile, "cpp_pybinding", _nothing_built):
        yield


def _nothing_built(*_: Any) -> Callable[..., None]:
    return lambda *pointers: None
