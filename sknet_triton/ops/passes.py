"""The steps of `reference.passes` on Triton's launchers, and as operators for graphs.

`launchers` runs at once. `OPERATORS` is what torch.compile, exports, tracers, dispatch modes and
tensor subclasses see; where an operator's tensors have no kernels, it computes the formulas.
They are ``torch.library.custom_op``s rather than ``triton_op``s: a custom op is checked whole on a
machine without a GPU (opcheck, fake tensors, compile, under Triton's interpreter too), and Inductor
cannot relaunch its kernels with arguments of its own choosing. Any strides will do for them, which
`torch.Tag.flexible_layout` tells Inductor: it then adds no copies.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sknet_kernels.layout import empty_like_branch
from sknet_kernels.norms import Norms, common_dtype
from sknet_triton.backend import has_kernels
from sknet_triton.ops.namespace import NAMESPACE, refuse_forward_mode
from sknet_triton.reference.common import accumulation_dtype, no_autocast
from sknet_triton.reference.passes import REFERENCE, Passes


@functools.cache
def launchers() -> Passes:
    """Returns the steps on Triton's launchers, whose import a machine without kernels is spared."""
    from sknet_kernels import steps

    return Passes(
        steps.moments,
        steps.hidden,
        steps.logits,
        steps.out,
        steps.hidden_bwd,
        steps.channels_bwd,
        steps.dx,
    )


def _in_layout_of(x: Tensor, out: Tensor) -> Tensor:
    expected = empty_like_branch(x)
    return out if out.stride() == expected.stride() else expected.copy_(out)


def _formula_out(branches: Sequence[Tensor], logits: Tensor, norms: Norms) -> Tensor:
    return _in_layout_of(branches[0], REFERENCE.out(branches, logits, norms))


def _formula_dx(dout: Tensor, branches: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    dbranches = REFERENCE.dx(dout, branches, *rest)
    return [_in_layout_of(x, dx) for x, dx in zip(branches, dbranches, strict=True)]


# The formulas with the strides that the operators promise.
_FORMULAS = replace(REFERENCE, out=_formula_out, dx=_formula_dx)


@dataclass(frozen=True)
class _Operator:
    """One step as an operator.

    Attributes:
        step: its name in `Passes`; the operator's is ``sk_`` and this.
        schema: as torch.library writes it; NORMS stands for the five fields of a `Norms`.
        fake: takes what the step takes, returns tensors of the sizes and strides that it returns.
    """

    step: str
    schema: str
    fake: Callable[..., Any]


_NORMS = "Tensor?[] {0}mean, Tensor?[] {0}var, Tensor?[] {0}weight, Tensor?[] {0}bias, float {0}eps"


def _wide(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=accumulation_dtype(x.dtype))


def _empty_like(x: Tensor | None, gradient: Tensor) -> Tensor:
    if x is None:
        return gradient.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_moments(branches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    x = branches[0]
    sizes = (2, len(branches), x.shape[1])
    return _wide(x, *sizes), _wide(x, *sizes)


def _fake_hidden(
    branches: Sequence[Tensor], norms: Norms, fc1_weight: Tensor, fc1_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = branches[0]
    return _wide(x, *x.shape[:2]), _wide(x, x.shape[0], fc1_weight.shape[0])


def _fake_logits(
    hidden: Tensor, fc1_norm: Norms, fc2_weight: Tensor, fc2_bias: Tensor | None, M: int
) -> tuple[Tensor, Tensor, Tensor]:
    (B, d), C = hidden.shape, fc2_weight.shape[0] // M
    sizes = (2, d) if fc1_norm.mean[0] is None else (0,)
    return hidden.new_empty(B, M, C), hidden.new_empty(sizes), hidden.new_empty(sizes)


def _fake_out(branches: Sequence[Tensor], logits: Tensor, norms: Norms) -> Tensor:
    return empty_like_branch(branches[0])


def _fake_hidden_bwd(
    dout: Tensor, branches: Sequence[Tensor], logits: Tensor, norms: Norms, fc2_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, M, C = logits.shape
    d = fc2_weight.shape[1]
    return logits.new_empty(4, B, M, C), logits.new_empty(B, M, C), logits.new_empty(B, d)


def _fake_channels_bwd(
    sums: Tensor,
    dlogits: Tensor,
    dz: Tensor,
    logits: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    norms: Norms,
    fc1_norm: Norms,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    S: int,
    batch_stats: bool,
    fc1_batch_stats: bool,
) -> list[Tensor]:
    M, C = logits.shape[1:]
    return [
        torch.empty_like(pooled),
        sums.new_empty((2, M, C) if batch_stats else (0,)),
        sums.new_empty(M, C, dtype=common_dtype(norms.weight, sums)),
        sums.new_empty(M, C, dtype=common_dtype(norms.bias, sums)),
        *(
            _empty_like(x, sums)
            for x in (
                fc1_weight,
                fc1_bias,
                fc1_norm.weight[0],
                fc1_norm.bias[0],
                fc2_weight,
                fc2_bias,
            )
        ),
    ]


def _fake_dx(
    dout: Tensor,
    branches: Sequence[Tensor],
    logits: Tensor,
    norms: Norms,
    share: Tensor,
    drift: Tensor | None,
) -> list[Tensor]:
    return [empty_like_branch(x) for x in branches]


_OPERATORS = (
    _Operator("moments", "(Tensor[] branches) -> (Tensor, Tensor)", _fake_moments),
    _Operator(
        "hidden",
        "(Tensor[] branches, NORMS, Tensor fc1_weight, Tensor? fc1_bias) -> (Tensor, Tensor)",
        _fake_hidden,
    ),
    _Operator(
        "logits",
        "(Tensor hidden, FC1_NORM, Tensor fc2_weight, Tensor? fc2_bias, int M)"
        " -> (Tensor, Tensor, Tensor)",
        _fake_logits,
    ),
    _Operator("out", "(Tensor[] branches, Tensor logits, NORMS) -> Tensor", _fake_out),
    _Operator(
        "hidden_bwd",
        "(Tensor dout, Tensor[] branches, Tensor logits, NORMS, Tensor fc2_weight)"
        " -> (Tensor, Tensor, Tensor)",
        _fake_hidden_bwd,
    ),
    _Operator(
        "channels_bwd",
        "(Tensor sums, Tensor dlogits, Tensor dz, Tensor logits, Tensor pooled, Tensor hidden,"
        " NORMS, FC1_NORM, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight,"
        " Tensor? fc2_bias, int S, bool batch_stats, bool fc1_batch_stats) -> Tensor[]",
        _fake_channels_bwd,
    ),
    _Operator(
        "dx",
        "(Tensor dout, Tensor[] branches, Tensor logits, NORMS, Tensor share, Tensor? drift)"
        " -> Tensor[]",
        _fake_dx,
    ),
)


# An operator returns no None: a vector of nothing stands for it.


def _with_vectors(x: Tensor, results: Sequence[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(0) if r is None else r for r in results]


def _with_none(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results
    return [None if r.shape == (0,) else r for r in results]


def _next_norms(rest: Iterator[Any]) -> Norms:
    mean, var, weight, bias = (tuple(x) for x in islice(rest, 4))
    return Norms(mean, var, weight, bias, next(rest))


def _registered(operator: _Operator) -> Callable[..., Any]:
    """Registers the operator and returns a function that takes what its step takes."""
    names = re.findall(r"\w+(?=[,)])", operator.schema.split("->")[0])
    schema = operator.schema.replace("FC1_NORM", _NORMS.format("fc1_norm_"))
    schema = schema.replace("NORMS", _NORMS.format(""))
    name = f"sk_{operator.step}"

    def grouped(args: Sequence[Any]) -> list[Any]:
        rest = iter(args)
        return [_next_norms(rest) if "NORM" in n else next(rest) for n in names]

    def run(*args: Any) -> Any:
        refuse_forward_mode(name)
        arguments = grouped(args)
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        passes = launchers() if has_kernels(first) else _FORMULAS
        with no_autocast(first):
            results = getattr(passes, operator.step)(*arguments)
        if isinstance(results, Tensor):
            return results
        tensors = _with_vectors(first, results)
        return tensors if operator.schema.endswith("[]") else tuple(tensors)

    define = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        run,
        mutates_args=(),
        schema=schema,
        tags=(torch.Tag.flexible_layout,),
    )
    define.register_fake(lambda *args: operator.fake(*grouped(args)))

    def call(*args: Any) -> Any:
        flat: list[Any] = []
        for arg in args:
            flat.extend(arg if isinstance(arg, Norms) else (arg,))
        return _with_none(getattr(torch.ops.sknet_triton, name)(*flat))

    return call


OPERATORS = Passes(**{operator.step: _registered(operator) for operator in _OPERATORS})
