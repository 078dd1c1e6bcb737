"""The plans that Inductor makes, counted; nothing is built and nothing computed."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._inductor import compile_fx, config, metrics
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import fresh_cache


@dataclass
class Plans:
    """The names of all planned kernels, and the bytes that they move by Inductor's own count."""

    kernels: list[str] = field(default_factory=list)
    bytes_moved: int = 0


@contextmanager
def planning() -> Iterator[None]:
    """Makes Inductor plan for a CPU, and not take a plan from its cache.

    What it compiles in here leaves its results as they were allocated.
    """
    pick_vec_isa()  # which compiles, once for all that a cache keeps
    with fresh_cache(), mock.patch.object(AsyncCompile, "cpp_pybinding", _nothing_built):
        yield


@contextmanager
def counted_plans() -> Iterator[Plans]:
    """Counts the plans that are made inside, from the first call on; the bytes at the end."""
    plans = Plans()

    def note(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        planned = [node for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
        plans.kernels.extend(node.get_name() for node in planned)
        return nodes

    torch.compiler.reset()
    metrics.reset()
    with planning(), config.patch(_post_fusion_custom_pass=note), _metrics_counted():
        yield plans
    plans.bytes_moved = metrics.num_bytes_accessed


@contextmanager
def _metrics_counted() -> Iterator[None]:
    """Makes Inductor count its bytes, as it does where it would log them."""
    log = compile_fx.inductor_metrics_log
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagate


def _nothing_built(*_: Any) -> Callable[..., None]:
    return lambda *pointers: None
