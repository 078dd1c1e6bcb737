"""ResNeSt's split attention: SplAtConv2d (resnest) and SplitAttn (timm/layers/split_attn.py).

One grouped convolution makes the branches, radix-major in its channels. The logits come grouped by
cardinality: [B, cardinality, radix, C / cardinality]. At radix 1 the softmax is a sigmoid.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.known.structure import has, images, through, unpooled

# In the order that they are called, as far as a module has them.
_BEFORE = ("conv", "bn0", "drop", "dropblock", "act0", "relu")
_MLP = ("fc1", "bn1", "act1", "relu", "fc2")


def _is_split_attention(module: nn.Module) -> bool:
    return has(module, "conv", "fc1", "fc2", "rsoftmax", "radix")


def _recognises(module: Any) -> bool:
    return _is_split_attention(module) and module.radix > 1


def _recognises_radix_1(module: Any) -> bool:
    return _is_split_attention(module) and module.radix == 1


def _present(module: Any, names: tuple[str, ...]) -> list[nn.Module]:
    children = dict(module.named_children())
    return [children[name] for name in names if name in children]


def _maps(module: Any, x: Tensor) -> list[Tensor]:
    return list(through(_present(module, _BEFORE), x).chunk(module.radix, 1))


def _logits(module: Any, pooled: Tensor) -> Tensor:
    wide = through(_present(module, _MLP), unpooled(pooled))
    cardinality = module.fc2.groups
    grouped = wide.reshape(wide.shape[0], cardinality, module.radix, -1)
    return grouped.transpose(1, 2).flatten(2)


def _example(module: Any) -> tuple[Tensor]:
    return (images(module.conv.in_channels),)


SPLIT_ATTENTION = Family(
    name="ResNeSt split attention",
    recognises=_recognises,
    maps=_maps,
    logits=_logits,
    example=_example,
)
SPLIT_ATTENTION_RADIX_1 = replace(
    SPLIT_ATTENTION,
    name="ResNeSt split attention, radix 1",
    recognises=_recognises_radix_1,
    activation="sigmoid",
)
