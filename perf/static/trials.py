"""A kernel with a configuration of one's own: run, judged by float64, or modelled."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from perf.static.aot import TARGETS, compile_launch
from perf.static.model import ceiling, reading
from perf.static.specialisations import Setting, kernel_name, recorded
from sknet_kernels import arguments, tuned
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
from sknet_kernels.launch import Launch
from sknet_kernels.norms import Norms
from sknet_kernels.sk_fuse import sk_fuse_fwd, sk_fuse_partials
from sknet_kernels.sk_fuse_mlp import sk_channels_bwd, sk_hidden, sk_hidden_bwd, sk_logits
from sknet_kernels.sk_fuse_select import sk_fuse_select_dx, sk_fuse_select_sums
from sknet_kernels.sk_moments import sk_moments
from sknet_kernels.sk_select import sk_select_bwd, sk_select_fwd
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
from sknet_triton import reference
from sknet_triton.reference import steps

AnyKernel = StreamingKernel | SmallKernel
AnyConfig = LaunchConfig | SmallConfig

_REDUCTION = 16
_MODELLED = next(target for target in TARGETS if target.name == "sm_90")


@dataclass(frozen=True)
class Inputs:
    """What the steps of `sk_fuse_select` read: branches and dout [B, C, S], the rest as there."""

    xs: tuple[Tensor, ...]
    dout: Tensor
    logits: Tensor
    norms: Norms
    fc1: Tensor
    fc1_norm: Norms
    fc2: Tensor
    pooled: Tensor
    hidden: Tensor
    sums: Tensor
    dlogits: Tensor
    dz: Tensor
    share: Tensor
    drift: Tensor

    @classmethod
    def drawn(cls, setting: Setting) -> "Inputs":
        """Draws them for ``setting``, without memory where its device is "meta"."""
        (B, C, S), M, device = setting.shape, setting.M, setting.device
        d = max(32, C // _REDUCTION)

        def norms(count: int, size: int) -> Norms:
            def vectors(least: float, most: float) -> tuple[Tensor, ...]:
                drawn = (torch.empty(size, device=device) for _ in range(count))
                return tuple(x.uniform_(least, most) for x in drawn)

            return Norms(
                vectors(0.25, 0.75), vectors(0.5, 1.5), vectors(0.5, 1.5), vectors(-0.5, 0.5), 1e-5
            )

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        return cls(
            # Away from zero, so that means have digits to be compared by.
            xs=tuple(x.normal_(0.5) for x in setting.branches()),
            dout=setting.branch().normal_(),
            logits=normal(B, M, C),
            norms=norms(M, C),
            fc1=normal(d, C),
            fc1_norm=norms(1, d),
            fc2=normal(M * C, d),
            pooled=normal(B, C),
            hidden=normal(B, d),
            sums=normal(4, B, M, C),
            dlogits=normal(B, M, C),
            dz=normal(B, d),
            share=normal(B, C) / S,
            drift=normal(2, M, C) / S,
        )

    def double(self) -> "Inputs":
        """Returns the same in float64."""

        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) else x

        return Inputs(**{f.name: tree_map(wide, getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Trial:
    """A kernel as `sk_fuse_select` uses it, in its step: the pass, and what joins its partial sums.

    Attributes:
        run: the step, or a small kernel alone where it joins no pass.
        exact: the same by formulas.
        option: the argument of ``run`` that takes the kernel's configuration.
    """

    run: Callable[..., tuple[Tensor, ...]]
    exact: Callable[[Inputs], tuple[Tensor, ...]]
    option: str = "config"


def _moments(given: Inputs, **configs: Any) -> tuple[Tensor, ...]:
    applied, kept = sk_moments(given.xs, **configs)
    assert kept is not None
    return applied, kept


def _hidden(
    given: Inputs, config: LaunchConfig | None = None, small: SmallConfig | None = None
) -> tuple[Tensor, ...]:
    partials = sk_fuse_partials(given.xs, given.norms, config=config)
    return sk_hidden(partials, given.dout.shape[2], given.fc1, None, config=small)


def _fuse(given: Inputs, **configs: Any) -> tuple[Tensor, ...]:
    return (sk_fuse_fwd(given.xs, **configs),)


def _logits(given: Inputs, config: SmallConfig | None = None) -> tuple[Tensor, ...]:
    M = len(given.xs)
    return _present(sk_logits(given.hidden, _of_batch(given), given.fc2, None, M, config=config))


def _logits_exact(given: Inputs) -> tuple[Tensor, ...]:
    M = len(given.xs)
    return _present(steps.logits(given.hidden, _of_batch(given), given.fc2, None, M))


def _of_batch(given: Inputs) -> Norms:
    """fc1's norm with the statistics of the batch."""
    return given.fc1_norm._replace(mean=(None,), var=(None,))


def _select(given: Inputs, config: LaunchConfig | None = None) -> tuple[Tensor, ...]:
    out = torch.empty_like(given.dout)
    sk_select_fwd(out, given.xs, given.logits, given.norms, config=config)
    return (out,)


def _select_bwd(given: Inputs, **configs: Any) -> tuple[Tensor, ...]:
    dxs = tuple(torch.empty_like(x) for x in given.xs)
    return sk_select_bwd(dxs, given.dout, given.xs, given.logits, **configs), *dxs


def _select_bwd_exact(given: Inputs) -> tuple[Tensor, ...]:
    dxs, dlogits = reference.sk_select_bwd(given.dout, given.xs, given.logits)
    return dlogits, *dxs


def _hidden_bwd(
    given: Inputs, config: LaunchConfig | None = None, small: SmallConfig | None = None
) -> tuple[Tensor, ...]:
    partials = sk_fuse_select_sums(given.dout, given.xs, given.norms, config=config)
    return sk_hidden_bwd(partials, given.logits, given.norms, given.fc2, config=small)


def _channels_bwd(given: Inputs, config: SmallConfig | None = None) -> tuple[Tensor, ...]:
    return _present(sk_channels_bwd(*_small_tensors(given), config=config))


def _small_tensors(given: Inputs) -> tuple[Any, ...]:
    """What `sk_channels_bwd` takes, with the batch's statistics everywhere."""
    small = (given.sums, given.dlogits, given.dz, given.logits, given.pooled, given.hidden)
    weights = (given.fc1, None, given.fc2, None)
    return (*small, given.norms, given.fc1_norm, *weights, given.dout.shape[2], True, True)


def _dx(given: Inputs, config: LaunchConfig | None = None) -> tuple[Tensor, ...]:
    dxs = tuple(torch.empty_like(x) for x in given.xs)
    small = (given.norms, given.logits, given.share, given.drift)
    sk_fuse_select_dx(dxs, given.dout, given.xs, *small, config=config)
    return dxs


def _present(results: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in results if x is not None)


_MOMENTS = Trial(_moments, lambda given: steps.moments(given.xs))
_HIDDEN = Trial(_hidden, lambda given: steps.hidden(given.xs, given.norms, given.fc1, None))
_SELECT_BWD = Trial(_select_bwd, _select_bwd_exact)
_HIDDEN_BWD = Trial(
    _hidden_bwd,
    lambda given: steps.hidden_bwd(given.dout, given.xs, given.logits, given.norms, given.fc2),
)
TRIALS: dict[AnyKernel, Trial] = {
    MOMENTS: _MOMENTS,
    FUSE: _HIDDEN,
    SELECT: Trial(_select, lambda given: (steps.out(given.xs, given.logits, given.norms),)),
    SELECT_BWD: _SELECT_BWD,
    SUMS: _HIDDEN_BWD,
    DX: Trial(
        _dx,
        lambda given: tuple(
            steps.dx(given.dout, given.xs, given.logits, given.norms, given.share, given.drift)
        ),
    ),
    MOMENTS_FINISH: replace(_MOMENTS, option="finish"),
    HIDDEN: replace(_HIDDEN, option="small"),
    LOGITS: Trial(_logits, _logits_exact),
    HIDDEN_BWD: replace(_HIDDEN_BWD, option="small"),
    CHANNELS_BWD: Trial(
        _channels_bwd, lambda given: _present(steps.channels_bwd(*_small_tensors(given)))
    ),
    FUSE_COMBINE: Trial(_fuse, lambda given: (reference.sk_fuse(given.xs),), option="combine"),
    SELECT_BWD_COMBINE: replace(_SELECT_BWD, option="combine"),
}


@dataclass(frozen=True)
class Subject:
    """A kernel on branches of one setting."""

    kernel: AnyKernel
    setting: Setting

    def run(self, given: Inputs, config: AnyConfig | None) -> tuple[Tensor, ...]:
        """Runs the kernel's step, the kernel with ``config``."""
        trial = TRIALS[self.kernel]
        return trial.run(given, **{trial.option: config})

    def problem(self, facts: DeviceFacts) -> Problem | SmallProblem:
        """Returns what its launcher chooses a configuration by, on a device of ``facts``."""
        asked: list[Problem | SmallProblem] = []

        def choice(kernel: AnyKernel, problem: Any, device: DeviceFacts) -> Any:
            if kernel is self.kernel:
                asked.append(problem)
            return tuned.choice(kernel, problem, device)

        with mock.patch.object(arguments, "choice", choice):
            self.launch(None, facts)
        return asked[0]

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

    def launch(self, config: AnyConfig | None, facts: DeviceFacts) -> Launch:
        """Returns the kernel's launch with ``config``, on tensors without memory."""
        given = Inputs.drawn(replace(self.setting, device="meta"))
        with recorded(facts) as launches:
            self.run(given, config)
        return next(launch for launch in launches if kernel_name(launch) == self.kernel.name)


def modelled(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yields the candidates as an H100 would have them, in their modelled order, best first.

    Streaming kernels are ordered by their ceiling, small ones by what is read.
    """
    target, kernel = _MODELLED, subject.kernel
    problem: Any = subject.problem(target.facts)
    rows: list[dict[str, Any]] = []
    config: Any
    for config in kernel.candidates(problem, target.facts):
        launch = subject.launch(config, target.facts)
        compiled = compile_launch(launch, target)
        used = compiled.resources
        if isinstance(kernel, StreamingKernel):
            found: Any = ceiling(
                subject.setting,
                kernel,
                launch,
                compiled.sass,
                used.registers,
                used.shared_bytes,
            )
            worse = -found.tb_s
        else:
            found = reading(kernel, problem, config, used.registers, used.shared_bytes)
            worse = found.read_kb
        spilled = used.spill_bytes + used.stack_bytes
        row = {**asdict(config), "spilled": spilled, **asdict(found), "heuristic": not rows}
        rows.append({"worse": worse, **row})
    for row in sorted(rows, key=lambda row: row["worse"]):
        del row["worse"]
        yield row
