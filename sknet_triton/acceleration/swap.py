"""Swapping the forward of selective-kernel modules, in place and back.

A module keeps its children, parameters, hooks and state dict. Its class becomes a subclass of its
own class, as ``torch.nn.utils.parametrize`` does it: isinstance holds, torch.compile notices, and
copies and pickles work.
"""

import copy
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from sknet_triton.acceleration.check import Checked, check, fitting
from sknet_triton.acceleration.family import Family
from sknet_triton.backend import is_symbolic
from sknet_triton.layers import SKConv
from sknet_triton.layers.parts import any_hook

Status = Literal["accelerated", "restored", "left"]

# Classes of these names are reported even where no family knows their structure.
_NAMES = re.compile(
    r"(?i)selective_?kernel|^sk_?(conv|attention|layer|block)|split_?att|splat|skff|sk_?fusion"
)


@dataclass(frozen=True)
class Row:
    """What became of one module.

    Attributes:
        path: its name, as ``model.get_submodule`` takes it; empty for the model itself.
        kind: its family, or the name of its class where none was found.
        status: what was done.
        reason: why it was left, or a remark.
    """

    path: str
    kind: str
    status: Status
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.status:<11}  {self.path or '(the model)'}  [{self.kind}]"
        return f"{text}  {self.reason}" if self.reason else text


@dataclass(frozen=True)
class Report:
    """The rows in the model's order; printing it gives one line a module."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def paths(self, status: Status) -> list[str]:
        """Returns the paths of the modules with that status."""
        return [row.path for row in self.rows if row.status == status]

    def __str__(self) -> str:
        if not self.rows:
            return "no selective-kernel module found"
        counts = {s: len(self.paths(s)) for s in ("accelerated", "restored", "left")}
        head = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return "\n".join([head, *map(str, self.rows)])


def accelerate(model: nn.Module) -> Report:
    """Lets the selective-kernel modules of ``model`` compute with this package's stages, in place.

    Recognised by structure: timm's SelectiveKernel and SplitAttn and ResNeSt's SplAtConv2d, the
    SKConv of the common ports and of pytorchcv, MIRNet's SKFF, DehazeFormer's and gUNet's SKFusion,
    SimCLRv2's SK convolution, the reweighting of CycleMLP and Vision Permutator, and what
    `register_family` added. Each is compared with its own forward on random parameters in float64
    on the CPU, in training and evaluation: outputs, gradients, buffers, and what else the forward
    does. One that differs, or that cannot be compared, is left, with the reason.

    State dict, hooks, training mode, class (by isinstance), forward's signature and all random
    states stay; outputs and gradients differ by rounding. Under autocast the output has the maps'
    dtype; channels_last is kept where the original lost it. A second call changes nothing. It works
    before and after torch.compile and DistributedDataParallel; before fully_shard only.

    The own forward runs where the family does not pay (its row says so), a child was replaced by
    one that does not fit, a hook watches what would not be called, an optional argument is given,
    torch.fx traces, or TorchScript compiles. SKFF and SKFusion keep their inputs for the backward,
    where the originals kept a copy: after a change in place autograd says that a variable needed
    for gradient computation has been modified by an inplace operation.

    Args:
        model: any module; it may itself be one to swap.

    Returns:
        One row for every module that was swapped, now or before, or left, with the reason.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_model(model)
    tried = [(path, module, _tried(path, module)) for path, module in model.named_modules()]
    found = [row for _, _, row in tried if row is not None]
    rows = [row or _named(path, module, found) for path, module, row in tried]
    return Report(tuple(row for row in rows if row is not None))


def restore(model: nn.Module) -> Report:
    """Gives every module that `accelerate` swapped its own class and forward back, in place.

    What put a class of its own on top since, as fully_shard and parametrizations do, stays.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_model(model)
    rows = []
    for path, module in model.named_modules():
        if isinstance(module, Accelerated):
            rows.append(Row(path, module._skt_family.name, "restored"))
            for name in [name for name in vars(module) if name.startswith("_skt_")]:
                delattr(module, name)
            module.__class__ = _restored_class(cast(Any, type(module)))
    return Report(tuple(rows))


@dataclass(frozen=True)
class _Part:
    """A module that the swap relied on: the swapped one or one inside it.

    Attributes:
        path: the names that lead to it from the swapped module.
        module: itself.
        children: its children.
        kind: its class.
        settings: its plain attributes, where they are not read by calling it.
        methods: what its forward calls of its class, likewise.
    """

    path: tuple[str, ...]
    module: nn.Module
    children: tuple[nn.Module | None, ...]
    kind: type
    settings: tuple[tuple[str, Any], ...]
    methods: tuple[tuple[str, Any], ...]

    def describes(self, module: nn.Module) -> bool:
        """Compares as torch.compile can guard on: by class, since a child is no constant."""
        return (
            _own_class(module) is self.kind
            and all(getattr(module, name, None) == value for name, value in self.settings)
            and all(_function(module, name) is method for name, method in self.methods)
        )

    def is_as_it_was(self) -> bool:
        """Compares the module itself, outside of torch.compile."""
        same = tuple(self.module._modules.values()) == self.children
        return same and (not (self.settings or self.methods) or self.describes(self.module))


class Accelerated(nn.Module):
    """What the swapped modules have in common."""

    _skt_family: Family
    _skt_original: Any  # the module's own class
    _skt_checked: Checked
    # Children that the own forward calls and the new one does not: a hook on one brings it back.
    _skt_silent: tuple[nn.Module, ...]
    _skt_parts: tuple[_Part, ...]  # what the comparison relied on

    def _skt_fits(self) -> bool:
        """Tells whether the family computes what the module is now; compares anew on a change."""
        if torch.compiler.is_dynamo_compiling():
            return self._skt_checked.reason is None and all(
                part.describes(_below(self, part.path)) for part in self._skt_parts
            )
        if not all(part.is_as_it_was() for part in self._skt_parts):
            _look_at(self, check(self, self._skt_family, self._skt_original))
        return self._skt_checked.reason is None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        as_usual = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        if "_skt_original" not in vars(type(self)):
            return as_usual
        _, _, *state = as_usual
        return _new, (self._skt_original, self._skt_family), *state

    def __prepare_scriptable__(self) -> nn.Module:
        """Gives torch.jit.script the module as it was, with the same children and parameters."""
        twin = self._skt_original.__new__(self._skt_original)
        twin.__dict__ = {k: v for k, v in vars(self).items() if not k.startswith("_skt_")}
        return cast(nn.Module, twin)


def _tried(path: str, module: nn.Module) -> Row | None:
    """Swaps ``module`` where a family fits; returns its row, or None if no family knows it."""
    if isinstance(module, Accelerated):
        return Row(path, module._skt_family.name, "accelerated", "before")
    if isinstance(module, SKConv):
        return Row(path, "SKConv", "left", "it computes with the stages already")
    found = fitting(module)
    if found is None or isinstance(found, str):
        return None if found is None else Row(path, type(module).__name__, "left", found)
    family, checked = found
    _look_at(module, checked)
    module.__class__ = _accelerated_class(cast(Any, type(module)), family)
    remark = "" if family.stacks else "its own forward under torch.compile without kernels"
    return Row(path, family.name, "accelerated", remark)


def _named(path: str, module: nn.Module, found: list[Row]) -> Row | None:
    """Returns a row where only its name speaks for ``module`` and no row of ``found`` covers it."""
    if not _NAMES.search(type(module).__name__):
        return None
    if any(_contains(path, row.path) or _contains(row.path, path) for row in found):
        return None
    reason = "no known family has its structure; register_family adds one"
    return Row(path, type(module).__name__, "left", reason)


def _contains(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _look_at(module: Any, checked: Checked) -> None:
    """Keeps ``checked`` and what it was found for."""
    module._skt_checked = checked
    module._skt_silent = tuple(module.get_submodule(path) for path in checked.silent)
    parts = []
    for path, child in module.named_modules():
        names, children = tuple(path.split(".") if path else ()), tuple(child._modules.values())
        is_read = child in (module, *module._skt_silent)
        if is_read or children:
            settings, methods = (_settings(child), _methods(child)) if is_read else ((), ())
            if child is module:  # its new forward asks for that of its class
                methods = tuple(method for method in methods if method[0] != "forward")
            parts.append(_Part(names, child, children, _own_class(child), settings, methods))
    module._skt_parts = tuple(parts)


def _below(module: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        module = module._modules[name]
    return module


def _own_class(module: Any) -> Any:
    cls = type(module)
    return getattr(cls, "_skt_original", cls)  # what an instance lacks is slow to find out


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    kept = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    return tuple((k, copy.deepcopy(v)) for k, v in kept.items() if _is_plain(v))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _methods(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Returns the functions of ``module`` that its own forward names."""
    code = getattr(_own_class(module).forward, "__code__", None)
    names = {"forward", *getattr(code, "co_names", ())}
    found = [(name, _function(module, name)) for name in sorted(names)]
    return tuple((name, method) for name, method in found if inspect.isroutine(method))


def _function(module: nn.Module, name: str) -> Any:
    method = getattr(module, name, None)
    return getattr(method, "__func__", method)


@functools.cache
def _accelerated_class(original: Any, family: Family) -> Any:
    own = original.forward
    names = tuple(inspect.signature(own).parameters)[1:]

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = _bound(names[: self._skt_checked.inputs], args, kwargs)
        if (
            inputs is None
            or original.forward is not own
            or is_symbolic(inputs)
            or any_hook(self._skt_silent)
            or self._is_full_backward_hook is False
            or not self._skt_fits()
            or not family.pays(inputs)
        ):
            return original.forward(self, *args, **kwargs)
        return family.forward(self, *inputs)

    members = {
        "forward": forward,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_skt_family": family,
        "_skt_original": original,
        # Of an instance that was made in another way; it runs its own forward.
        "_skt_checked": Checked("it was not compared"),
        "_skt_silent": (),
        "_skt_parts": (),
    }
    return type(f"Accelerated{original.__name__}", (original, Accelerated), members)


def _bound(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Returns the arguments called ``names`` in their order; None where others were given."""
    if not kwargs:
        return args if len(args) == len(names) else None
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) + len(kwargs) != len(names) or given.keys() != set(names):
        return None
    return tuple(given[name] for name in names)


@functools.cache
def _restored_class(cls: Any) -> Any:
    """Returns the own class, under whatever else was put on top."""
    if "_skt_original" in vars(cls):
        return cls._skt_original
    if not issubclass(cls, Accelerated):
        return cls
    bases = tuple(map(_restored_class, cls.__bases__))
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("Accelerated", "", 1), bases, members)


def _new(original: Any, family: Family) -> Any:
    """Makes an accelerated module without state, for copies and pickles."""
    cls = _accelerated_class(original, family)
    return cls.__new__(cls)


def check_model(model: nn.Module) -> None:
    """Raises TypeError where ``model`` is no module, or TorchScript's, whose class is not told."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected a module in Python, got a TorchScript module")
