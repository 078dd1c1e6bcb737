"""fuse and select with batch norm inside, in the fewest passes: one function for autograd.

`fuse_select` takes arguments that fit: `functional.sk_fuse_select` checks them, and modules read
them off their children. The seven steps are PyTorch's formulas, Triton's launchers, or operators.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sknet_kernels.launch import planned
from sknet_kernels.layout import evenly, positions
from sknet_kernels.norms import ChannelGradients, Norms, Running
from sknet_triton import ops, reference
from sknet_triton.backend import in_transform, needs_plain_backward, takes_triton
from sknet_triton.checks import check_counts, check_limits
from sknet_triton.reference import REFERENCE
from sknet_triton.reference.common import accumulation_dtype, no_autocast, sum_over
from sknet_triton.reference.steps import Steps

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Way = Literal["composed", "formulas", "kernels"]


def way_of(x: Tensor) -> Way:
    """Tells how `fuse_select` on branches like ``x`` is carried out.

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


class Arguments(NamedTuple):
    """What `fuse_select` computes with; norms have running statistics, or None for the batch's."""

    branches: Sequence[Tensor]  # M of [B, C, *spatial]
    norms: Norms
    fc1_weight: Tensor  # [d, C], or [d, C, 1, 1] as a convolution has it
    fc1_bias: Tensor | None  # [d]
    fc1_norm: Norms
    fc2_weight: Tensor  # [M * C, d], or [M * C, d, 1, 1]
    fc2_bias: Tensor | None  # [M * C]

    @classmethod
    def of(cls, settings: "Settings", tensors: Sequence[Any]) -> "Arguments":
        """Takes them apart from the order of `end_to_end`."""
        M = settings.M
        branches, (fc1_weight, fc2_weight) = tuple(tensors[:M]), tensors[M : M + 2]
        four, rest = tuple(tensors[M + 2 : 5 * M + 2]), tensors[5 * M + 2 :]
        norms = Norms(four[:M], four[M : 2 * M], four[2 * M : 3 * M], four[3 * M :], settings.eps)
        fc1_bias, mean, var, weight, bias, fc2_bias = rest
        fc1_norm = Norms((mean,), (var,), (weight,), (bias,), settings.fc1_eps)
        if settings.by == "launchers":
            branches = tuple([evenly(x) for x in branches])
        return cls(branches, norms, fc1_weight, fc1_bias, fc1_norm, fc2_weight, fc2_bias)

    def end_to_end(self) -> Sequence[Tensor | None]:
        """Returns all tensors: branches, the two weights, then vectors, which are contiguous."""
        vectors = [*sum(self.norms[:4], ()), self.fc1_bias, *sum(self.fc1_norm[:4], ())]
        vectors.append(self.fc2_bias)
        if not all([x is None or x.is_contiguous() for x in vectors]):  # noqa: C419 - every call
            vectors = [x if x is None else x.contiguous() for x in vectors]  # as kernels read them
        tensors = (*self.branches, self.fc1_weight, self.fc2_weight, *vectors)
        return _distinct(tensors) if torch.compiler.is_dynamo_compiling() else tensors


def fuse_select(
    way: Way,
    arguments: Arguments,
    group: "ProcessGroup | None" = None,
    running: Running | None = None,
    fc1_running: Running | None = None,
) -> "Results":
    """Computes `functional.sk_fuse_select` in the fewest passes, of arguments that fit.

    Args:
        way: "kernels" takes Triton's, which have limits (see `check_limits`). "composed" knows no
            process group, where it is "formulas", and moves no running statistics.
        arguments: the tensors.
        group: the processes that statistics are taken over; None for this one alone.
        running: moved towards the statistics of the batch, where those are taken.
        fc1_running: likewise, of fc1's norm alone.

    Raises:
        TypeError: ``way`` is "kernels" and they have none for the dtype.
        ValueError: ``way`` is "kernels" and the branches outnumber what they take, or a batch has
            one value a channel where its statistics are taken.

    Returns:
        V; mean and unbiased variance of the branches [2, M, C] and of fc1's output [2, d], None
        where they were not taken, or served to move running ones.
    """
    branches = arguments.branches
    batch_stats = arguments.norms.mean[0] is None
    fc1_batch_stats = arguments.fc1_norm.mean[0] is None
    if group is None:
        check_counts(branches[0], batch_stats, fc1_batch_stats)
        if way == "composed":
            return reference.composed(*arguments)
    if way == "kernels":
        check_limits(branches)
    tensors = arguments.end_to_end()
    settings = Settings(
        len(branches),
        arguments.norms.eps,
        arguments.fc1_norm.eps,
        batch_stats,
        fc1_batch_stats,
        group,
        _by(way, tensors),
    )
    # Kernels keep their factors in float32.
    launches = settings.by == "launchers" and branches[0].dtype != torch.float64
    moved = (running, fc1_running) if launches and group is None else (None, None)
    results: Results
    if torch.is_grad_enabled():
        results = SKFuseSelect.apply(settings, moved, *tensors)  # type: ignore[no-untyped-call]  # torch's
    else:
        with no_autocast(branches[0]), _planned(settings, tensors, moved):
            results, _ = _forward(Arguments.of(settings, tensors), settings, moved)
    out, kept, fc1_kept = results
    if kept is None and fc1_kept is None:
        return results
    pairs = ((running, kept), (fc1_running, fc1_kept))
    left = [(r, batch) for r, batch in pairs if r is not None and batch is not None]
    if left:
        _move(left)
    return out, None if running else kept, None if fc1_running else fc1_kept


Results: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]

By: TypeAlias = Literal["reference", "operators", "launchers"]

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


def _by(way: Way, tensors: Sequence[Tensor | None]) -> By:
    """Names the implementation of the steps for ``way``."""
    if way != "kernels":
        return "reference"
    if not _watched(tensors):
        return "launchers"
    counts = not torch.compiler.is_compiling() and _counts_flops()
    return "reference" if counts else "operators"


def _watched(tensors: Sequence[Tensor | None]) -> bool:
    """Tells whether somebody makes a graph of what is called, or has a rule of his own for it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _counts_flops() -> bool:
    # It knows the formulas' products alone: registering what the operators count would import its
    # module, and with it triton.
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)


def _planned(
    settings: "Settings",
    tensors: Sequence[Any],
    moved: Sequence[Running | None] = (),
    dout: Tensor | None = None,
) -> AbstractContextManager[Any]:
    """Returns a context in which launchers run what they remember for such tensors."""
    if settings.by != "launchers":
        return nullcontext()
    # Vectors are contiguous, and as long as the matrices fc1_weight and fc2_weight say.
    read, vectors = tensors[: settings.M + 2], tensors[settings.M + 2 :]
    key = (
        settings,
        tuple([(t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in read]),
        tuple([None if t is None else (t.dtype, t.data_ptr() % 16) for t in vectors]),
        tuple([None if r is None else r.signature() for r in moved]),
        None if dout is None else (dout.dtype, dout.shape, dout.stride(), dout.data_ptr() % 16),
    )
    return planned(key, tensors[0].device)


class Settings(NamedTuple):
    """What `SKFuseSelect` takes beside tensors."""

    M: int
    eps: float
    fc1_eps: float
    batch_stats: bool  # whether the branches' norms take the statistics of the batch
    fc1_batch_stats: bool
    group: "ProcessGroup | None"  # the processes that they are taken over
    by: By

    @property
    def steps(self) -> Steps:
        """The implementation of the steps."""
        return ops.launchers() if self.by == "launchers" else _STEPS[self.by]


class Saved(NamedTuple):
    """What the backward needs beside the arguments; None where no statistics were taken."""

    stats: Tensor | None  # mean and biased variance of the branches [2, M, C]
    fc1_stats: Tensor | None  # those of fc1's output [2, d]
    pooled: Tensor  # s [B, C]
    hidden: Tensor  # fc1's output [B, d]
    logits: Tensor  # [B, M, C]
    counts: Tensor | None  # images, and values a channel, over the process group [2]


def _forward(
    a: Arguments, settings: Settings, moved: Sequence[Running | None]
) -> tuple[Results, Saved]:
    """Carries out everything between the convolutions and V: 2M + 1 passes, 3M + 1 in training."""
    steps, group = settings.steps, settings.group
    stats, kept, fc1_stats, fc1_kept, counts = None, None, None, None, None
    if group is not None:
        x = a.branches[0]
        own = [x.shape[0], x.shape[0] * positions(x)]
        counts = sum_over(group, x.new_tensor(own, dtype=accumulation_dtype(x.dtype)))
    if settings.batch_stats:
        stats, kept = steps.moments(a.branches, *filter(None, moved[:1]))
        if counts is not None and kept is not None:
            stats, kept = _joined(stats, own[1], counts[1], group)
    norms = _applied(a.norms, stats)
    pooled, hidden = steps.hidden(a.branches, norms, a.fc1_weight, a.fc1_bias)
    fc1_norm = a.fc1_norm
    if settings.fc1_batch_stats and counts is not None:
        var, mean = torch.var_mean(hidden, 0, correction=0)
        fc1_stats, fc1_kept = _joined(torch.stack([mean, var]), len(hidden), counts[0], group)
        fc1_norm = _applied(fc1_norm, fc1_stats)
    logits, *taken = steps.logits(
        hidden, fc1_norm, a.fc2_weight, a.fc2_bias, settings.M, *filter(None, moved[1:])
    )
    if fc1_norm.mean[0] is None:
        fc1_stats, fc1_kept = taken
    out = steps.out(a.branches, logits, norms)
    return (out, kept, fc1_kept), Saved(stats, fc1_stats, pooled, hidden, logits, counts)


def _backward(
    dout: Tensor, a: Arguments, saved: Saved, settings: Settings
) -> tuple[Sequence[Tensor], tuple[Tensor | None, ...]]:
    """Returns the gradients of the branches and, or None, of what follows them: 3M + 2 passes."""
    steps, S = settings.steps, positions(dout)
    if settings.by == "launchers":
        dout = evenly(dout)
    norms, fc1_norm = _applied(a.norms, saved.stats), _applied(a.fc1_norm, saved.fc1_stats)
    sums, dlogits, dz = steps.hidden_bwd(dout, a.branches, saved.logits, norms, a.fc2_weight)
    channels_bwd: Callable[..., ChannelGradients] = steps.channels_bwd
    if settings.group is not None:
        # The collectives cost more than the small operators around them.
        over = {"group": settings.group, "counts": saved.counts}
        channels_bwd = partial(REFERENCE.channels_bwd, **over)
    share, drift, gamma, beta, *rest = channels_bwd(
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
    dbranches = steps.dx(dout, a.branches, saved.logits, norms, share, drift)
    fc1_weight, fc1_bias, fc1_gamma, fc1_beta, fc2_weight, fc2_bias = rest
    nothing = (None,) * (2 * settings.M)
    weights, norms_wb = (fc1_weight, fc2_weight), (*gamma.unbind(), *beta.unbind())
    fc1 = (fc1_bias, None, None, fc1_gamma, fc1_beta)
    return dbranches, (*weights, *nothing, *norms_wb, *fc1, fc2_bias)


class SKFuseSelect(torch.autograd.Function):
    """fuse and select for autograd and torch.compile, on any `Steps`.

    Takes `Settings`, the running statistics that launchers move, and the tensors of `Arguments` end
    to end. Returns V, which alone has a gradient, and the statistics as running ones keep them,
    None where those were moved. Saved are the branches and small tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, moved: Sequence[Running | None], *tensors: Any
    ) -> Results:
        """Returns V and the statistics."""
        with no_autocast(tensors[0]), _planned(settings, tensors, moved):
            a = Arguments.of(settings, tensors)
            results, saved = _forward(a, settings, moved)
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
            return (None,) * (2 + len(tensors))
        with no_autocast(dout):
            if needs_plain_backward(dout):
                return None, None, *_differentiable_backward(dout, tensors, settings)
            with _planned(settings, tensors, dout=dout):
                dxs, small = _backward(dout, Arguments.of(settings, tensors), saved, settings)
                gradients = *dxs, *small
        needed = zip(gradients, ctx.needs_input_grad[2:], strict=True)
        return None, None, *[gradient if needs else None for gradient, needs in needed]


def _differentiable_backward(
    dout: Tensor, tensors: Sequence[Tensor | None], settings: Settings
) -> tuple[Tensor | None, ...]:
    """Returns gradients through PyTorch's own operators, which have every kind of derivative.

    Raises:
        RuntimeError: statistics are taken over a process group, whose sums have no derivative here.
    """
    if settings.group is not None:
        raise RuntimeError(
            "sk_fuse_select: statistics over a process group (SyncBatchNorm) have first "
            "derivatives in reverse mode only"
        )
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view for every argument: a tensor that is two of them has a gradient as each.
        tensors = [None if x is None else x.view_as(x) for x in tensors]
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        a = Arguments.of(settings._replace(by="reference"), tensors)
        out, *_ = reference.composed(*a)
    found = iter(torch.autograd.grad(out, wanted, dout, create_graph=create_graph))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in tensors)


def _applied(norms: Norms, stats: Tensor | None) -> Norms:
    """Returns ``norms`` with the statistics [2, n, C] of the batch, where there are any."""
    if stats is None:
        return norms
    rows = (stats if stats.dim() == 2 else stats.flatten(0, 1)).unbind()
    n = len(rows) // 2
    return Norms(rows[:n], rows[n:], norms.weight, norms.bias, norms.eps)


def _joined(
    stats: Tensor, count: int, total: Tensor, group: "ProcessGroup | None"
) -> tuple[Tensor, Tensor]:
    """Joins moments of ``count`` values with the group's; returns them, and with unbiased ones."""
    weight = count / total
    # A process without an image has moments of nothing, NaN, that count for nothing.
    mean, var = stats.masked_fill(weight == 0, 0)
    joined = sum_over(group, mean * weight)
    spread = sum_over(group, (var + (mean - joined).square()) * weight)
    return torch.stack([joined, spread]), torch.stack([joined, spread * (total / (total - 1))])


def _move(groups: Sequence[tuple[Running, Tensor]]) -> None:
    """Moves running statistics towards the batch's beside them, [2, n, C] or of one norm [2, C].

    As ``nn.BatchNorm2d`` in training does; the batch's mean and variance are overwritten.
    """
    moved: list[Tensor] = []
    batch: list[Tensor] = []
    weights: list[float] = []
    for running, kept in groups:
        moved += [*running.mean, *running.var]
        batch += kept.flatten(0, -2).unbind()
        weights += [1 - running.momentum] * (2 * len(running.mean))
    taken = [kept for _, kept in groups]
    weights += [running.momentum for running, _ in groups]
    torch._foreach_add_([count for running, _ in groups for count in running.tracked], 1)
    torch._foreach_mul_(moved + taken, weights)
    torch._foreach_add_(moved, batch)
