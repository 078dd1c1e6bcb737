"""Feature fusion: MIRNet's SKFF (v1 and v2) and the SKFusion of DehazeFormer and gUNet.

The branches are given: a list of maps [B, C, H, W]. The MLP has no norm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.known.structure import (
    branch_major,
    first_conv,
    has,
    images,
    through_rows,
)


def _maps(module: Any, branches: Sequence[Tensor]) -> Sequence[Tensor]:
    return branches


def _example(module: Any) -> tuple[list[Tensor]]:
    channels = first_conv(module).in_channels
    return ([images(channels) for _ in range(module.height)],)


def _is_skff(module: nn.Module) -> bool:
    return has(module, "height", "conv_du", "fcs")


def _skff_logits(module: Any, pooled: Tensor) -> Tensor:
    z = through_rows(module.conv_du, pooled)
    return torch.stack([through_rows([head], z) for head in module.fcs], 1)


def _is_sk_fusion(module: nn.Module) -> bool:
    return has(module, "height", "mlp")


def _sk_fusion_logits(module: Any, pooled: Tensor) -> Tensor:
    # gUNet's mlp begins with the pooling, which leaves one position as it is.
    return branch_major(through_rows(module.mlp, pooled), module.height)


MIRNET_SKFF = Family(
    name="MIRNet SKFF",
    recognises=_is_skff,
    maps=_maps,
    logits=_skff_logits,
    example=_example,
)
SK_FUSION = Family(
    name="DehazeFormer SKFusion",
    recognises=_is_sk_fusion,
    maps=_maps,
    logits=_sk_fusion_logits,
    example=_example,
)
