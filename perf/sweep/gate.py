"""The correctness gate: a provider is compared with float64 before anybody times it.

The oracle is the baseline's module in float64, on parameters and inputs that were first rounded
to the case's dtype, so that an error is an error of the computation. The bounds are relative to
what plain PyTorch achieves in the case's dtype on the same data, in the worse of both layouts:

- Output, largest error over the largest value: at most 2 x plain's + 8 roundings + the walk. The
  largest of many errors varies by less than the factor 2, and 8 roundings leave room where plain
  happens to be exact. Plain adds in pairs; torch.compile on a CPU adds n terms one after the other,
  whose roundings walk sqrt(n) roundings of float32 far. What follows may magnify that, as a batch
  norm does of averages that hardly differ. So the walk is how far the float64 output moves when
  every plane of the inputs is off by so much, up or down, and sqrt(n) roundings at least. In a
  network, whose averages lie behind other layers, it is those.
- Gradients, each tensor's error in the 2-norm over its norm, or over the largest norm of all where
  its own is zero but for float64's rounding: at most 2 x plain's + 8 roundings + sqrt(n) roundings
  of float32 + the condition. A ReLU whose input lies within rounding of zero passes its gradient on
  in one correct run and not in another; one such element moves a gradient by far more than rounding
  does (1e-3 against 1e-6, measured on SKConv in float32). The condition is how far the float64
  gradients move when the inputs move by 4 x plain's relative output error, so that more ReLUs
  change sides than between two correct runs; without ReLUs it is a few roundings. It may miss the
  one ReLU that a correct provider hits, so a gradient beyond its bound is judged again on other
  inputs, at most twice; a fault is there on every draw, such a ReLU on few.

Through a whole network, in 16 bits or with few positions for a batch norm to average over, plain's
own gradients are mostly rounding. The bound in the row then shows how little was proved; the rows
of ops and layers prove the gradients. Float64 goes through a network with a part of the batch,
which the batch repeats (`workloads.judged`); an error that repeats with it goes unseen there, and
the rows of ops and layers are judged on the whole of theirs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perf.rows.schema import LAYOUTS, Case, Mode
from perf.sweep import workloads
from perf.sweep.providers import Call, Evaluation, evaluate, settings

ROUNDINGS = 8
CONDITION_STEP = 4
DRAWS = 3
# As a share of the largest gradient. Terms that cancel, as of a bias before a batch norm, leave
# 1e-16 of themselves each in float64 and 1e-7 in float32.
NO_GRADIENT = 1e-11


@dataclass(frozen=True)
class Verdict:
    """Errors of a provider beside what it was allowed; a gradient's where there is one."""

    out_err: float
    out_err_bound: float
    grad_err: float | None
    grad_err_bound: float | None

    @property
    def out_passed(self) -> bool:
        """Whether the output's error is within its bound; NaN is not, nor a bound without end."""
        return self.out_err <= self.out_err_bound < math.inf

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound."""
        if not self.out_passed:
            return False
        if self.grad_err is None or self.grad_err_bound is None:
            return True
        return self.grad_err <= self.grad_err_bound < math.inf

    @property
    def reason(self) -> str:
        """What went beyond its bound, in one line."""
        if not self.out_passed:
            return f"output off by {self.out_err:.1e} of its top, bound {self.out_err_bound:.1e}"
        return f"a gradient off by {self.grad_err:.1e} of its norm, bound {self.grad_err_bound:.1e}"


@dataclass(frozen=True)
class Oracle:
    """What the right answer is, and how well plain PyTorch meets it."""

    exact: Evaluation  # the float64 run
    floor: float  # what roundings may do to any result
    magnified: float  # what they may do to the output beyond that
    plain_out_err: float
    plain_grad_err: Mapping[str, float]
    condition: float  # how far the float64 gradients move with the inputs

    def judge(self, evaluation: Evaluation) -> Verdict:
        """Compares a provider's run with the oracle; of the gradients the worst one counts.

        The batch of the run repeats that of the oracle: so do its outputs, and its gradients are
        sums over the repetitions.
        """
        out = evaluation.out.view(-1, *self.exact.out.shape)
        out_err = output_error(out, self.exact.out)
        out_bound = 2 * self.plain_out_err + self.floor + self.magnified
        grads = {name: grad.double() / len(out) for name, grad in evaluation.grads.items()}
        errors = gradient_errors(grads, self.exact.grads)
        bounds = {
            name: 2 * err + self.floor + self.condition for name, err in self.plain_grad_err.items()
        }
        if not errors:
            return Verdict(out_err, out_bound, None, None)
        # max() alone would let a NaN slip by, which is worse than any number.
        worst = max(
            errors, key=lambda name: (math.isnan(errors[name]), errors[name] / bounds[name])
        )
        return Verdict(out_err, out_bound, errors[worst], bounds[worst])


def consult(
    make_module: Callable[[Case], nn.Module], case: Case, inputs: tuple[Tensor, ...], seed: int
) -> Oracle:
    """Runs plain PyTorch in the case's dtype and in float64, and returns the oracle.

    Args:
        make_module: builds plain PyTorch's module, placed as a case says, afresh every time.
        case: the `judged` case.
        inputs: its inputs.
        seed: draws the gradient that arrives, and the direction in which the inputs move.
    """

    def plain(case: Case, inputs: tuple[Tensor, ...], mode: Mode = case.mode) -> Evaluation:
        module = make_module(case).to(inputs[0].dtype)
        laid_out = tuple(workloads.laid_out(x, case) for x in inputs)
        call = Call(replace(case, mode=mode), module, module, laid_out, seed)
        with settings(call.case, benchmark=False):
            return evaluate(call, call)

    exact_inputs = tuple(x.double() for x in inputs)
    exact = plain(case, exact_inputs)
    roundoff = workloads.ROUNDOFF_OF[case.dtype]
    out_err, grad_err = 0.0, dict.fromkeys(exact.grads, 0.0)
    for layout in LAYOUTS:
        rough = plain(replace(case, layout=layout), inputs)
        out_err = max(out_err, output_error(rough.out, exact.out))
        for name, err in gradient_errors(rough.grads, exact.grads).items():
            grad_err[name] = max(grad_err[name], err)
    condition = 0.0
    if case.differentiates:
        near = plain(case, _moved(exact_inputs, CONDITION_STEP * max(out_err, roundoff), seed))
        condition = max(gradient_errors(near.grads, exact.grads).values())
    walk = math.sqrt(max(x.numel() // x.shape[1] for x in inputs)) * workloads.ROUNDOFF_OF["fp32"]
    magnified = 0.0
    if case.level not in ("model", "workload"):
        off = plain(case, _planes_off(exact_inputs, walk, seed), mode="infer")
        magnified = max(output_error(off.out, exact.out) - walk, 0.0)
    floor = ROUNDINGS * roundoff + walk
    return Oracle(exact, floor, magnified, out_err, grad_err, condition)


def output_error(out: Tensor, exact: Tensor) -> float:
    """Returns the largest error as a share of the largest exact value."""
    return ((out.double() - exact).abs().max() / exact.abs().max()).item()


def gradient_errors(grads: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns each gradient's error in the 2-norm as a share of the exact gradient's norm.

    A gradient that is zero, like that of a softmax over one branch or of a bias before a batch
    norm, has no relative error: the largest norm of all stands in for its own.
    """
    norms = {name: truth.norm().item() for name, truth in exact.items()}
    largest = max(norms.values(), default=0.0) or 1.0
    scales = {
        name: norm if norm > NO_GRADIENT * largest else largest for name, norm in norms.items()
    }
    return {
        name: (grads[name].double() - truth).norm().item() / scales[name]
        for name, truth in exact.items()
    }


def _moved(inputs: tuple[Tensor, ...], step: float, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(inputs[0].device).manual_seed(seed + 3)
    return tuple(
        x + step * x.std() * torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
        for x in inputs
    )


def _planes_off(inputs: tuple[Tensor, ...], share: float, seed: int) -> tuple[Tensor, ...]:
    """Returns the inputs with every plane [b, c] larger or smaller by ``share`` of itself."""
    generator = torch.Generator(inputs[0].device).manual_seed(seed + 4)
    return tuple(
        x + share * x * torch.randn(planes, generator=generator, device=x.device).sign()
        for x in inputs
        for planes in [(*x.shape[:2], *[1] * (x.dim() - 2))]
    )
