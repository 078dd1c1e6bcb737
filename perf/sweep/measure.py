"""Clocks and counters: time per call, memory, launches, FLOPs, copy bandwidth."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from perf.rows.cases import Mode
from perf.static.saved import MEBI

Step = Callable[[], object]

WARMUP_MS = 25.0
# Larger than the last-level cache of the CPUs and GPUs at hand, so that a copy goes to memory.
COPY_BYTES = {"cpu": 256 * MEBI, "cuda": 1024 * MEBI}
COPY_SECONDS = 0.5
FORWARD_PASSES: dict[Mode, int] = {"infer": 1, "train": 3, "bwd": 2}


class StepError(Exception):
    """A step that failed while it was timed, by name, and why."""

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name
        self.cause = cause


def sample(step: Step, device: torch.device, seconds: float) -> list[float]:
    """Calls ``step`` for about ``seconds`` and returns milliseconds per call, one per block.

    On a GPU every call is a block, timed by events with a cold L2. On a CPU a block is as many
    calls as the clock needs, with the caches as the calls themselves leave them.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        times: list[float] = do_bench(step, warmup=WARMUP_MS, rep=1e3 * seconds, return_mode="all")
        return times
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return [1e3 * t for t in timer.blocked_autorange(min_run_time=seconds).times]


def interleaved(
    steps: Mapping[str, Step],
    context: Callable[[str], AbstractContextManager[object]],
    device: torch.device,
    seconds: float,
    rounds: int,
) -> dict[str, list[float]]:
    """Samples every step in turn, ``rounds`` times, so that a drifting clock favours none.

    Args:
        steps: what to call, by name.
        context: what to call it in, by name.
        device: where the steps run.
        seconds: time for each step, over all rounds.
        rounds: how often the turn goes round; every other round runs backwards.

    Raises:
        StepError: a step failed.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
            try:
                with context(name):
                    times[name] += sample(steps[name], device, seconds / rounds)
            except Exception as error:
                raise StepError(name, error) from error
    return times


@functools.cache
def copy_gbps(device: torch.device) -> float:
    """Returns the bandwidth of a large copy on ``device``, reading and writing counted."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = sample(lambda: target.copy_(source), device, COPY_SECONDS)
    median = torch.tensor(times).median().item()
    return 2 * source.numel() / median / 1e6


def peak_memory_mb(step: Step, device: torch.device) -> float | None:
    """Returns the most memory that one call holds on a GPU, its arguments included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / MEBI


def launches(step: Step, device: torch.device) -> int | None:
    """Returns how many kernels, copies and fills one call starts on a GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    return len([event for event in profiler.events() if event.device_type.name == "CUDA"])


def flops(module: nn.Module, inputs: tuple[Tensor, ...], mode: Mode) -> int:
    """Returns the FLOPs of the convolutions and matrix products, a multiply-add being two.

    The backward pass counts as two forward passes, one product for the gradient of each factor.
    It is not run for the count: FlopCounterMode takes the weights' gradient of a convolution in G
    groups for one in a single group, and is off by a factor of up to G.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    forward: int = counter.get_total_flops()
    return forward * FORWARD_PASSES[mode]
