"""Whether a family computes what a module's own forward does: asked before the module is swapped.

Asked of a copy with random parameters in float64 on the CPU, so that neither a zero that hides a
branch nor rounding decides: in evaluation with and without gradients, and in training. The module
itself is not touched.
"""

import copy
import functools
import inspect
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sknet_triton.acceleration.effects import watched
from sknet_triton.acceleration.family import Family, families
from sknet_triton.backend import use_backend
from sknet_triton.layers.parts import HOOKS

# Far above the rounding of float64 through two batch norms, far below any other formula.
TOLERANCE = 1e-8

_THREAD = "sknet_triton check"
_SEED = 0
_MODES = ((False, False), (False, True), (True, True))
# What nn.Module keeps in an instance, compared elsewhere or of no effect on a forward.
_MODULE_STATE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Checked:
    """The answer."""

    reason: str | None  # why the family does not fit; None where it does
    silent: tuple[str, ...] = ()  # paths of the children that only the own forward calls
    inputs: int = 0  # how many arguments of forward were compared


class _UnfitError(Exception):
    """What makes a family unfit for a module; the message is the reason."""


@dataclass(frozen=True)
class _Outcome:
    tensors: dict[str, Tensor | None]
    module: nn.Module
    called: frozenset[str]
    effects: frozenset[str]


def fitting(module: nn.Module, *, besides: bool = True) -> tuple[Family, Checked] | str | None:
    """Returns the family that computes what ``module`` does, and what `check` found.

    A text says why the families of its structure do not; None that none has its structure.
    """
    reasons = []
    for family in families():
        try:
            recognised = family.recognises(module)
        except Exception as error:
            reasons.append(f"{family.name}: its structure cannot be read: {error!r}")
            continue
        if recognised:
            checked = check(module, family, besides=besides)
            if checked.reason is None:
                return family, checked
            reasons.append(f"{family.name}: {checked.reason}")
    return "; ".join(reasons) or None


def check(
    module: nn.Module, family: Family, cls: type | None = None, *, besides: bool = True
) -> Checked:
    """Compares ``family`` with the forward of ``module``, or of ``cls`` as its class.

    Compared are the outputs and whether they require gradients, the gradients of inputs and
    parameters, buffers and inputs afterwards, and the random numbers drawn; and, with ``besides``,
    what the module keeps on itself and what else the forward does (`effects`).
    """

    def answer() -> Checked:
        try:
            with _isolated():
                return _compared(module, family, cls or type(module), besides)
        except _UnfitError as error:
            return Checked(str(error))

    if threading.current_thread().name.startswith(_THREAD):
        return answer()
    # A new thread has none of the caller's: default device, autocast, inference mode, hooks of
    # saved tensors, modes that see every function or operator.
    with ThreadPoolExecutor(1, _THREAD) as thread:
        return thread.submit(answer).result()


def _compared(module: nn.Module, family: Family, cls: Any, besides: bool) -> Checked:
    _check_forward(module, cls)
    with _says("no copy of it can be made to compare with"):
        twin = _random_twin(module)
        twin.__class__ = cls
    with _says(f"{family.name} has no example for it"):
        inputs = family.example(twin)
    silent: set[str] = set()
    for training, gradients in _MODES:
        twin.train(training)
        with _says("its own forward fails on the check's input"):
            own = _outcome(twin, cls.forward, inputs, gradients)
        if own is None:
            raise _UnfitError("its own forward returns nothing")
        for compute in (family.through_stages, family.through_fuse_select):
            with _says(f"{family.name} does not fit it"):
                ours = _outcome(twin, compute, inputs, gradients)
            if ours is None:
                continue
            for name, expected in own.tensors.items():
                _compare(name, expected, ours.tensors.get(name))
            if besides:
                _compare_besides(own, ours)
            if compute == family.through_stages:
                silent |= own.called - ours.called
    return Checked(None, tuple(sorted(silent)), len(inputs))


def _check_forward(module: nn.Module, cls: Any) -> None:
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if not inspect.isfunction(getattr(type(child), name, None)):
                continue
            # A copy takes its own method along; another function would run the module itself.
            taken_along = getattr(value, "__self__", None) is child
            if not taken_along or (child is module and name == "forward"):
                whose = f"the {name} of {path}" if path else f"its {name}"
                raise _UnfitError(f"{whose} was replaced on the instance")
    if (cls.__reduce__, cls.__reduce_ex__) != (object.__reduce__, object.__reduce_ex__):
        raise _UnfitError("it is copied and pickled in a way of its own")
    if inspect.unwrap(cls.forward) is not cls.forward:
        raise _UnfitError("its forward is decorated, and does what the decorator does")
    if "parametrizations" in module._modules:
        raise _UnfitError("it is parametrized itself; accelerate the model before")
    kinds = {type(p).__name__ for p in module.parameters()} - {"Parameter"}
    if kinds:
        raise _UnfitError(f"its parameters are {kinds.pop()}s; accelerate the model before")


@contextmanager
def _says(what: str) -> Iterator[None]:
    """Makes an error inside the block the reason, after ``what``."""
    try:
        yield
    except _UnfitError:
        raise
    except Exception as error:
        raise _UnfitError(f"{what}: {error or type(error).__name__}") from error


# One generator is every thread's: two checks at once would put back each other's state.
_one_at_a_time = threading.RLock()


@contextmanager
def _isolated() -> Iterator[None]:
    """Computes in plain PyTorch, and puts the caller's random states back.

    Seeded is the CPU's generator alone: ``torch.manual_seed`` reseeds those of all devices.
    """
    with _one_at_a_time, use_backend("reference"), torch.random.fork_rng([]), ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numbers = sys.modules["numpy"].random
            stack.callback(numbers.set_state, numbers.get_state())
        torch.default_generator.manual_seed(_SEED)
        yield


def _random_twin(module: nn.Module) -> nn.Module:
    """Returns a copy with random float64 parameters and buffers on the CPU, and without hooks."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(_random(parameter))
    for buffer in module.buffers():
        floating = buffer.is_floating_point()
        memo[id(buffer)] = _random(buffer) if floating else torch.zeros_like(buffer, device="cpu")
    for child in module.modules():
        memo.update((id(getattr(child, name)), type(getattr(child, name))()) for name in HOOKS)
    twin = copy.deepcopy(module, memo)
    for child in twin.modules():
        cls: Any = type(child)
        if issubclass(cls, nn.SyncBatchNorm):
            child.__class__ = _alone(cls)
    return twin


class _Alone(nn.SyncBatchNorm):
    """A norm of this process alone; torch's takes no CPU tensors where there may be others."""

    forward = nn.BatchNorm2d.forward


@functools.cache
def _alone(cls: Any) -> Any:
    return _Alone if cls is nn.SyncBatchNorm else type(cls.__name__, (cls, _Alone), {})


def _random(like: Tensor) -> Tensor:
    """Positive where it is a scale, a shift or a variance; of unit gain where it is a matrix."""
    if like.dim() < 2:
        return 0.5 + torch.rand(like.shape, dtype=torch.float64)
    fan_in = max(1, like.numel() // max(1, like.shape[0]))
    return torch.randn(like.shape, dtype=torch.float64) / math.sqrt(fan_in)


def _outcome(
    twin: nn.Module, compute: Callable[..., Any], inputs: tuple[Any, ...], gradients: bool
) -> _Outcome | None:
    """Runs ``compute`` on a copy of ``twin``; None where it returns None."""
    parameters = list(twin.parameters())
    versions = [p._version for p in parameters]
    module = copy.deepcopy(twin, {id(p): p for p in parameters})
    called: set[str] = set()
    for path, child in module.named_modules():
        if child is not module:
            child.register_forward_pre_hook(lambda _, __, path=path: called.add(path))
    with torch.set_grad_enabled(gradients):
        leaves = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(gradients), inputs)
        # Copies of the leaves, which a forward may write to.
        given = tree_map_only(Tensor, Tensor.clone, leaves)
        torch.default_generator.manual_seed(_SEED)
        out, effects = watched(lambda: compute(module, *given))
        if out is None:
            return None
        if not isinstance(out, Tensor):
            raise _UnfitError(f"it returns a {type(out).__name__}, not a tensor")
        tensors: dict[str, Tensor | None] = {"output": out}
        if out.requires_grad:
            tensors |= _gradients(out, tree_leaves(leaves), module)
    if [p._version for p in parameters] != versions:
        raise _UnfitError("it writes to its parameters")
    tensors["next random number"] = torch.rand((), dtype=torch.float64)
    tensors |= {f"input {i} afterwards": x for i, x in enumerate(tree_leaves(given))}
    tensors |= module.named_buffers()
    return _Outcome(tensors, module, frozenset(called), effects)


def _gradients(out: Tensor, leaves: list[Any], module: nn.Module) -> dict[str, Tensor | None]:
    wanted = {f"gradient of input {i}": x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    wanted |= {f"gradient of {name}": p for name, p in module.named_parameters()}
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).cos().view(out.shape)
    grads = torch.autograd.grad(out, list(wanted.values()), dout, allow_unused=True)
    return dict(zip(wanted, grads, strict=True))


def _compare_besides(own: _Outcome, ours: _Outcome) -> None:
    for effect in sorted(own.effects - ours.effects):
        raise _UnfitError(f"it does more than return: {effect}")
    others = dict(ours.module.named_modules())
    for path, child in own.module.named_modules():
        kept, held = _kept(child), _kept(others[path])
        for name in kept | held:
            if not _alike(kept.get(name), held.get(name), set()):
                where = f"{path}.{name}" if path else name
                raise _UnfitError(f"it does more than return: it keeps {where}")


def _compare(name: str, expected: Tensor | None, actual: Tensor | None) -> None:
    if expected is None or actual is None:
        if expected is not actual:
            missing, where = ("no", "a") if expected is None else ("a", "none")
            raise _UnfitError(f"it computes something else: it has {missing} {name}, not {where}")
        return
    if actual.shape != expected.shape:
        shapes = f"{tuple(expected.shape)}, not {tuple(actual.shape)}"
        raise _UnfitError(f"its {name} has shape {shapes}")
    if actual.requires_grad != expected.requires_grad:
        raise _UnfitError(f"requires_grad of its {name} is {expected.requires_grad}")
    if expected.numel() == 0 or not expected.is_floating_point():
        return
    scale = expected.detach().abs().max().clamp_min(1)
    error = ((actual - expected).detach().abs().max() / scale).item()
    if not error <= TOLERANCE:
        raise _UnfitError(f"it computes something else: its {name} differs by {error:.1e}")


def _kept(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in _MODULE_STATE or k == "training"}


def _alike(a: Any, b: Any, seen: set[tuple[int, int]]) -> bool:
    """Compares what two copies of a module keep."""
    if type(a) is not type(b):
        return False
    if (id(a), id(b)) in seen or isinstance(a, nn.Module):
        return True
    seen.add((id(a), id(b)))
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True)
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key], seen) for key in a)
    if isinstance(a, (list, tuple)) or hasattr(a, "popleft"):
        return len(a) == len(b) and all(_alike(x, y, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float, complex, str, bytes, set, frozenset)):
        return bool(a == b)
    return not hasattr(a, "__dict__") or _alike(vars(a), vars(b), seen)
