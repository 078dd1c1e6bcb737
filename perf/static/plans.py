"""The plans that Inductor makes, counted; nothing is built and nothing computed."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal
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
    """Makes Inductor plan, and not take a plan from its cache.

    What it compiles in here leaves its results as they were allocated.
    """
    pick_vec_isa()  # which compiles, once for all that a cache keeps
    cpp = mock.patch.object(AsyncCompile, "cpp_pybinding", _nothing_built)
    triton = mock.patch.object(AsyncCompile, "triton", _no_kernel)
    with fresh_cache(), cpp, triton:
        yield


@contextmanager
def counted_plans(language: Literal["cpp", "triton"] = "cpp") -> Iterator[Plans]:
    """Counts the plans that are made inside, from the first call on; the bytes at the end.

    In "triton" a CPU's tensors are planned as a GPU's, for which `null_driver` stands; no reduction
    is split, as on a GPU those are that leave few results.
    """
    plans = Plans()

    def note(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        planned = [node for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
        plans.kernels.extend(node.get_name() for node in planned)
        return nodes

    torch.compiler.reset()
    metrics.reset()
    options = {"cpu_backend": language, "_post_fusion_custom_pass": note}
    with planning(), config.patch(options), _metrics_counted():
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


def _no_kernel(*_: Any, **options: Any) -> SimpleNamespace:
    return SimpleNamespace(run=lambda *pointers, **options: None)


def _nothing_built(*_: Any) -> Callable[..., None]:
    return lambda *pointers: None
