"""The SKConv of the common ports and of pytorchcv.

The branches are a list of convolution, norm and ReLU; the MLP is ``fc1`` and one ``fc2``, or ``fc``
and a head a branch in ``fcs`` or ``fc2``, of 1x1 convolutions or of linear layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.known.structure import (
    branch_major,
    conv_norm_relu,
    first_conv,
    has,
    images,
    unpooled,
)
from sknet_triton.layers import section
from sknet_triton.layers.section import Section

_BRANCHES = ("branches", "convs", "conv")
_FIRST = ("fc1", "fc")
_SECOND = ("fcs", "fc2")


def _child(module: Any, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if has(module, name)), None)


def _branches(module: Any) -> list[nn.Module] | None:
    """The branches in a ModuleList, or in a Sequential that runs its children side by side."""
    held = _child(module, _BRANCHES)
    side_by_side = isinstance(held, nn.Sequential) and type(held) is not nn.Sequential
    return list(held) if isinstance(held, nn.ModuleList) or side_by_side else None


def _recognises(module: nn.Module) -> bool:
    branches, first, second = _branches(module), _child(module, _FIRST), _child(module, _SECOND)
    return bool(branches) and first is not None and second is not None


def _maps(module: Any, x: Tensor) -> list[Tensor]:
    return [branch(x) for branch in _branches(module) or ()]


def _logits(module: Any, pooled: Tensor) -> Tensor:
    first, second = _child(module, _FIRST), _child(module, _SECOND)
    z = first(pooled if _takes_rows(first) else unpooled(pooled))
    if isinstance(second, nn.ModuleList):
        return torch.stack([_row(head, z) for head in second], 1)
    return branch_major(_row(second, z), len(_branches(module) or ()))


def _row(head: nn.Module, z: Tensor) -> Tensor:
    if _takes_rows(head):
        return head(z.flatten(1)).flatten(1)  # type: ignore[no-any-return]  # a module's output
    return head(z if z.dim() == 4 else unpooled(z)).flatten(1)  # type: ignore[no-any-return]  # likewise


def _takes_rows(module: nn.Module) -> bool:
    kinds = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return bool(kinds) and isinstance(kinds[0], nn.Linear)


def _section(module: Any) -> Section | None:
    second = _child(module, _SECOND)
    blocks = [conv_norm_relu(branch) for branch in _branches(module) or ()]
    return section.plain(blocks, conv_norm_relu(_child(module, _FIRST)), second)


def _example(module: Any) -> tuple[Tensor]:
    return (images(first_conv(module).in_channels),)


PORTS = Family(
    name="SKConv of the common ports",
    recognises=_recognises,
    maps=_maps,
    logits=_logits,
    example=_example,
    section=_section,
)
