"""What a call costs the host: launches counted, and its time, both into a driver of nothing.

Counted is what lies between SKConv's convolutions and V, running statistics included. Eager PyTorch
launches once for each operator that a backend carries out (a lower bound: some are several
kernels), torch.compile once for each kernel of its plan: of plain modules the one in Triton, as for
a GPU, of our formulas, which are for CPUs, the one for a CPU. Triton's launches are what a driver
without a device is asked for, beside PyTorch's operators.

What remains of a call without a device is the host's work: Python, PyTorch's dispatch, and the
binding of arguments.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile
from triton.runtime import driver

import sknet_triton as skt
import sknet_triton.backend
from perf.peers.baseline import LAYOUTS, Side, both_sides
from perf.rows.schema import Host, Launches
from perf.static.aot import MODELLED, TARGETS, NullDriver
from perf.static.traffic import counted_plans
from sknet_kernels.config import DeviceFacts

# Operators that are neither views nor composed of others, and launch nothing.
_ALLOCATIONS = ("empty", "new_empty", "_unsafe_view", "resize_", "set_")
# Of the tensors whose calls are timed, and how many calls are timed at once.
_SHAPE = (2, 32, 4, 4)
_CALLS = 50

Key = tuple[int, str, str]
Run = Callable[[Side], None]


def install() -> NullDriver:
    """Makes this process launch into nothing, for good, as on an H100; returns the driver.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is set, so that kernels would be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET: nothing is launched where it is 1; unset it")
    nothing = NullDriver(TARGETS[MODELLED])
    driver.set_active(nothing)
    facts = nothing.target.facts
    DeviceFacts.of = classmethod(lambda cls, device: facts)  # type: ignore[method-assign, assignment]
    # As in the interpreter, which takes CPU tensors too.
    sknet_triton.backend._interpreting = lambda: True
    return nothing


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
    """Yields the launches of every provider, layout and M = 2, 3; installs the driver."""
    on_driver = functools.partial(_driven, install())
    in_triton, for_a_cpu = (functools.partial(_planned, name) for name in ("triton", "cpp"))
    dout = torch.randn(shape).to(dtype)
    for M in (2, 3):
        for layout, memory_format in LAYOUTS.items():
            maps = [
                torch.randn(shape).to(dtype).to(memory_format=memory_format).requires_grad_()
                for _ in range(M)
            ]
            ours, plain = both_sides(maps)
            for provider, counted, side, count in (
                ("plain-eager", "operators", plain, _operators),
                ("plain-compile", "Triton plan", plain, in_triton),
                ("ours-pytorch-compile", "CPU plan", ours, for_a_cpu),
                ("ours-triton-eager", "driver", ours, on_driver),
            ):
                with skt.use_backend("triton" if count is on_driver else "reference"):
                    training = count(side, functools.partial(Side.train, dout=dout))
                    inference = count(side, Side.infer)
                yield (M, layout, provider), Launches(training, inference, counted)


def launching_operators(call: Callable[[], object]) -> int:
    """Returns how many of PyTorch's operators a backend carries out in ``call``."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return sum(_launching(event) for event in recorded.events() if event.cpu_parent is None)


def _operators(side: Side, run: Run) -> int:
    run(side)  # what is made in the first call alone is not counted
    return launching_operators(lambda: run(side))


def _driven(driver: NullDriver, side: Side, run: Run) -> int:
    operators, before = _operators(side, run), len(driver.launches)
    run(side)
    return operators + len(driver.launches) - before


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


def host(rounds: int) -> Iterator[Host]:
    """Yields the host's time for M = 2 and 3, inference and training; the driver is installed.

    Ours and the plain modules run PyTorch's own operators on a CPU; neither pays what a GPU's
    driver takes for a launch. ``rounds`` is how often they take turns.
    """
    train: Run = functools.partial(Side.train, dout=torch.randn(_SHAPE))
    modes: dict[str, Run] = {"infer": Side.infer, "train": train}
    for M in (2, 3):
        sides = both_sides([torch.randn(_SHAPE).requires_grad_() for _ in range(M)])
        for mode, run in modes.items():
            with skt.use_backend("triton"):
                yield Host(M, mode, *_compared(sides, run, rounds))


def _compared(sides: tuple[Side, Side], run: Run, rounds: int) -> tuple[float, ...]:
    """Returns both medians in microseconds, and the ratio's median, p20 and p80."""
    for side in sides:
        _seconds(run, side)
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for k in (0, 1) if i % 2 else (1, 0):
            times[k].append(_seconds(run, sides[k]))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    p20, *_, p80 = statistics.quantiles(ratios, n=5)
    ours, plain = (statistics.median(side) * 1e6 for side in times)
    return ours, plain, statistics.median(ratios), p20, p80


def _seconds(run: Run, side: Side) -> float:
    """Returns the CPU time of one call, the mean of many: neighbours on the machine cost none."""
    start = time.process_time()
    for _ in range(_CALLS):
        run(side)
    return (time.process_time() - start) / _CALLS


def main(arguments: list[str]) -> None:
    """Prints the launches as JSON: sizes and a dtype are the arguments."""
    *sizes, dtype = arguments
    B, C, H, W = map(int, sizes)
    found = launches((B, C, H, W), getattr(torch, dtype))
    print(json.dumps([(key, asdict(counts)) for key, counts in found]))


if __name__ == "__main__":
    main(sys.argv[1:])
