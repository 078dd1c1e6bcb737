"""The campaign: what to measure on a GPU that is there for minutes, in which order, for how long.

Every part is a command of its own process, so that a part that hangs or loses the device costs its
own time only. The time left is dealt out anew before each part, by the parts' estimates.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from perf.rows.cases import Level, Mode
from perf.sweep.presets import PRESETS, jobs
from perf.sweep.providers import PROVIDERS

PERF = (sys.executable, "-m", "perf")

# Seconds that a part gets at least.
LEAST = 30.0
# Seconds of a process before it measures, and of a case before its providers: the float64 check.
START = 15.0
CHECK: dict[Level, float] = {
    "pass": 0.6,
    "op": 2.0,
    "layer": 3.0,
    "family": 3.0,
    "model": 10.0,
    "workload": 3.0,
}
# Seconds that a provider takes to compile. Estimates for a dozen cores; nobody has measured them.
COMPILATION: dict[tuple[Level, Mode], float] = {
    ("op", "infer"): 6.0,
    ("op", "train"): 12.0,
    ("layer", "infer"): 8.0,
    ("layer", "train"): 16.0,
    ("model", "infer"): 45.0,
    ("model", "train"): 90.0,
}
# Seconds of a kernel's candidates at one size, compilation included; as little measured. Kernels by
# layouts, stages and batches.
TUNING, _TUNED = 6.0, 6 * 2 * 4 * 2


@dataclass(frozen=True)
class Part:
    """One command of the campaign.

    Attributes:
        name: in one word.
        what: it shows, in a line.
        command: to run, without what the campaign adds.
        seconds: estimated.
        rows: whether it appends to the report, as ``run`` does, and takes a budget.
        beside: what tells the name of the file that it appends to from the report's.
        environment: variables of its own.
    """

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float
    rows: bool = True
    beside: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def parts(which: Callable[[str], str | None] = shutil.which) -> tuple[Part, ...]:
    """Returns the parts in their order: right, then raw bandwidth, then against others.

    Args:
        which: finds a program; the sanitizer's part is there only where the sanitizer is.
    """
    sanitizer = which("compute-sanitizer")
    return (
        Part("environment", "device, driver, versions, commit", (*PERF, "env"), START, rows=False),
        _swept("copy", "copies at the sizes of the stages", "gpu-passes", "copy"),
        _swept("checks", "twenty chosen cases against float64", "gpu-checks"),
        *(_watched(sanitizer, tool) for tool in ("memcheck", "racecheck") if sanitizer),
        _swept(
            "passes",
            "every streaming kernel alone, at the four stages",
            "gpu-passes",
            *("moments", "fuse", "select", "sums", "dx"),
        ),
        _swept("section", "between the convolutions and V, against torch.compile", "gpu-section"),
        _swept("conv", "SKConv, against torch.compile and timm", "gpu-conv"),
        _swept("network", "SKNet-50, against timm's networks", "gpu-network"),
        _swept("small", "small batches, in CUDA graphs and without", "gpu-small"),
        Part(
            "tune",
            "launch configurations of every streaming kernel, against the heuristics'",
            (*PERF, "tune"),
            START + _TUNED * TUNING,
            beside="-tuned",
            environment={"TRITON_INTERPRET": "0"},
        ),
    )


def _watched(sanitizer: str, tool: str) -> Part:
    return Part(
        tool,
        "the twenty cases again, every access watched by the sanitizer",
        (sanitizer, "--tool", tool, "--error-exitcode", "1", *PERF, "check"),
        150.0,
        rows=False,
        # Between the blocks of PyTorch's cache an access beyond a tensor would go unseen.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def share(seconds: float, part: Part, rest: Sequence[Part]) -> float:
    """Returns the seconds of ``part`` when ``seconds`` are left for it and for ``rest``.

    They are in proportion to the estimates, but a part that is begun gets enough to end; 0 where
    that is not left. Parts that come first are worth more.
    """
    proportional = seconds * part.seconds / (part.seconds + sum(later.seconds for later in rest))
    return min(max(proportional, LEAST), seconds) if seconds >= LEAST else 0.0


def _swept(name: str, what: str, preset: str, *workloads: str) -> Part:
    chosen = ("--workload", *workloads) if workloads else ()
    command = (*PERF, "run", "--preset", preset, *chosen)
    return Part(name, what, command, START + _seconds(preset, workloads))


def _seconds(preset: str, workloads: tuple[str, ...]) -> float:
    """Estimates the cases of ``workloads`` in a preset, of all where none is named."""
    chosen = PRESETS[preset]
    total = 0.0
    for job in jobs(chosen.grids, seed=0):
        case = job.case
        if workloads and case.workload not in workloads:
            continue
        total += CHECK[case.level]
        for name in job.providers:
            total += 2 * chosen.seconds
            if PROVIDERS[name].compiles:
                total += COMPILATION[case.level, case.mode]
    return total
