"""Launches between SKConv's convolutions and V, running statistics included; nothing is timed.

Eager PyTorch launches once for each operator that a backend carries out (a lower bound: some are
several kernels), torch.compile once for each kernel of its plan: of plain modules the one in
Triton, as for a GPU, of our formulas, which are for CPUs, the one for a CPU. Triton's launches are
what a driver without a device is asked for, beside PyTorch's operators.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

import sknet_triton as skt
from perf.peers.baseline import LAYOUTS, Side, both_sides
from perf.rows.schema import Launches
from perf.static import null_driver
from perf.static.plans import counted_plans

# Operators that are neither views nor composed of others, and launch nothing.
_ALLOCATIONS = ("empty", "new_empty", "_unsafe_view", "resize_", "set_")

Key = tuple[int, str, str]
Run = Callable[[Side], None]


def launches_of(shape: tuple[int, int, int, int], dtype: str) -> dict[Key, Launches]:
    """Returns the launches by M, layout and provider.

    They are counted in a process of its own: it launches into nothing for good, and where kernels
    are interpreted none is launched.
    """
    counted = subprocess.run(
        [sys.executable, "-m", __name__, *map(str, shape), dtype],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    rows = json.loads(counted.splitlines()[-1])
    return {tuple(key): Launches(**found) for key, found in rows}


def launches(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Iterator[tuple[Key, Launches]]:
    """Yields the launches of every provider, layout and M = 2, 3; installs the null driver."""
    kernels = null_driver.install()
    for M in (2, 3):
        for layout, memory_format in LAYOUTS.items():
            maps = [
                torch.randn(shape).to(dtype).to(memory_format=memory_format).requires_grad_()
                for _ in range(M)
            ]
            ours, plain = both_sides(maps)
            in_triton = functools.partial(_planned, "triton")
            for_a_cpu = functools.partial(_planned, "cpp")
            for provider in (
                _Provider("plain-eager", "operators", plain, "reference", _operators),
                _Provider("plain-compile", "Triton plan", plain, "reference", in_triton),
                _Provider("ours-pytorch-compile", "CPU plan", ours, "reference", for_a_cpu),
                _Provider(
                    "ours-triton-eager",
                    "driver",
                    ours,
                    "triton",
                    functools.partial(_driven, kernels),
                ),
            ):
                yield (M, layout, provider.name), provider.launches()


@dataclass(frozen=True)
class _Provider:
    name: str
    counted: str
    side: Side
    backend: skt.Backend
    count: Callable[[Side, Run], int]

    def launches(self) -> Launches:
        dout = torch.randn_like(self.side.maps[0])
        with skt.use_backend(self.backend):
            training = self.count(self.side, lambda side: side.train(dout))
            return Launches(training, self.count(self.side, Side.infer), self.counted)


def launching_operators(call: Callable[[], object]) -> int:
    """Returns how many of PyTorch's operators a backend carries out in ``call``."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return sum(_launching(event) for event in recorded.events() if event.cpu_parent is None)


def _operators(side: Side, run: Run) -> int:
    run(side)  # what is made in the first call alone is not counted
    return launching_operators(lambda: run(side))


def _driven(kernels: list[null_driver.NullLaunch], side: Side, run: Run) -> int:
    operators, before = _operators(side, run), len(kernels)
    run(side)
    return operators + len(kernels) - before


def _planned(language: Literal["cpp", "triton"], side: Side, run: Run) -> int:
    with counted_plans(language) as plans:
        compiled: Any = torch.compile(side.module, fullgraph=True)
        run(replace(side, module=compiled))
    return len(plans.kernels)


def _launching(event: Any) -> int:
    if event.name.startswith("aten::") and not _is_composed(event.name):
        return int(not _is_free(event.name))
    return sum(_launching(child) for child in event.cpu_children)


@functools.cache
def _is_free(name: str) -> bool:
    """Whether the operator only views or allocates."""
    views = any(overload.is_view for overload in _overloads(name))
    return views or name.removeprefix("aten::").startswith(_ALLOCATIONS)


@functools.cache
def _is_composed(name: str) -> bool:
    """Whether PyTorch makes the operator of others on every device."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has_kernel(each.name(), "CompositeImplicitAutograd") for each in _overloads(name))


def _overloads(name: str) -> list[Any]:
    """Returns the overloads of ``name``, without those that nothing here calls.

    Those take names of dimensions, or the tensor to write to.
    """
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    known = set(torch._C._dispatch_get_all_op_names())
    every = [getattr(packet, overload) for overload in packet.overloads()]
    return [
        each
        for each in every
        if each.name() in known
        and not any(argument.is_out for argument in each._schema.arguments)
        and "Dimname" not in str(each._schema)
    ]


def main(arguments: list[str]) -> None:
    """Prints the launches as JSON: sizes and a dtype are the arguments."""
    *sizes, dtype = arguments
    B, C, H, W = map(int, sizes)
    found = launches((B, C, H, W), getattr(torch, dtype))
    print(json.dumps([(key, asdict(counts)) for key, counts in found]))


if __name__ == "__main__":
    main(sys.argv[1:])
