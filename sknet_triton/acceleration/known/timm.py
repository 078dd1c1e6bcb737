"""timm's SelectiveKernel (timm/layers/selective_kernel.py): ``paths`` and ``attn``."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.known.structure import (
    branch_major,
    conv_norm_relu,
    has,
    images,
    through,
    unpooled,
)
from sknet_triton.layers import section
from sknet_triton.layers.section import Section


def _recognises(module: Any) -> bool:
    return has(module, "paths", "attn", "num_paths", "split_input") and has(
        module.attn, "fc_reduce", "bn", "act", "fc_select"
    )


def _branch_inputs(module: Any, x: Tensor) -> Sequence[Tensor]:
    if module.split_input:
        return x.chunk(module.num_paths, 1)
    return [x] * module.num_paths


def _maps(module: Any, x: Tensor) -> list[Tensor]:
    return [path(part) for path, part in zip(module.paths, _branch_inputs(module, x), strict=True)]


def _logits(module: Any, pooled: Tensor) -> Tensor:
    attn = module.attn
    wide = through((attn.fc_reduce, attn.bn, attn.act, attn.fc_select), unpooled(pooled))
    return branch_major(wide, module.num_paths)


def _section(module: Any) -> Section | None:
    attn = module.attn
    fc1 = conv_norm_relu(attn.fc_reduce, attn.bn, attn.act)
    return section.plain([conv_norm_relu(path) for path in module.paths], fc1, attn.fc_select)


def _example(module: Any) -> tuple[Tensor]:
    return (images(module.in_channels),)


TIMM = Family(
    name="timm SelectiveKernel",
    recognises=_recognises,
    maps=_maps,
    logits=_logits,
    example=_example,
    section=_section,
    branch_inputs=_branch_inputs,
)
