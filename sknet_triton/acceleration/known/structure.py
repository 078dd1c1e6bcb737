"""Reading the structure of a module: its children by name, and blocks of conv, norm and ReLU."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sknet_triton.layers import section
from sknet_triton.layers.section import NORMS, Block

# What an example is made of: a batch that batch norms can take, and sides that are not alike.
BATCH, HEIGHT, WIDTH = 4, 5, 4


def has(module: nn.Module, *names: str) -> bool:
    """Tells whether ``module`` has a child or attribute of each name, and not one it wraps."""
    return all(name in module._modules or name in vars(module) for name in names)


def first_conv(module: nn.Module) -> nn.Conv2d:
    """Returns the first convolution inside ``module``.

    Raises:
        ValueError: there is none.
    """
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return child
    raise ValueError(f"{type(module).__name__} holds no Conv2d")


def images(channels: int) -> Tensor:
    """Returns random images [BATCH, channels, HEIGHT, WIDTH] in float64."""
    return torch.randn(BATCH, channels, HEIGHT, WIDTH, dtype=torch.float64)


def conv_norm_relu(*parts: nn.Module) -> Block | None:
    """Returns the one convolution, batch norm and ReLU inside ``parts``; None for anything else.

    The norm may hold the ReLU. Their order is not asked: `check` compares the results.
    """
    modules = [m for part in parts for m in part.modules()]
    convs = [m for m in modules if type(m) is nn.Conv2d]
    norms = [m for m in modules if isinstance(m, NORMS)]
    relus = [m for m in modules if type(m) is nn.ReLU]
    leaves = [m for m in modules if not (list(m.children()) or isinstance(m, nn.Identity))]
    others = [m for m in leaves if m not in (*convs, *norms, *relus)]
    if [len(convs), len(norms), len(relus), len(others)] != [1, 1, 1, 0]:
        return None
    return Block(convs[0], norms[0], tuple(m for m in modules if m is not convs[0]))


def unpooled(pooled: Tensor) -> Tensor:
    """Views [B, C] as maps [B, C, 1, 1]."""
    return pooled[:, :, None, None]


def branch_major(wide: Tensor, M: int) -> Tensor:
    """Views logits [B, M * C, ...] of one position as [B, M, C]."""
    return wide.reshape(wide.shape[0], M, -1)


def through_rows(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Calls modules on rows [B, C], seen as maps of one position, one after the other.

    A plain 1x1 convolution is carried out as the matrix product that it is: as a convolution it
    makes Inductor copy the maps around it into channels_last.
    """
    for module in modules:
        if isinstance(module, nn.Conv2d) and section.is_linear(module):
            x = F.linear(x, module.weight.flatten(1), module.bias)
        else:
            x = module(unpooled(x)).flatten(1)
    return x


def through(modules: Sequence[Any], x: Tensor) -> Tensor:
    """Calls modules one after the other."""
    for module in modules:
        x = module(x)
    return x
