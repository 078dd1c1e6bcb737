"""Passes over a branch tensor that each plan for fuse_select moves, and what each one saves.

Eager is counted operator by operator, torch.compile by Inductor's own count of the plan it makes,
the Triton kernels by Triton's interpreter. One pass is B * C * H * W elements.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, config, metrics
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sknet_triton as skt
from perf.peers.baseline import LAYOUTS, OursFuseSelect, PlainFuseSelect
from perf.rows.schema import Traffic
from perf.static.bytes import MEBI, counted_bytes, saved


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

    In "triton" a CPU's tensors are planned as a GPU's, for which `NullDriver` stands; no reduction
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
    # Inductor counts bytes where it would log them.
    log = mock.patch.object(compile_fx, "inductor_metrics_log", mock.Mock())
    with planning(), config.patch(options), log:
        yield plans
    plans.bytes_moved = metrics.num_bytes_accessed


def _no_kernel(*_: Any, **options: Any) -> SimpleNamespace:
    return SimpleNamespace(run=lambda *pointers, **options: None)


def _nothing_built(*_: Any) -> Callable[..., None]:
    return lambda *pointers: None


Run = Callable[[Callable[..., Any]], None]


def traffic(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Traffic]:
    """Yields a row for every plan, layout and M = 2, 3; needs ``TRITON_INTERPRET=1``."""
    for M in (2, 3):
        for layout, memory_format in LAYOUTS.items():
            xs = [
                torch.randn(shape).to(dtype).to(memory_format=memory_format).requires_grad_()
                for _ in range(M)
            ]
            ours = OursFuseSelect(shape[1], M)
            plain = PlainFuseSelect(ours)
            for provider, module, count in (
                ("plain-eager", plain, _eager_bytes),
                ("plain-compile", plain, _compiled_bytes),
                ("ours-pytorch-compile", ours, _compiled_bytes),
                ("ours-triton-eager", ours, _kernel_bytes),
            ):
                with skt.use_backend("triton" if count is _kernel_bytes else "reference"):
                    figures = _figures(module, xs, count)
                yield Traffic(M, layout, str(dtype).removeprefix("torch."), provider, *figures)


def _figures(
    module: nn.Module, xs: list[Tensor], count: Callable[[nn.Module, Run], int]
) -> tuple[float, float, float]:
    """Returns passes in training and in inference, and the branch tensors saved."""
    one_pass = xs[0].numel() * xs[0].element_size()
    dout = torch.randn_like(xs[0])

    def train(run: Callable[..., Any]) -> None:
        torch.autograd.backward(run(*xs), dout)

    def infer(run: Callable[..., Any]) -> None:
        with torch.no_grad():
            run(*xs)

    training = count(module.train(), train)
    run = torch.compile(module) if count is _compiled_bytes else module
    with planning():
        kept = saved(lambda: run(*xs), module, xs).mb * MEBI
    inference = count(module.eval(), infer)
    return training / one_pass, inference / one_pass, kept / one_pass


class _Operands(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of every operator's tensor arguments and results, views left out."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.nbytes for x in tensors)
        return out


def _eager_bytes(module: nn.Module, run: Run) -> int:
    operands: Any = _Operands()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with operands:
        run(module)
    return int(operands.bytes)


def _compiled_bytes(module: nn.Module, run: Run) -> int:
    with counted_plans() as plans:
        run(torch.compile(module, fullgraph=True))
    return plans.bytes_moved


def _kernel_bytes(module: nn.Module, run: Run) -> int:
    with counted_bytes() as count:
        run(module)
    return count.read + count.written
