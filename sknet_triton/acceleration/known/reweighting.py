"""The reweighting of three spatial mixers: CycleMLP and Vision Permutator, on maps [B, H, W, C].

``reweight`` gives logits [B, C, 3]; ``proj`` and ``proj_drop`` follow.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.known.structure import BATCH, HEIGHT, has

_M = 3


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _logits(module: Any, pooled: Tensor) -> Tensor:
    wide: Tensor = module.reweight(pooled)
    return wide.reshape(*pooled.shape, _M).transpose(1, 2)


def _finish(module: Any, out: Tensor) -> Tensor:
    mixed: Tensor = module.proj_drop(module.proj(_channels_last(out)))
    return mixed


def _is_cycle_mlp(module: nn.Module) -> bool:
    return has(module, "mlp_c", "sfc_h", "sfc_w", "reweight", "proj", "proj_drop")


def _cycle_maps(module: Any, x: Tensor) -> list[Tensor]:
    maps = _channels_first(x)
    return [module.sfc_h(maps), module.sfc_w(maps), _channels_first(module.mlp_c(x))]


def _is_permutator(module: nn.Module) -> bool:
    names = ("mlp_c", "mlp_h", "mlp_w", "segment_dim", "reweight", "proj", "proj_drop")
    return has(module, *names)


def _permutator_maps(module: Any, x: Tensor) -> list[Tensor]:
    B, H, W, C = x.shape
    segments = x.reshape(B, H, W, module.segment_dim, -1)
    # A linear layer over height and the channels of a segment; then the same over width.
    tall = segments.permute(0, 3, 2, 1, 4)
    h = module.mlp_h(tall.reshape(B, module.segment_dim, W, -1))
    h = h.reshape(tall.shape).permute(0, 3, 2, 1, 4).reshape(B, H, W, C)
    broad = segments.permute(0, 1, 3, 2, 4)
    w = module.mlp_w(broad.reshape(B, H, module.segment_dim, -1))
    w = w.reshape(broad.shape).permute(0, 1, 3, 2, 4).reshape(B, H, W, C)
    return [_channels_first(part) for part in (h, w, module.mlp_c(x))]


def _cycle_example(module: Any) -> tuple[Tensor]:
    return (_maps_of(module, HEIGHT),)


def _permutator_example(module: Any) -> tuple[Tensor]:
    # mlp_h maps height * (C / segments) numbers, and segments equals height.
    return (_maps_of(module, module.segment_dim),)


def _maps_of(module: Any, side: int) -> Tensor:
    return torch.randn(BATCH, side, side, module.mlp_c.in_features, dtype=torch.float64)


CYCLE_MLP = Family(
    name="CycleMLP reweighting",
    recognises=_is_cycle_mlp,
    maps=_cycle_maps,
    logits=_logits,
    example=_cycle_example,
    finish=_finish,
)
VISION_PERMUTATOR = Family(
    name="Vision Permutator reweighting",
    recognises=_is_permutator,
    maps=_permutator_maps,
    logits=_logits,
    example=_permutator_example,
    finish=_finish,
)
