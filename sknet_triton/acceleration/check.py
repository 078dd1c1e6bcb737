"""Whether a family computes what a module's own forward does: asked before the module is swapped.

Asked of a copy with random parameters in float64 on the CPU, in training and evaluation, so that
neither a zero that hides a branch nor rounding decides. The module itself is not touched.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sknet_triton.acceleration.family import Family
from sknet_triton.backend import use_backend
from sknet_triton.layers.blocks import HOOKS

# Far above the rounding of float64 through two batch norms, far below any other formula.
TOLERANCE = 1e-8

_SEED = 0


@dataclass(frozen=True)
class Checked:
    """The answer.

    Attributes:
        reason: why the family does not fit; None where it does.
        silent: paths of the children that only the own forward calls.
    """

    reason: str | None
    silent: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Outcome:
    out: Tensor
    buffers: dict[str, Tensor]
    called: frozenset[str]


def check(module: nn.Module, family: Family) -> Checked:
    """Compares ``family`` with the own forward of ``module``: outputs and buffers after them."""
    if "forward" in module.__dict__:
        return Checked("its forward was replaced on the instance")
    kinds = {type(p).__name__ for p in module.parameters()} - {"Parameter"}
    if kinds:
        return Checked(f"its parameters are {kinds.pop()}s; accelerate the model before sharding")
    silent: set[str] = set()
    with _undisturbed():
        twin = _random_twin(module)
        inputs = family.example(twin)
        for training in (False, True):
            try:
                own = _outcome(twin.train(training), type(twin).forward, inputs)
            except Exception as error:
                return Checked(f"its own forward fails on the check's input: {error}")
            if not isinstance(own.out, Tensor):
                return Checked(f"it returns a {type(own.out).__name__}, not a tensor")
            for compute in (family.through_stages, family.through_section):
                try:
                    ours = _outcome(twin, compute, inputs)
                except Exception as error:
                    return Checked(f"{family.name} does not fit it: {error}")
                if ours is None:
                    continue
                reason = _difference(own, ours)
                if reason is not None:
                    return Checked(reason)
                if compute == family.through_stages:
                    silent |= own.called - ours.called
    return Checked(None, tuple(sorted(silent)))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves gradients, the random state and the backend of the caller as they are."""
    with use_backend("reference"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


def _random_twin(module: nn.Module) -> nn.Module:
    """Returns a copy with random float64 parameters and buffers on the CPU, and without hooks."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(_random(parameter), requires_grad=False)
    for buffer in module.buffers():
        floating = buffer.is_floating_point()
        memo[id(buffer)] = _random(buffer) if floating else torch.zeros_like(buffer, device="cpu")
    for child in module.modules():
        memo.update((id(getattr(child, name)), type(getattr(child, name))()) for name in HOOKS)
    return copy.deepcopy(module, memo)


def _random(like: Tensor) -> Tensor:
    """Positive where it is a scale, a shift or a variance; of unit gain where it is a matrix."""
    if like.dim() < 2:
        return 0.5 + torch.rand(like.shape, dtype=torch.float64)
    fan_in = max(1, like.numel() // max(1, like.shape[0]))
    return torch.randn(like.shape, dtype=torch.float64) / math.sqrt(fan_in)


def _outcome(
    twin: nn.Module, compute: Callable[..., Tensor | None], inputs: tuple[Any, ...]
) -> Any:
    """Runs ``compute`` on a copy of ``twin``; None where it returns None."""
    module = copy.deepcopy(twin)
    called: set[str] = set()
    for path, child in module.named_modules():
        if child is not module:
            child.register_forward_pre_hook(lambda _, __, path=path: called.add(path))
    torch.manual_seed(_SEED)  # dropout, if there is any
    out = compute(module, *inputs)
    if out is None:
        return None
    return _Outcome(out, dict(module.named_buffers()), frozenset(called))


def _difference(own: _Outcome, ours: _Outcome) -> str | None:
    pairs = {"output": (own.out, ours.out)}
    pairs.update((name, (own.buffers[name], ours.buffers[name])) for name in own.buffers)
    for name, (expected, actual) in pairs.items():
        if actual.shape != expected.shape:
            return f"its {name} has shape {tuple(expected.shape)}, not {tuple(actual.shape)}"
        if expected.numel() == 0:
            continue
        scale = expected.abs().max().clamp_min(1)
        error = ((actual - expected).abs().max() / scale).item()
        if not error <= TOLERANCE:
            return f"it computes something else: its {name} differs by {error:.1e}"
    return None
