"""Passes over a branch tensor that each plan for fuse_select moves, and what each one saves.

Eager is counted operator by operator, torch.compile by Inductor's own count of the plan it makes,
the Triton kernels by Triton's interpreter. One pass is B * C * H * W elements.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sknet_triton as skt
from perf.peers.baseline import LAYOUTS, PlainFuseSelect, SKFuseSelect
from perf.rows.schema import Traffic
from perf.static.bytes import MEBI, counted_bytes, saved
from perf.static.plans import counted_plans, planning


class _Operands(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of every operator's tensor arguments and results, views left out."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


Run = Callable[[Callable[..., Any]], None]
Count = Callable[[nn.Module, Run], int]


def traffic(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Traffic]:
    """Yields a row for every plan, layout and M = 2, 3; needs ``TRITON_INTERPRET=1``."""
    for M in (2, 3):
        for layout, memory_format in LAYOUTS.items():
            xs = [
                torch.randn(shape).to(dtype).to(memory_format=memory_format).requires_grad_()
                for _ in range(M)
            ]
            for plan in _plans(SKFuseSelect(shape[1], M)):
                with skt.use_backend(plan.backend):
                    figures = _figures(plan, xs)
                yield Traffic(M, layout, str(dtype).removeprefix("torch."), plan.name, *figures)


@dataclass(frozen=True)
class _Plan:
    name: str
    module: nn.Module
    backend: skt.Backend
    compiled: bool
    count: Count


def _plans(ours: SKFuseSelect) -> tuple[_Plan, ...]:
    return (
        _Plan("plain-eager", PlainFuseSelect(ours), "reference", False, _eager_bytes),
        _Plan("plain-compile", PlainFuseSelect(ours), "reference", True, _compiled_bytes),
        _Plan("ours-pytorch-compile", ours, "reference", True, _compiled_bytes),
        _Plan("ours-triton-eager", ours, "triton", False, _kernel_bytes),
    )


def _figures(plan: _Plan, xs: list[Tensor]) -> tuple[float, float, float]:
    """Returns passes in training and in inference, and the branch tensors saved."""
    module = plan.module
    one_pass = xs[0].numel() * xs[0].element_size()
    dout = torch.randn_like(xs[0])

    def train(run: Callable[..., Any]) -> None:
        torch.autograd.backward(run(*xs), dout)

    def infer(run: Callable[..., Any]) -> None:
        with torch.no_grad():
            run(*xs)

    training = plan.count(module.train(), train)
    run = torch.compile(module) if plan.compiled else module
    with planning():
        kept = saved(lambda: run(*xs), module, xs).mb * MEBI
    inference = plan.count(module.eval(), infer)
    return training / one_pass, inference / one_pass, kept / one_pass


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
