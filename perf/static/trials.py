"""A kernel with a configuration of one's own: run, judged by float64, or modelled."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from perf.static.aot import MODELLED, TARGETS, compile_launch
from perf.static.model import ceiling, reading
from perf.static.specialisations import (
    FORMULAS,
    LAUNCHERS,
    Setting,
    carried_out,
    chosen,
    inputs,
    kernel_name,
    recorded,
)
from sknet_kernels import launch as launching
from sknet_kernels.config import (
    DX,
    FUSE,
    MOMENTS,
    SELECT,
    SELECT_BWD,
    SUMS,
    DeviceFacts,
    LaunchConfig,
    Problem,
    StreamingKernel,
)
from sknet_kernels.launch import Launch, planned
from sknet_kernels.small import (
    CHANNELS_BWD,
    FUSE_COMBINE,
    HIDDEN,
    HIDDEN_BWD,
    LOGITS,
    MOMENTS_FINISH,
    SELECT_BWD_COMBINE,
    SmallConfig,
    SmallKernel,
    SmallProblem,
)

Given = Mapping[str, Any]
AnyKernel = StreamingKernel | SmallKernel
AnyConfig = LaunchConfig | SmallConfig


# Of a kernel the step, or the stage by itself, that its pass and the joining of sums belong to.
STEP_OF: dict[AnyKernel, str] = {
    MOMENTS: "moments",
    FUSE: "hidden",
    SELECT: "out",
    SELECT_BWD: "sk_select_bwd",
    SUMS: "hidden_bwd",
    DX: "dx",
    MOMENTS_FINISH: "moments",
    HIDDEN: "hidden",
    LOGITS: "logits",
    HIDDEN_BWD: "hidden_bwd",
    CHANNELS_BWD: "channels_bwd",
    FUSE_COMBINE: "sk_fuse",
    SELECT_BWD_COMBINE: "sk_select_bwd",
}


@dataclass(frozen=True)
class Subject:
    """A kernel on branches of one setting, in its step; what is given are `inputs`."""

    kernel: AnyKernel
    setting: Setting

    def run(self, given: Given, config: AnyConfig | None) -> list[Tensor]:
        """Returns the results of the step by launchers, the kernel launched with ``config``."""
        with chosen({self.kernel: config}):
            return self._results(LAUNCHERS, given)

    def exact(self, given: Given) -> list[Tensor]:
        """Returns the same by formulas in float64."""
        return self._results(FORMULAS, tree_map_only(Tensor, Tensor.double, given))

    def _results(self, steps: Any, given: Given) -> list[Tensor]:
        results = carried_out(steps, STEP_OF[self.kernel], given)
        return [x for x in tree_leaves(results) if isinstance(x, Tensor)]

    def prepared(self, given: Given, config: AnyConfig) -> Callable[[], object]:
        """Returns what runs the step like that again, its launches remembered."""
        key = object()

        def call() -> object:
            with planned(key, torch.device(self.setting.device)):
                return carried_out(LAUNCHERS, STEP_OF[self.kernel], given)

        with chosen({self.kernel: config}):
            call()
            plans = launching._PLANS
        launching._PLANS.update(plans)
        return call

    def problem(self, facts: DeviceFacts) -> Problem | SmallProblem:
        """Returns what its launcher chooses a configuration by, on a device of ``facts``."""
        problem: Problem | SmallProblem = self._launched(None, facts)[1]
        return problem

    def launch(self, config: AnyConfig | None, facts: DeviceFacts) -> Launch:
        """Returns the kernel's launch with ``config``, on tensors without memory."""
        return self._launched(config, facts)[0]

    def _launched(self, config: AnyConfig | None, facts: DeviceFacts) -> tuple[Launch, Any]:
        given = inputs(replace(self.setting, device="meta"))
        with recorded(facts) as launches, chosen({self.kernel: config}) as asked:
            self._results(LAUNCHERS, given)
        launch = next(each for each in launches if kernel_name(each) == self.kernel.name)
        return launch, asked[self.kernel]

    @property
    def label(self) -> str:
        """The subject in one short line."""
        given = self.setting
        B, C, S = given.shape
        dtype = str(given.dtype).removeprefix("torch.")
        return f"{self.kernel.name} {given.layout} {dtype} M={given.M} [{B}, {C}, {S}]"

    @property
    def bytes_moved(self) -> int:
        """Bytes of full size that one run of the kernel alone reads and writes."""
        given, kernel = self.setting, self.kernel
        passes = kernel.passes(given.M) if isinstance(kernel, StreamingKernel) else 0
        return passes * math.prod(given.shape) * given.dtype.itemsize


def modelled(subject: Subject) -> list[dict[str, Any]]:
    """Returns the candidates as an H100 would have them, in their modelled order, best first.

    Streaming kernels are ordered by their ceiling, small ones by what is read.
    """
    target, kernel = TARGETS[MODELLED], subject.kernel
    problem: Any = subject.problem(target.facts)
    rows: list[dict[str, Any]] = []
    config: Any
    for config in kernel.candidates(problem, target.facts):
        launch = subject.launch(config, target.facts)
        compiled = compile_launch(launch, target)
        found: Any
        if isinstance(kernel, StreamingKernel):
            found = ceiling(subject.setting, kernel, launch, compiled)
        else:
            found = reading(kernel, problem, config, compiled)
        spilled = compiled.resources.spill_bytes + compiled.resources.stack_bytes
        row = {**asdict(config), "spilled": spilled, **asdict(found), "heuristic": not rows}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["tb_s"] if "tb_s" in row else row["read_kb"])
