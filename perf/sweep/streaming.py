"""Passes alone: each kernel that streams branches as it is launched, and a copy beside them.

A pass reads or writes branch tensors once. What its kernel computes is judged by a training step of
`sk_fuse_select` at the same sizes, in the same process.
"""

import functools
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from perf.rows.schema import Case, Result
from perf.sweep import contest, measure
from perf.sweep.contest import Conditions
from perf.sweep.providers import BASELINE, PROVIDERS, Provider
from perf.sweep.workloads import DTYPE_OF, KERNEL_OF, make_case

OURS = "ours-triton-eager"
LAYOUT_OF = {"nchw": "contiguous", "channels_last": "channels_last"}


def measure_pass(
    case: Case, providers: tuple[Provider, ...], conditions: Conditions
) -> dict[str, Result]:
    """Carries the pass of ``case`` out by the one provider that has it.

    Raises:
        DeviceLostError: the device does not answer any more; the case has no results.
    """
    return {provider.name: _result(case, provider, conditions) for provider in providers}


def _result(case: Case, provider: Provider, conditions: Conditions) -> Result:
    reason = _unsupported(case, provider, conditions.device)
    if reason:
        return Result("unsupported", reason)
    try:
        if case.workload == "copy":
            return _timed(case, Result("ok"), conditions)
        judged = _judged(_whole(case), conditions)
        return _timed(case, judged, conditions) if judged.status == "ok" else judged
    except Exception as error:
        return contest.failure(error, conditions.device)


def _unsupported(case: Case, provider: Provider, device: torch.device) -> str | None:
    owner = BASELINE if case.workload == "copy" else OURS
    if provider.name != owner:
        return f"{case.workload} is a pass of {owner}"
    if case.mode != "infer" or case.dtype not in ("fp32", "bf16", "fp16"):
        return "a pass alone is mode infer in fp32, bf16 or fp16"
    return provider.unavailable(case, device)


def _whole(case: Case) -> Case:
    return make_case(
        "sk_fuse_select",
        "train",
        dtype=case.dtype,
        layout=case.layout,
        M=case.M,
        batch=case.B,
        resolution=case.resolution,
        stage=case.stage,
    )


@functools.cache
def _judged(whole: Case, conditions: Conditions) -> Result:
    """Judges a training step once for all of its passes."""
    return contest.judge_case(whole, (PROVIDERS[OURS],), conditions)[OURS]


def _timed(case: Case, judged: Result, conditions: Conditions) -> Result:
    run, needed = pass_of(case, conditions.device)
    with torch.no_grad():
        times = measure.interleaved(
            {case.workload: run},
            lambda name: nullcontext(),
            conditions.device,
            conditions.seconds,
            conditions.rounds,
        )[case.workload]
    return contest.streamed(contest.timed(judged, times), needed, conditions.device)


def pass_of(case: Case, device: torch.device) -> tuple[measure.Run, int]:
    """Returns what carries the pass out on new tensors, and the bytes that it reads and writes."""
    shape, dtype = (case.B, case.C, case.H * case.W), DTYPE_OF[case.dtype]
    kernel = KERNEL_OF[case.workload]
    if kernel is None:
        source = torch.ones(shape, dtype=dtype, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * source.nbytes
    # Here, since it imports triton, which only a kernel needs.
    from perf.static.specialisations import Setting, streaming_launch

    setting = Setting(case.M, LAYOUT_OF[case.layout], dtype, shape, device)
    launch = streaming_launch(setting, kernel)
    tensors = [x for x in tree_leaves(dict(launch.arguments)) if isinstance(x, Tensor)]
    for x in tensors:
        x.uniform_(0.5, 1.5)
    branches = [x for x in tensors if x.shape == shape]
    return launch.run, sum(x.nbytes for x in branches)
