"""A Triton driver for a machine without a GPU, and the host's time of a call, taken with it.

Kernels are compiled and bound, and none runs. CPU tensors stand for a GPU's. What remains of a call
is the host's work: Python, PyTorch's dispatch, and the binding of arguments. What a launch writes
is left as it was.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import sknet_triton as skt
import sknet_triton.backend
from perf.peers.baseline import Side, both_sides
from perf.rows.schema import Host
from sknet_kernels.config import DeviceFacts

# An H100: what the heuristics ask of it, and what Triton's loader does.
_ARCHITECTURE = 90
_FACTS = DeviceFacts(multiprocessors=132, warp_size=32)
_PROPERTIES = {"max_shared_mem": 232_448, "multiprocessor_count": _FACTS.multiprocessors}
_REGISTERS, _SPILLS, _MOST_THREADS = 32, 0, 1024
# Triton keeps compiled kernels by device: no real one has this number.
_DEVICE = -1
# Of the tensors whose calls are timed, and how many calls are timed at once.
_SHAPE = (2, 32, 4, 4)
_CALLS = 50


@dataclass(frozen=True)
class NullLaunch:
    """A launch that went into nothing."""

    kernel: str
    programs: int


class _Utils:
    """What Triton's loader asks of a driver."""

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return name, name, _REGISTERS, _SPILLS, _MOST_THREADS

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return _PROPERTIES


def install() -> list[NullLaunch]:
    """Makes this process launch into nothing, for good; returns the list that launches join.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is set, so that kernels would be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET: nothing is launched where it is 1; unset it")
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    launches: list[NullLaunch] = []

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
            launches.append(NullLaunch(self.name, x * y * z))

    class NullDriver(DriverBase):  # type: ignore[misc]  # triton is not typed
        utils = _Utils()
        launcher_cls = Launcher

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", _ARCHITECTURE, _FACTS.warp_size)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing runs that could be timed")

        def get_current_device(self) -> int:
            return _DEVICE

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
            return divmod(_ARCHITECTURE, 10)

    driver.set_active(NullDriver())
    DeviceFacts.of = classmethod(lambda cls, device: _FACTS)  # type: ignore[method-assign, assignment]
    # As in the interpreter, which takes CPU tensors too.
    sknet_triton.backend._interpreting = lambda: True
    return launches


def host(rounds: int) -> Iterator[Host]:
    """Yields the host's time for M = 2 and 3, inference and training.

    The driver is installed. Ours and the plain modules run PyTorch's own operators on a CPU;
    neither pays what a GPU's driver takes for a launch. ``rounds`` is how often they take turns.
    """
    dout = torch.randn(_SHAPE)
    modes: dict[str, Callable[[Side], None]] = {
        "infer": Side.infer,
        "train": lambda side: side.train(dout),
    }
    for M in (2, 3):
        sides = both_sides([torch.randn(_SHAPE).requires_grad_() for _ in range(M)])
        for mode, run in modes.items():
            with skt.use_backend("triton"):
                yield _row(M, mode, sides, run, rounds)


def _row(
    M: int,
    mode: str,
    sides: tuple[Side, Side],
    run: Callable[[Side], None],
    rounds: int,
) -> Host:
    for side in sides:
        _seconds(run, side)
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for k in (0, 1) if i % 2 else (1, 0):
            times[k].append(_seconds(run, sides[k]))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    p20, *_, p80 = statistics.quantiles(ratios, n=5)
    ours, plain = (statistics.median(side) * 1e6 for side in times)
    return Host(M, mode, ours, plain, statistics.median(ratios), p20, p80)


def _seconds(run: Callable[[Side], None], side: Side) -> float:
    """Returns the CPU time of one call, the mean of many: neighbours on the machine cost none."""
    start = time.process_time()
    for _ in range(_CALLS):
        run(side)
    return (time.process_time() - start) / _CALLS
