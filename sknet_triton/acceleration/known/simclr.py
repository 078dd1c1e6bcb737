"""SimCLRv2's SK convolution (google-research/simclr and its PyTorch port).

``main_conv`` makes both branches at once, [B, 2 * C, H, W]; ``mixing_conv`` is the MLP.
"""

from typing import Any

from torch import Tensor, nn

from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.known.structure import (
    branch_major,
    first_conv,
    has,
    images,
    unpooled,
)

_M = 2


def _recognises(module: nn.Module) -> bool:
    return has(module, "main_conv", "mixing_conv")


def _maps(module: Any, x: Tensor) -> list[Tensor]:
    return list(module.main_conv(x).chunk(_M, 1))


def _logits(module: Any, pooled: Tensor) -> Tensor:
    return branch_major(module.mixing_conv(unpooled(pooled)), _M)


def _example(module: Any) -> tuple[Tensor]:
    return (images(first_conv(module.main_conv).in_channels),)


SIMCLR = Family(
    name="SimCLRv2 SK convolution",
    recognises=_recognises,
    maps=_maps,
    logits=_logits,
    example=_example,
)
