"""A streaming kernel with a configuration of one's own: run, judged by float64, or modelled."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perf.static.aot import TARGETS, compile_launch
from perf.static.model import ceiling
from perf.static.specialisations import Setting, recorded, streaming_stage
from sknet_kernels.arguments import problem_of
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
    Stage,
    candidates,
)
from sknet_kernels.launch import Launch
from sknet_kernels.norms import Norms
from sknet_kernels.sk_fuse import sk_fuse_partials
from sknet_kernels.sk_fuse_mlp import sk_hidden, sk_hidden_bwd
from sknet_kernels.sk_fuse_select import sk_fuse_select_dx, sk_fuse_select_sums
from sknet_kernels.sk_moments import sk_moments
from sknet_kernels.sk_select import sk_select_bwd, sk_select_fwd
from sknet_triton.reference import steps

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
    fc2: Tensor
    share: Tensor
    drift: Tensor

    @classmethod
    def drawn(cls, setting: Setting) -> "Inputs":
        """Draws them for ``setting``, without memory where its device is "meta"."""
        (B, C, S), M, device = setting.shape, setting.M, setting.device
        d = max(32, C // _REDUCTION)

        def vectors(least: float, most: float) -> tuple[Tensor, ...]:
            return tuple(torch.empty(C, device=device).uniform_(least, most) for _ in range(M))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        return cls(
            # Away from zero, so that means have digits to be compared by.
            xs=tuple(x.normal_(0.5) for x in setting.branches()),
            dout=setting.branch().normal_(),
            logits=normal(B, M, C),
            norms=Norms(
                vectors(0.25, 0.75), vectors(0.5, 1.5), vectors(0.5, 1.5), vectors(-0.5, 0.5), 1e-5
            ),
            fc1=normal(d, C),
            fc2=normal(M * C, d),
            share=normal(B, C) / S,
            drift=normal(2, M, C) / S,
        )

    def double(self) -> "Inputs":
        """Returns the same in float64."""
        mean, var, weight, bias = (tuple(map(_double, row)) for row in self.norms[:4])
        return replace(
            self,
            xs=tuple(x.double() for x in self.xs),
            norms=Norms(mean, var, weight, bias, self.norms.eps),
            **{
                name: getattr(self, name).double()
                for name in ("dout", "logits", "fc1", "fc2", "share", "drift")
            },
        )


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


@dataclass(frozen=True)
class Trial:
    """A streaming kernel as `sk_fuse_select` uses it.

    Attributes:
        run: its step with a configuration, the launch that joins partial sums included.
        exact: the same by formulas.
    """

    run: Callable[[Inputs, LaunchConfig], tuple[Tensor, ...]]
    exact: Callable[[Inputs], tuple[Tensor, ...]]


def _moments(given: Inputs, config: LaunchConfig) -> tuple[Tensor, ...]:
    applied, kept = sk_moments(given.xs, config=config)
    assert kept is not None
    return applied, kept


def _fuse(given: Inputs, config: LaunchConfig) -> tuple[Tensor, ...]:
    partials = sk_fuse_partials(given.xs, given.norms, config=config)
    return sk_hidden(partials, given.dout.shape[2], given.fc1, None)


def _select(given: Inputs, config: LaunchConfig) -> tuple[Tensor, ...]:
    out = torch.empty_like(given.dout)
    sk_select_fwd(out, given.xs, given.logits, given.norms, config=config)
    return (out,)


def _select_bwd(given: Inputs, config: LaunchConfig) -> tuple[Tensor, ...]:
    dxs = tuple(torch.empty_like(x) for x in given.xs)
    return sk_select_bwd(dxs, given.dout, given.xs, given.logits, config=config), *dxs


def _sums(given: Inputs, config: LaunchConfig) -> tuple[Tensor, ...]:
    partials = sk_fuse_select_sums(given.dout, given.xs, given.norms, config=config)
    return sk_hidden_bwd(partials, given.logits, given.norms, given.fc2)


def _dx(given: Inputs, config: LaunchConfig) -> tuple[Tensor, ...]:
    dxs = tuple(torch.empty_like(x) for x in given.xs)
    small = (given.norms, given.logits, given.share, given.drift)
    sk_fuse_select_dx(dxs, given.dout, given.xs, *small, config=config)
    return dxs


def _select_bwd_exact(given: Inputs) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (given.logits, *given.xs)]
    attn = torch.softmax(leaves[0], dim=1)
    out = sum(attn[:, i, :, None] * x for i, x in enumerate(leaves[1:]))
    assert isinstance(out, Tensor)
    return torch.autograd.grad(out, leaves, given.dout)


TRIALS = {
    MOMENTS: Trial(_moments, lambda given: steps.moments(given.xs)),
    FUSE: Trial(_fuse, lambda given: steps.hidden(given.xs, given.norms, given.fc1, None)),
    SELECT: Trial(_select, lambda given: (steps.out(given.xs, given.logits, given.norms),)),
    SELECT_BWD: Trial(_select_bwd, _select_bwd_exact),
    SUMS: Trial(
        _sums,
        lambda given: steps.hidden_bwd(given.dout, given.xs, given.logits, given.norms, given.fc2),
    ),
    DX: Trial(
        _dx,
        lambda given: tuple(
            steps.dx(given.dout, given.xs, given.logits, given.norms, given.share, given.drift)
        ),
    ),
}


@dataclass(frozen=True)
class Subject:
    """A streaming kernel on branches of one setting."""

    stage: Stage
    setting: Setting

    @property
    def problem(self) -> Problem:
        """What its configuration depends on."""
        branches = replace(self.setting, device="meta").branches()
        return problem_of(branches, self.setting.M)

    @property
    def label(self) -> str:
        """The subject in one short line."""
        given = self.setting
        B, C, S = given.shape
        dtype = str(given.dtype).removeprefix("torch.")
        return f"{self.stage.name} {given.layout} {dtype} M={given.M} [{B}, {C}, {S}]"

    @property
    def bytes_moved(self) -> int:
        """Bytes of full size that one run reads and writes."""
        given = self.setting
        return self.stage.passes(given.M) * math.prod(given.shape) * given.dtype.itemsize

    def launch(self, config: LaunchConfig, facts: DeviceFacts) -> Launch:
        """Returns the kernel's launch with ``config``, on tensors without memory."""
        given = Inputs.drawn(replace(self.setting, device="meta"))
        with recorded(facts) as launches:
            TRIALS[self.stage].run(given, config)
        return next(launch for launch in launches if streaming_stage(launch) is self.stage)


def modelled(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yields the candidates as an H100 would have them, by their modelled ceiling, best first."""
    target = _MODELLED
    rows: list[dict[str, Any]] = []
    for config in candidates(subject.stage, subject.problem, target.facts):
        launch = subject.launch(config, target.facts)
        compiled = compile_launch(launch, target)
        used = compiled.resources
        found = ceiling(
            subject.setting,
            subject.stage,
            launch,
            compiled.sass,
            used.registers,
            used.shared_bytes,
        )
        spilled = used.spill_bytes + used.stack_bytes
        rows.append({**asdict(config), "spilled": spilled, **asdict(found), "heuristic": not rows})
    yield from sorted(rows, key=lambda row: row["tb_s"], reverse=True)
