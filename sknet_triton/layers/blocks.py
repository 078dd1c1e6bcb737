"""The convolution, norm and activation that every selective-kernel layer is made of."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules import module as module_globals

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def has_hook(module: nn.Module) -> bool:
    """Tells whether calling ``module`` does more than its class says.

    A hook of any kind is registered on it, or its own ``forward`` was replaced, as wrappers that
    keep a module's type do.
    """
    return any_hook((module,), everywhere=False)


def any_hook(modules: Iterable[nn.Module], *, everywhere: bool = True) -> bool:
    """Tells whether calling one of ``modules`` does more, hooks on every module included."""
    if everywhere and any(getattr(module_globals, f"_global{name}", None) for name in HOOKS):
        return True
    # Spelt out, since this is asked at every call of a layer.
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    act: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Returns convolution without bias, batch norm and, with ``act``, ReLU as conv, bn, act."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    modules["conv"] = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=False,
        device=device,
        dtype=dtype,
    )
    modules["bn"] = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
    if act:
        modules["act"] = nn.ReLU(inplace=True)
    return nn.Sequential(modules)
