"""The steps of `reference.steps` by Triton's launchers, and as operators for graphs.

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
from dataclasses import fields, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sknet_kernels.layout import empty_like_branch, evenly
from sknet_kernels.norms import Norms
from sknet_triton.backend import NAMESPACE, has_kernels, refuse_forward_mode
from sknet_triton.reference.common import no_autocast
from sknet_triton.reference.steps import REFERENCE, Steps


@functools.cache
def launchers() -> Steps:
    """Returns the steps on Triton's launchers, whose import a machine without kernels is spared."""
    from sknet_kernels import steps

    return Steps(**{field.name: getattr(steps, field.name) for field in fields(Steps)})


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


_NORMS = "Tensor?[] {0}mean, Tensor?[] {0}var, Tensor?[] {0}weight, Tensor?[] {0}bias, float {0}eps"

# Of every step: what it takes and returns, as torch.library writes it. NORMS and FC1_NORM stand for
# the five fields of a `Norms`. A step ``out`` is the operator ``sk_out``.
_SCHEMAS = {
    "moments": "(Tensor[] branches) -> (Tensor, Tensor)",
    "hidden": "(Tensor[] branches, NORMS, Tensor fc1_weight, Tensor? fc1_bias) -> (Tensor, Tensor)",
    "logits": "(Tensor hidden, FC1_NORM, Tensor fc2_weight, Tensor? fc2_bias, int M)"
    " -> (Tensor, Tensor, Tensor)",
    "out": "(Tensor[] branches, Tensor logits, NORMS) -> Tensor",
    "hidden_bwd": "(Tensor dout, Tensor[] branches, Tensor logits, NORMS, Tensor fc2_weight)"
    " -> (Tensor, Tensor, Tensor)",
    "channels_bwd": "(Tensor sums, Tensor dlogits, Tensor dz, Tensor logits, Tensor pooled,"
    " Tensor hidden, NORMS, FC1_NORM, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight,"
    " Tensor? fc2_bias, int S, bool batch_stats, bool fc1_batch_stats) -> Tensor[]",
    "dx": "(Tensor dout, Tensor[] branches, Tensor logits, NORMS, Tensor share, Tensor? drift)"
    " -> Tensor[]",
}


def _without_none(x: Tensor, results: Any) -> Any:
    """Returns vectors of nothing for None, which no operator returns."""
    if isinstance(results, Tensor):
        return results
    return [x.new_empty(0) if r is None else r for r in results]


def _with_none(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results
    return [None if r.shape == (0,) else r for r in results]


def _evenly(name: str, argument: Any) -> Any:
    """Returns full-size arguments as launchers take them."""
    if name == "branches":
        return [evenly(x) for x in argument]
    return evenly(argument) if name == "dout" else argument


def _next_norms(rest: Iterator[Any]) -> Norms:
    mean, var, weight, bias = (tuple(x) for x in islice(rest, 4))
    return Norms(mean, var, weight, bias, next(rest))


def _registered(step: str, schema: str) -> Callable[..., Any]:
    """Registers the operator and returns a function that takes what its step takes."""
    name, parameters = f"sk_{step}", re.findall(r"\w+(?=[,)])", schema.split("->")[0])
    schema = schema.replace("FC1_NORM", _NORMS.format("fc1_norm_"))
    schema = schema.replace("NORMS", _NORMS.format(""))

    def compute(args: Sequence[Any], steps: Steps | None = None) -> Any:
        rest = iter(args)
        arguments: list[Any] = [
            _next_norms(rest) if "NORM" in n else next(rest) for n in parameters
        ]
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        if steps is None and has_kernels(first):
            steps = launchers()
            arguments = [_evenly(n, x) for n, x in zip(parameters, arguments, strict=True)]
        steps = steps or _FORMULAS
        with no_autocast(first):
            results = _without_none(first, getattr(steps, step)(*arguments))
        return tuple(results) if schema.endswith(")") else results

    def run(*args: Any) -> Any:
        refuse_forward_mode(name)
        return compute(args)

    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        run,
        mutates_args=(),
        schema=schema,
        tags=(torch.Tag.flexible_layout,),
    )
    operator.register_fake(lambda *args: compute(args, _FORMULAS))

    def call(*args: Any) -> Any:
        flat: list[Any] = []
        for arg in args:
            flat.extend(arg if isinstance(arg, Norms) else (arg,))
        return _with_none(getattr(torch.ops.sknet_triton, name)(*flat))

    return call


OPERATORS = Steps(**{step: _registered(step, schema) for step, schema in _SCHEMAS.items()})
