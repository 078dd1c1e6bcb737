"""Clocks and counters: time per call, memory, launches, FLOPs, copy bandwidth."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from perf.rows import env
from perf.rows.env import Switches
from perf.rows.schema import Mode
from perf.static.bytes import MEBI

Run = Callable[[], object]
_T = TypeVar("_T")

WARMUP_MS = 25.0
# A block of calls outlasts what the wait at its end costs by far.
BLOCK_SECONDS = 0.01
MIN_BLOCKS = 3
# Larger than the last-level cache of the CPUs and GPUs at hand, so that a copy goes to memory.
COPY_BYTES = {"cpu": 256 * MEBI, "cuda": 1024 * MEBI}
COPY_SECONDS = 0.5
FORWARD_PASSES: dict[Mode, int] = {"infer": 1, "train": 3, "bwd": 2}


@dataclass
class Times:
    """Milliseconds per call, and what PyTorch was set to while they were taken."""

    switches: Switches
    # On a GPU by events, every call with a cold L2, however late the host starts it; on a CPU by
    # the clock, a sample a block of calls.
    ms: list[float] = field(default_factory=list)
    # From call to call on a GPU, by the clock: a sample a block of calls that the host starts one
    # after the other. Where calls are small this is the host's time.
    call_ms: list[float] = field(default_factory=list)


def interleaved(
    runs: Mapping[str, Run],
    context: Callable[[str], AbstractContextManager[object]],
    device: torch.device,
    seconds: float,
    rounds: int,
) -> tuple[dict[str, Times], dict[str, Exception]]:
    """Samples every run in turn, ``rounds`` times, so that a drifting clock favours none.

    Each runs in its ``context`` for ``seconds`` over all rounds, on a GPU for each of both clocks.
    Every other round runs backwards. A run that fails has its error and no times.
    """
    times: dict[str, Times] = {}
    failed: dict[str, Exception] = {}
    for name in turns([*runs], rounds):
        if name in failed:
            continue
        try:
            with context(name):
                taken = times.setdefault(name, Times(env.switches()))
                taken.ms += sample(runs[name], device, seconds / rounds)
                if device.type == "cuda":
                    taken.call_ms += call_to_call(runs[name], device, seconds / rounds)
        except Exception as error:
            failed[name] = error
    return {name: taken for name, taken in times.items() if name not in failed}, failed


def turns(items: Sequence[_T], rounds: int) -> Iterator[_T]:
    """Yields every item once a round, in every other round backwards."""
    for i in range(rounds):
        yield from items[:: 1 if i % 2 == 0 else -1]


def sample(run: Run, device: torch.device, seconds: float) -> list[float]:
    """Calls ``run`` for about ``seconds`` and returns milliseconds per call, as `Times.ms`."""
    if device.type == "cuda":
        from triton.testing import do_bench

        times: list[float] = do_bench(run, warmup=WARMUP_MS, rep=1e3 * seconds, return_mode="all")
        return times
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return [1e3 * t for t in timer.blocked_autorange(min_run_time=seconds).times]


def call_to_call(run: Run, device: torch.device, seconds: float) -> list[float]:
    """Calls ``run`` for about ``seconds`` and returns milliseconds per call, as `Times.call_ms`."""
    calls = 1
    while (elapsed := _block(run, calls, device)) < BLOCK_SECONDS:
        calls *= 2
    blocks = max(MIN_BLOCKS, round(seconds / elapsed))
    return [1e3 * _block(run, calls, device) / calls for _ in range(blocks)]


def _block(run: Run, calls: int, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Returns the 20 %, 50 % and 80 % quantiles."""
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return p20, p50, p80


@functools.cache
def copy_gbps(device: torch.device) -> float:
    """Returns the bandwidth of a large copy on ``device``, reading and writing counted."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    _, median, _ = quantiles(sample(lambda: target.copy_(source), device, COPY_SECONDS))
    return 2 * source.numel() / median / 1e6


def peak_memory_mb(run: Run, device: torch.device) -> float | None:
    """Returns the most memory that one call allocates on a GPU at a time."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MEBI


def launches(run: Run, device: torch.device) -> int | None:
    """Returns how many kernels, copies and fills one call starts on a GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    return len([event for event in profiler.events() if event.device_type.name == "CUDA"])


def flops(module: nn.Module, inputs: tuple[Tensor, ...], mode: Mode) -> int:
    """Returns the FLOPs of the convolutions and matrix products, a multiply-add being two.

    The backward pass counts as two forward passes and is not run: FlopCounterMode takes the
    weights' gradient of a convolution in G groups for one in a single group.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    forward: int = counter.get_total_flops()
    return forward * FORWARD_PASSES[mode]
