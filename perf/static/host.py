"""Times the host's share of a call: tiny tensors, and Triton's launches go into nothing.

Ours beside the plain modules, in turn. Both sides run PyTorch's own operators on a CPU; neither
pays what a GPU's driver takes for a launch.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

import sknet_triton as skt
from perf.peers.baseline import Side, both_sides
from perf.rows.schema import Host

_SHAPE = (2, 32, 4, 4)
_CALLS = 50


def host(rounds: int) -> Iterator[Host]:
    """Yields a row for M = 2 and 3, inference and training.

    `perf.static.null_driver` is installed. ``rounds`` is how often the two sides take turns.
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
