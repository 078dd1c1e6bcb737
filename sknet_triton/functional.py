"""The two stages as functions: they check their arguments and choose the implementation.

Branches come as a list or tuple of M tensors [B, C, *spatial] with 1, 2 or 3 spatial axes, or as
one stacked tensor with ``branch_dim`` naming the axis of length M. A list is never stacked, and a
stacked tensor is only viewed. Any strides are right; contiguous and channels_last are fast. A
crop, whose rows do not lie evenly in memory, costs one copy of that branch on the Triton path.
torch.fx does not look into them: a graph that it traces calls them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sknet_kernels.config import MAX_BRANCHES
from sknet_kernels.launch import planned
from sknet_kernels.layout import as_bcs
from sknet_kernels.norms import Norms
from sknet_triton import ops, reference
from sknet_triton.backend import in_transform, needs_plain_backward, takes_triton
from sknet_triton.checks import check_counts, check_logits, check_section, checked_branches
from sknet_triton.reference.collectives import sum_over
from sknet_triton.reference.common import accumulation_dtype, no_autocast
from sknet_triton.reference.passes import REFERENCE, Passes, positions

Reduction = Literal["mean", "sum"]
Activation = Literal["softmax", "sigmoid"]


@torch.fx.wrap
def sk_fuse(
    branches: Sequence[Tensor] | Tensor,
    *,
    reduction: Reduction = "mean",
    branch_dim: int | None = None,
) -> Tensor:
    """Averages the sum of the branches over space (Li et al. 2019, section 3.1, eqs. 1 and 2).

    Args:
        branches: M tensors [B, C, *spatial] of one shape, dtype and device, or one tensor that
            stacks them along ``branch_dim``. Floating point; sums are kept in float32, or in
            float64 for float64 input.
        reduction: ``"mean"`` over space, as published, or ``"sum"``, as in S2-MLPv2.
        branch_dim: the axis of length M where ``branches`` is one tensor.

    Returns:
        [B, C] in the dtype of the branches.

    Raises:
        TypeError: a branch is no tensor or not floating point, or ``branch_dim`` is missing or
            superfluous.
        ValueError: the branches are none, differ, have no spatial axis or too many of them, or
            outnumber what the Triton kernels take; or ``reduction`` is unknown.
    """
    xs = checked_branches(branches, branch_dim)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if _takes_triton(xs):
        pooled: Tensor = ops.sk_fuse(xs, reduction)
        return pooled
    return reference.sk_fuse(xs, reduction)


@torch.fx.wrap
def sk_select(
    branches: Sequence[Tensor] | Tensor,
    logits: Tensor,
    *,
    activation: Activation | None = "softmax",
    branch_dim: int | None = None,
) -> Tensor:
    """Weighs the branches by a softmax over them and adds (section 3.1, eqs. 5 and 6).

    Args:
        branches: as in `sk_fuse`.
        logits: [B, M, C], of any strides and any floating dtype.
        activation: makes weights of the logits: ``"softmax"`` over M, as published; ``"sigmoid"``
            of each, as ResNeSt at radix 1; None where ``logits`` are the weights.
        branch_dim: the axis of length M where ``branches`` is one tensor.

    Returns:
        [B, C, *spatial] in the dtype of the branches and in the first one's memory format,
        contiguous or channels_last; the Triton kernels keep any dense order of its axes.

    Raises:
        TypeError: as in `sk_fuse`, or ``logits`` is not a floating-point tensor.
        ValueError: as in `sk_fuse`, or ``logits`` has another shape or device, or ``activation``
            is unknown.
    """
    xs = checked_branches(branches, branch_dim)
    check_logits(logits, xs)
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation: expected 'softmax', 'sigmoid' or None, got {activation!r}")
    name = activation or "none"
    if _takes_triton(xs):
        out: Tensor = ops.sk_select(xs, logits, name)
        return out
    return reference.sk_select(xs, logits, name)


@dataclass(frozen=True)
class BatchNormArgs:
    """What `sk_fuse_select` needs of one batch norm over n channels.

    Attributes:
        weight: [n], or None for ones.
        bias: [n], or None for zeros.
        running_mean: [n]; needed where ``batch_stats`` is False.
        running_var: [n]; needed where ``batch_stats`` is False.
        eps: added to the variance.
        batch_stats: whether to normalise by the statistics of the batch, as in training.
        group: name of the process group whose joint batch is meant; empty for this process.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5
    batch_stats: bool = True
    group: str = ""


class FuseSelect(NamedTuple):
    """What `sk_fuse_select` returns.

    Attributes:
        out: V, [B, C, *spatial] in the dtype and layout of the first branch.
        mean: the batch's mean of every branch [M, C]; None where running statistics were taken.
        var: the unbiased variance, likewise, as ``running_var`` keeps it.
        fc1_mean: the batch's mean of fc1's output [d], or None.
        fc1_var: the unbiased variance, likewise.
    """

    out: Tensor
    mean: Tensor | None
    var: Tensor | None
    fc1_mean: Tensor | None
    fc1_var: Tensor | None


@torch.fx.wrap
def sk_fuse_select(
    branches: Sequence[Tensor] | Tensor,
    norms: Sequence[BatchNormArgs],
    fc1_weight: Tensor,
    fc1_norm: BatchNormArgs,
    fc2_weight: Tensor,
    *,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    branch_dim: int | None = None,
) -> FuseSelect:
    """Carries out everything between the branches' convolutions and V (section 3.1).

    u_i = ReLU(norm_i(branch_i)); s = average over space of their sum;
    z = ReLU(fc1_norm(fc1 s)); a = softmax over i of fc2 z; V = sum of a_i u_i. Training moves
    6M + 3 passes over a branch and saves the branches and small tensors; inference moves 2M + 1.
    The MLP is computed in float32 (float64 for float64 branches), under autocast too.

    Args:
        branches: as in `sk_fuse`: the convolutions' outputs, not normalised.
        norms: one a branch; they agree in eps, batch_stats and group.
        fc1_weight: [d, C].
        fc1_norm: of fc1's output.
        fc2_weight: [M * C, d], branch-major.
        fc1_bias: [d].
        fc2_bias: [M * C].
        branch_dim: as in `sk_fuse`.

    Raises:
        TypeError: as in `sk_fuse`.
        ValueError: as in `sk_fuse`; a shape does not fit; the norms disagree; running statistics
            are missing; or a batch has one value a channel where its statistics are taken.
    """
    xs = checked_branches(branches, branch_dim)
    check_section(xs, norms, fc1_weight, fc1_norm, fc2_weight)
    norm = norms[0]
    # The one group of the norms that take statistics, which the check has seen to.
    group = norm.group if norm.batch_stats else fc1_norm.group if fc1_norm.batch_stats else ""
    way = way_of(xs[0])
    if way == "composed" and not group:
        check_counts(xs[0], norm.batch_stats, fc1_norm.batch_stats)
        out, means, variances, fc1_mean, fc1_var = reference.composed(
            xs, norms, fc1_weight, fc1_bias, fc1_norm, fc2_weight, fc2_bias
        )
        mean = None if means is None else torch.stack(means)
        var = None if variances is None else torch.stack(variances)
        return FuseSelect(out, mean, var, fc1_mean, fc1_var)
    out, kept, fc1_kept = fused(
        way,
        xs,
        _norms(norms),
        fc1_weight,
        fc1_bias,
        _norms([fc1_norm]),
        fc2_weight,
        fc2_bias,
        norm.batch_stats,
        fc1_norm.batch_stats,
        group,
    )
    mean, var = (None, None) if kept is None else kept
    fc1_mean, fc1_var = (None, None) if fc1_kept is None else fc1_kept
    return FuseSelect(out, mean, var, fc1_mean, fc1_var)


Way = Literal["composed", "formulas", "kernels"]


def way_of(x: Tensor) -> Way:
    """Tells how the section on branches like ``x`` is carried out.

    "composed" is PyTorch's own operators, one after the other. It is where nothing fuses our
    formulas: in eager PyTorch, in torch.func's transforms, and in an exported program, whose
    readers know batch norms and nothing of autograd functions; and in torch.jit.trace, which knows
    no lists of optional tensors.
    """
    # The flag itself: torch 2.11's Dynamo takes is_exporting() for true in every graph.
    exports = torch.compiler._is_exporting_flag
    if takes_triton(x):
        exports_gradients = exports and torch.is_grad_enabled()
        traces = torch._C._get_tracing_state() is not None
        return "composed" if exports_gradients or traces else "kernels"
    fuses = torch.compiler.is_dynamo_compiling() and not exports
    return "formulas" if fuses and not in_transform() else "composed"


def fused(
    way: Way,
    branches: Sequence[Tensor],
    norms: Norms,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc1_norm: Norms,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    batch_stats: bool,
    fc1_batch_stats: bool,
    group: str,
) -> "Results":
    """Computes `sk_fuse_select` in the fewest passes, of arguments that fit.

    Args:
        way: "kernels" takes Triton's, which have limits (see `check_limits`).
        branches: M tensors [B, C, *spatial].
        norms: of the branches; with running statistics, or with None where the batch's are taken.
        fc1_weight: [d, C], or [d, C, 1, 1] as a convolution has it.
        fc1_bias: [d] or None.
        fc1_norm: one norm, likewise.
        fc2_weight: [M * C, d], or [M * C, d, 1, 1].
        fc2_bias: [M * C] or None.
        batch_stats: whether the branches' norms take the statistics of the batch.
        fc1_batch_stats: whether fc1's norm does.
        group: names the process group that they are taken over; empty for this process.

    Raises:
        TypeError: ``way`` is "kernels" and they have none for the dtype.
        ValueError: ``way`` is "kernels" and the branches outnumber what they take, or a batch has
            one value a channel where its statistics are taken.

    Returns:
        V; mean and unbiased variance of the branches [2, M, C] and of fc1's output [2, d], None
        where they were not taken. The caller may write into the statistics.
    """
    if not group:
        check_counts(branches[0], batch_stats, fc1_batch_stats)
    if way == "kernels":
        check_limits(branches)
    vectors = [*sum(norms[:4], ()), fc1_bias, *sum(fc1_norm[:4], ()), fc2_bias]
    if not all([x is None or x.is_contiguous() for x in vectors]):  # noqa: C419 - asked every call
        vectors = [x if x is None else x.contiguous() for x in vectors]  # as kernels read them
    tensors: Sequence[Tensor | None] = (*branches, fc1_weight, fc2_weight, *vectors)
    if torch.compiler.is_dynamo_compiling():
        tensors = _distinct(tensors)
    steps = "reference" if way != "kernels" else "operators" if _watched(tensors) else "launchers"
    if steps == "operators" and not torch.compiler.is_compiling() and _counts_flops():
        steps = "reference"
    settings = Settings(
        len(branches), norms.eps, fc1_norm.eps, batch_stats, fc1_batch_stats, group, steps
    )
    if torch.is_grad_enabled():
        # torch leaves Function.apply untyped.
        results: Results = SKFuseSelect.apply(settings, *tensors)  # type: ignore[no-untyped-call]
        return results
    with no_autocast(branches[0]), _planned(settings, tensors):
        (out, kept, fc1_kept), _ = _forward(Arguments.of(settings, tensors), settings)
    return _like(branches[0], out), kept, fc1_kept


Results: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]

_STEPS = {"reference": REFERENCE, "operators": ops.OPERATORS}
_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the tensors, those that come again as views: Dynamo takes no argument twice."""
    found: list[Tensor | None] = []
    for x in tensors:
        if x is not None and any(x is other for other in found):
            x = x.view_as(x)
        found.append(x)
    return found


def _watched(tensors: Sequence[Tensor | None]) -> bool:
    """Tells whether somebody makes a graph of what is called, or has a rule of his own for it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _counts_flops() -> bool:
    """Tells whether a FlopCounterMode is at work, which knows the formulas' products alone.

    Registering what the operators count would import its module, and with it triton.
    """
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)


def _planned(
    settings: "Settings", tensors: Sequence[Any], dout: Tensor | None = None
) -> AbstractContextManager[Any]:
    """Returns a context in which launchers run what they remember for such tensors."""
    if settings.steps != "launchers":
        return nullcontext()
    # Vectors are contiguous, and as long as the matrices fc1_weight and fc2_weight say.
    read, vectors = tensors[: settings.M + 2], tensors[settings.M + 2 :]
    key = (
        settings,
        tuple([(t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in read]),
        tuple([None if t is None else (t.dtype, t.data_ptr() % 16) for t in vectors]),
        None if dout is None else (dout.dtype, dout.shape, dout.stride(), dout.data_ptr() % 16),
    )
    return planned(key, tensors[0].device)


class Settings(NamedTuple):
    """What `SKFuseSelect` takes beside tensors; the fields are those of `fused`."""

    M: int
    eps: float
    fc1_eps: float
    batch_stats: bool
    fc1_batch_stats: bool
    group: str
    steps: str

    @property
    def passes(self) -> Passes:
        """The implementation of the steps."""
        return ops.launchers() if self.steps == "launchers" else _STEPS[self.steps]


class Arguments(NamedTuple):
    """The tensors of `fused`."""

    branches: Sequence[Tensor]
    norms: Norms
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc1_norm: Norms
    fc2_weight: Tensor
    fc2_bias: Tensor | None

    @classmethod
    def of(cls, settings: Settings, tensors: Sequence[Any]) -> "Arguments":
        """Takes them apart from the order in which `fused` lays them end to end."""
        M = settings.M
        branches, (fc1_weight, fc2_weight) = tuple(tensors[:M]), tensors[M : M + 2]
        four, rest = tuple(tensors[M + 2 : 5 * M + 2]), tensors[5 * M + 2 :]
        norms = Norms(four[:M], four[M : 2 * M], four[2 * M : 3 * M], four[3 * M :], settings.eps)
        fc1_bias, mean, var, weight, bias, fc2_bias = rest
        fc1_norm = Norms((mean,), (var,), (weight,), (bias,), settings.fc1_eps)
        if settings.steps == "launchers":  # one view each, rather than one a step
            branches = tuple([as_bcs(x) for x in branches])
        return cls(branches, norms, fc1_weight, fc1_bias, fc1_norm, fc2_weight, fc2_bias)


class Saved(NamedTuple):
    """What the backward needs beside the arguments: statistics, or None where none were taken.

    Attributes:
        stats: mean and biased variance of the branches [2, M, C].
        fc1_stats: of fc1's output [2, d].
        pooled: s [B, C].
        hidden: fc1's output [B, d].
        logits: [B, M, C].
        counts: images, and values a channel, over the process group [2].
    """

    stats: Tensor | None
    fc1_stats: Tensor | None
    pooled: Tensor
    hidden: Tensor
    logits: Tensor
    counts: Tensor | None


def _forward(a: Arguments, settings: Settings) -> tuple[Results, Saved]:
    """Carries out everything between the convolutions and V: 2M + 1 passes, 3M + 1 in training."""
    passes, group = settings.passes, settings.group
    stats, kept, fc1_stats, fc1_kept, counts = None, None, None, None, None
    if group:
        counts = _counts(a.branches[0], group)
    if settings.batch_stats:
        stats, kept = passes.moments(a.branches)
        if counts is not None:
            own = len(a.branches[0]) * positions(a.branches[0])
            stats, kept = _joined(stats, own, counts[1], group)
    norms = _applied(a.norms, stats)
    pooled, hidden = passes.hidden(a.branches, norms, a.fc1_weight, a.fc1_bias)
    fc1_norm = a.fc1_norm
    if settings.fc1_batch_stats and counts is not None:
        var, mean = torch.var_mean(hidden, 0, correction=0)
        fc1_stats, fc1_kept = _joined(torch.stack([mean, var]), len(hidden), counts[0], group)
        fc1_norm = _applied(fc1_norm, fc1_stats)
    elif settings.fc1_batch_stats:
        assert fc1_norm.mean[0] is None
    logits, *taken = passes.logits(hidden, fc1_norm, a.fc2_weight, a.fc2_bias, settings.M)
    if fc1_norm.mean[0] is None:
        fc1_stats, fc1_kept = taken
    out = passes.out(a.branches, logits, norms)
    return (out, kept, fc1_kept), Saved(stats, fc1_stats, pooled, hidden, logits, counts)


def _backward(
    dout: Tensor, a: Arguments, saved: Saved, settings: Settings
) -> tuple[Sequence[Tensor], tuple[Tensor | None, ...]]:
    """Carries out the backward in 3M + 2 passes.

    Returns:
        The gradients of the branches, and one or None for every other tensor of `fused`.
    """
    passes, S = settings.passes, positions(dout)
    if settings.steps == "launchers":
        dout = as_bcs(dout)
    norms, fc1_norm = _applied(a.norms, saved.stats), _applied(a.fc1_norm, saved.fc1_stats)
    sums, dlogits, dz = passes.hidden_bwd(dout, a.branches, saved.logits, norms, a.fc2_weight)
    arguments = (
        sums,
        dlogits,
        dz,
        saved.logits,
        saved.pooled,
        saved.hidden,
        norms,
        fc1_norm,
        a.fc1_weight,
        a.fc1_bias,
        a.fc2_weight,
        a.fc2_bias,
        S,
        settings.batch_stats,
        settings.fc1_batch_stats,
    )
    if settings.group:
        # The collectives cost more than the small operators around them.
        gradients = REFERENCE.channels_bwd(*arguments, settings.group, saved.counts)
    else:
        gradients = passes.channels_bwd(*arguments)
    share, drift, gamma, beta, *rest = gradients
    dbranches = passes.dx(dout, a.branches, saved.logits, norms, share, drift)
    fc1_weight, fc1_bias, fc1_gamma, fc1_beta, fc2_weight, fc2_bias = rest
    nothing = (None,) * (2 * settings.M)
    weights, norms_wb = (fc1_weight, fc2_weight), (*gamma.unbind(), *beta.unbind())
    fc1 = (fc1_bias, None, None, fc1_gamma, fc1_beta)
    return dbranches, (*weights, *nothing, *norms_wb, *fc1, fc2_bias)


class SKFuseSelect(torch.autograd.Function):
    """The section between the convolutions and V for autograd and torch.compile, on any `Passes`.

    Takes `Settings` and the tensors of `fused` end to end; returns what `fused` does, of which
    only V has a gradient. Saved are the branches and small tensors.
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Any) -> Results:
        """Returns V and the statistics."""
        with no_autocast(tensors[0]), _planned(settings, tensors):
            (out, kept, fc1_kept), saved = _forward(Arguments.of(settings, tensors), settings)
        results = _like(tensors[0], out), kept, fc1_kept
        ctx.settings = settings
        ctx.save_for_backward(*tensors, *saved)
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Returns a gradient for every tensor that `forward` took."""
        settings, tensors = ctx.settings, ctx.saved_tensors
        tensors, saved = tensors[: -len(Saved._fields)], Saved(*tensors[-len(Saved._fields) :])
        if dout is None:
            return (None,) * (1 + len(tensors))
        with no_autocast(dout):
            if needs_plain_backward(dout):
                return None, *_differentiable_backward(dout, tensors, settings)
            with _planned(settings, tensors, dout):
                dxs, small = _backward(dout, Arguments.of(settings, tensors), saved, settings)
                gradients = *map(_like, tensors, dxs), *small
        needed = zip(gradients, ctx.needs_input_grad[1:], strict=True)
        return None, *[gradient if needs else None for gradient, needs in needed]


def _like(x: Tensor, flat: Tensor) -> Tensor:
    """Returns [B, C, S], as launchers write it, in the shape of the branch ``x``."""
    return flat if flat.dim() == x.dim() else flat.view(x.shape)


def _differentiable_backward(
    dout: Tensor, tensors: Sequence[Tensor | None], settings: Settings
) -> tuple[Tensor | None, ...]:
    """Returns gradients through PyTorch's own operators, which have every kind of derivative.

    Raises:
        RuntimeError: statistics are taken over a process group, whose sums have no derivative here.
    """
    if settings.group:
        raise RuntimeError(
            "sk_fuse_select: statistics over a process group (SyncBatchNorm) have first "
            "derivatives in reverse mode only"
        )
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view for every argument: a tensor that is two of them has a gradient as each.
        tensors = [None if x is None else x.view_as(x) for x in tensors]
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        a = Arguments.of(settings._replace(steps="reference"), tensors)
        out = reference.composed(
            a.branches,
            _norm_args(a.norms, settings.batch_stats),
            a.fc1_weight.flatten(1),
            a.fc1_bias,
            _norm_args(a.fc1_norm, settings.fc1_batch_stats)[0],
            a.fc2_weight.flatten(1),
            a.fc2_bias,
        ).out
    found = iter(torch.autograd.grad(out, wanted, dout, create_graph=create_graph))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in tensors)


def _applied(norms: Norms, stats: Tensor | None) -> Norms:
    """Returns ``norms`` with the statistics [2, n, C] of the batch, where there are any."""
    if stats is None:
        return norms
    rows = stats.flatten(0, -2).unbind()
    n = len(rows) // 2
    return Norms(rows[:n], rows[n:], norms.weight, norms.bias, norms.eps)


def _counts(x: Tensor, group: str) -> Tensor:
    """Returns images, and values a channel, over the processes of ``group`` [2]."""
    own = [x.shape[0], x.shape[0] * positions(x)]
    return sum_over(group, x.new_tensor(own, dtype=accumulation_dtype(x.dtype)))


def _joined(stats: Tensor, count: int, total: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Joins mean and biased variance of ``count`` values with those of the group.

    Returns:
        Mean and biased variance, then mean and unbiased variance.
    """
    weight = count / total
    # A process without an image has moments of nothing, NaN, that count for nothing.
    mean, var = stats.masked_fill(weight == 0, 0)
    joined = sum_over(group, mean * weight)
    spread = sum_over(group, (var + (mean - joined).square()) * weight)
    return torch.stack([joined, spread]), torch.stack([joined, spread * (total / (total - 1))])


def _norms(norms: Sequence[BatchNormArgs]) -> Norms:
    return Norms(
        tuple(None if n.batch_stats else n.running_mean for n in norms),
        tuple(None if n.batch_stats else n.running_var for n in norms),
        tuple(n.weight for n in norms),
        tuple(n.bias for n in norms),
        norms[0].eps,
    )


def _norm_args(norms: Norms, batch_stats: bool) -> list[BatchNormArgs]:
    rows = zip(norms.weight, norms.bias, norms.mean, norms.var, strict=True)
    return [BatchNormArgs(*row, norms.eps, batch_stats) for row in rows]


def _takes_triton(xs: Sequence[Tensor]) -> bool:
    if not takes_triton(xs[0]):
        return False
    check_limits(xs)
    return True


def check_limits(xs: Sequence[Tensor]) -> None:
    """Checks what the Triton kernels ask of the branches beyond what `checked_branches` does.

    Raises:
        TypeError: they have no kernels for the dtype.
        ValueError: the branches outnumber what they take.
    """
    if len(xs) > MAX_BRANCHES:
        raise ValueError(
            f"branches: the triton backend takes at most {MAX_BRANCHES}, got {len(xs)}; "
            "use_backend('reference') takes any number"
        )
    if xs[0].dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            "branches: the triton backend takes float16, bfloat16, float32 and float64, "
            f"got {xs[0].dtype}"
        )
