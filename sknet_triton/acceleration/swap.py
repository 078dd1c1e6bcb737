"""Swapping the forward of selective-kernel modules, in place and back.

A module keeps its children, parameters, hooks and state dict. Its class becomes a subclass of its
own class, as ``torch.nn.utils.parametrize`` does it: isinstance holds, torch.compile notices, and
copies and pickles work.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sknet_triton.acceleration.check import Checked, check
from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.registry import families
from sknet_triton.acceleration.report import Report, Row
from sknet_triton.layers import SKConv
from sknet_triton.layers.blocks import any_hook

# Classes of these names are reported even where no family knows their structure.
_NAMES = re.compile(
    r"(?i)selective_?kernel|^sk_?(conv|attention|layer|block)|split_?att|splat|skff|sk_?fusion"
)


def accelerate(model: nn.Module) -> Report:
    """Lets the selective-kernel modules of ``model`` compute with this package's stages, in place.

    Recognised by structure: timm's SelectiveKernel and SplitAttn and ResNeSt's SplAtConv2d, the
    SKConv of the common ports and of pytorchcv, MIRNet's SKFF, DehazeFormer's and gUNet's SKFusion,
    SimCLRv2's SK convolution, the reweighting of CycleMLP and Vision Permutator, and what
    `register_family` added. Each is compared with its own forward on random parameters in float64,
    in training and evaluation; one that differs is left.

    State dict, hooks, training mode and class (by isinstance) stay. Outputs and gradients differ by
    rounding. channels_last is kept where the original lost it. A second call changes nothing. It
    works before and after torch.compile and DistributedDataParallel; before fully_shard only.

    Args:
        model: any module; it may itself be one to swap.

    Returns:
        One row for every module that was swapped, now or before, or left, with the reason.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    tried = [(path, module, _tried(path, module)) for path, module in model.named_modules()]
    found = [row for _, _, row in tried if row is not None]
    rows = [row or _named(path, module, found) for path, module, row in tried]
    return Report(tuple(row for row in rows if row is not None))


def restore(model: nn.Module) -> Report:
    """Gives every module that `accelerate` swapped its own class and forward back, in place.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    rows = []
    for path, module in model.named_modules():
        if isinstance(module, Accelerated):
            rows.append(Row(path, module._skt_family.name, "restored"))
            _unswap(module)
    return Report(tuple(rows))


class Accelerated(nn.Module):
    """What the swapped modules have in common.

    Attributes:
        _skt_family: how the forward is computed.
        _skt_original: the module's own class.
        _skt_silent: children that the own forward calls and the new one does not. A hook on one of
            them brings the own forward back.
    """

    _skt_family: Family
    _skt_original: type[nn.Module]
    _skt_silent: tuple[nn.Module, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (self._skt_original, self._skt_family), self.__dict__


def _tried(path: str, module: nn.Module) -> Row | None:
    """Swaps ``module`` where a family fits; returns its row, or None if no family knows it."""
    if isinstance(module, Accelerated):
        return Row(path, module._skt_family.name, "accelerated", "before")
    if isinstance(module, SKConv):
        return Row(path, "SKConv", "left", "it computes with the stages already")
    reasons = []
    for family in families():
        if not family.recognises(module):
            continue
        checked = check(module, family)
        if checked.reason is None:
            _swap(module, family, checked)
            return Row(path, family.name, "accelerated")
        reasons.append(f"{family.name}: {checked.reason}")
    return Row(path, type(module).__name__, "left", "; ".join(reasons)) if reasons else None


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


def _swap(module: Any, family: Family, checked: Checked) -> None:
    module._skt_silent = tuple(module.get_submodule(path) for path in checked.silent)
    module.__class__ = _accelerated_class(cast(Any, type(module)), family)


@functools.cache
def _accelerated_class(original: Any, family: Family) -> Any:
    own: Callable[..., Tensor] = original.forward
    names = list(inspect.signature(own).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if any_hook(self._skt_silent):
            return own(self, *args, **kwargs)
        inputs = [*args, *(kwargs.pop(name) for name in names[len(args) :] if name in kwargs)]
        if kwargs:
            raise TypeError(f"forward() got an unexpected keyword argument {next(iter(kwargs))!r}")
        return family.forward(self, *inputs)

    forward.__doc__ = own.__doc__
    members = {
        "forward": forward,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_skt_family": family,
        "_skt_original": original,
    }
    return type(f"Accelerated{original.__name__}", (original, Accelerated), members)


def _unswap(module: Any) -> None:
    del module._skt_silent
    module.__class__ = module._skt_original


def _new(original: Any, family: Family) -> Any:
    """Makes an accelerated module without state, for copies and pickles."""
    cls = _accelerated_class(original, family)
    return cls.__new__(cls)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected a module in Python, got a TorchScript module")
