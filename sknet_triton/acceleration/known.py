"""The structures of published modules. The formulas are those of the papers.

The file holds no code of the packages it names, and needs none of them installed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sknet_triton.acceleration.family import Family, register_built_in
from sknet_triton.layers import parts
from sknet_triton.layers.parts import NORMS, Block, Parts

# What an example is made of: a batch that batch norms can take, and sides that are not alike.
BATCH, HEIGHT, WIDTH = 4, 5, 4


def has(module: nn.Module, *names: str) -> bool:
    """Tells whether ``module`` has a child or attribute of each name, and not one it wraps."""
    return all(name in module._modules or name in vars(module) for name in names)


def first_conv(module: nn.Module) -> nn.Conv2d:
    """Returns the first convolution inside ``module``."""
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
        if isinstance(module, nn.Conv2d) and parts.is_linear(module):
            x = F.linear(x, module.weight.flatten(1), module.bias)
        else:
            x = module(unpooled(x)).flatten(1)
    return x


def through(modules: Sequence[Any], x: Tensor) -> Tensor:
    """Calls modules one after the other."""
    for module in modules:
        x = module(x)
    return x


# timm's SelectiveKernel (timm/layers/selective_kernel.py): ``paths`` and ``attn``.


def _timm_inputs(module: Any, x: Tensor) -> Sequence[Tensor]:
    if module.split_input:
        return x.chunk(module.num_paths, 1)
    return [x] * module.num_paths


def _timm_maps(module: Any, x: Tensor) -> list[Tensor]:
    return [path(part) for path, part in zip(module.paths, _timm_inputs(module, x), strict=True)]


def _timm_logits(module: Any, pooled: Tensor) -> Tensor:
    attn = module.attn
    wide = through((attn.fc_reduce, attn.bn, attn.act, attn.fc_select), unpooled(pooled))
    return branch_major(wide, module.num_paths)


def _timm_parts(module: Any) -> Parts | None:
    attn = module.attn
    fc1 = conv_norm_relu(attn.fc_reduce, attn.bn, attn.act)
    return parts.parts_of([conv_norm_relu(path) for path in module.paths], fc1, attn.fc_select)


TIMM = Family(
    name="timm SelectiveKernel",
    recognises=lambda module: (
        has(module, "paths", "attn", "num_paths", "split_input")
        and has(module.attn, "fc_reduce", "bn", "act", "fc_select")
    ),
    maps=_timm_maps,
    logits=_timm_logits,
    example=lambda module: (images(module.in_channels),),
    parts=_timm_parts,
    branch_inputs=_timm_inputs,
)


# The SKConv of the common ports and of pytorchcv.
#
# The branches are a list of convolution, norm and ReLU; the MLP is ``fc1`` and one ``fc2``, or
# ``fc`` and a head a branch in ``fcs`` or ``fc2``, of 1x1 convolutions or of linear layers.

_PORT_BRANCHES = ("branches", "convs", "conv")
_PORT_FC1 = ("fc1", "fc")
_PORT_FC2 = ("fcs", "fc2")


def _first_child(module: Any, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if has(module, name)), None)


def _port_branches(module: Any) -> list[nn.Module]:
    """The branches in a ModuleList, or in a Sequential that runs its children side by side."""
    held = _first_child(module, _PORT_BRANCHES)
    side_by_side = isinstance(held, nn.Sequential) and type(held) is not nn.Sequential
    return list(held) if isinstance(held, nn.ModuleList) or side_by_side else []


def _is_port(module: nn.Module) -> bool:
    mlp = [_first_child(module, names) for names in (_PORT_FC1, _PORT_FC2)]
    return bool(_port_branches(module)) and all(child is not None for child in mlp)


def _port_logits(module: Any, pooled: Tensor) -> Tensor:
    z = _port_row(_first_child(module, _PORT_FC1), pooled)
    second = _first_child(module, _PORT_FC2)
    heads = second if isinstance(second, nn.ModuleList) else [second]
    wide = torch.cat([_port_row(head, z) for head in heads], 1)
    return branch_major(wide, len(_port_branches(module)))


def _port_row(module: nn.Module, x: Tensor) -> Tensor:
    """Calls ``module`` on [B, C], or on maps of one position where it begins with a convolution."""
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    takes_rows = bool(layers) and isinstance(layers[0], nn.Linear)
    out: Tensor = module(x if takes_rows else unpooled(x))
    return out.flatten(1)


def _port_parts(module: Any) -> Parts | None:
    second = _first_child(module, _PORT_FC2)
    blocks = [conv_norm_relu(branch) for branch in _port_branches(module)]
    return parts.parts_of(blocks, conv_norm_relu(_first_child(module, _PORT_FC1)), second)


PORTS = Family(
    name="SKConv of the common ports",
    recognises=_is_port,
    maps=lambda module, x: [branch(x) for branch in _port_branches(module)],
    logits=_port_logits,
    example=lambda module: (images(first_conv(module).in_channels),),
    parts=_port_parts,
)


# ResNeSt's split attention: SplAtConv2d (resnest) and SplitAttn (timm/layers/split_attn.py).
#
# One grouped convolution makes the branches, radix-major in its channels. The logits come grouped
# by cardinality: [B, cardinality, radix, C / cardinality]. At radix 1 the softmax is a sigmoid.

# In the order that they are called, as far as a module has them.
_RESNEST_CONV = ("conv", "bn0", "drop", "dropblock", "act0", "relu")
_RESNEST_MLP = ("fc1", "bn1", "act1", "relu", "fc2")


def _is_split_attention(module: nn.Module) -> bool:
    return has(module, "conv", "fc1", "fc2", "rsoftmax", "radix")


def _present(module: Any, names: tuple[str, ...]) -> list[nn.Module]:
    children = dict(module.named_children())
    return [children[name] for name in names if name in children]


def _resnest_logits(module: Any, pooled: Tensor) -> Tensor:
    wide = through(_present(module, _RESNEST_MLP), unpooled(pooled))
    cardinality = first_conv(module.fc2).groups
    grouped = wide.reshape(wide.shape[0], cardinality, module.radix, -1)
    return grouped.transpose(1, 2).flatten(2)


SPLIT_ATTENTION = Family(
    name="ResNeSt split attention",
    recognises=lambda module: _is_split_attention(module) and module.radix > 1,
    maps=lambda module, x: through(_present(module, _RESNEST_CONV), x).chunk(module.radix, 1),
    logits=_resnest_logits,
    example=lambda module: (images(first_conv(module.conv).in_channels),),
    stacks=False,
)
SPLIT_ATTENTION_RADIX_1 = replace(
    SPLIT_ATTENTION,
    name="ResNeSt split attention, radix 1",
    recognises=lambda module: _is_split_attention(module) and module.radix == 1,
    activation="sigmoid",
)


# Feature fusion: MIRNet's SKFF (v1 and v2) and the SKFusion of DehazeFormer and gUNet.
#
# The branches are given: a list of maps [B, C, H, W]. The MLP has no norm.


def _fusion_example(module: Any) -> tuple[list[Tensor]]:
    channels = first_conv(module).in_channels
    return ([images(channels) for _ in range(module.height)],)


def _skff_logits(module: Any, pooled: Tensor) -> Tensor:
    z = through_rows(module.conv_du, pooled)
    return torch.stack([through_rows([head], z) for head in module.fcs], 1)


MIRNET_SKFF = Family(
    name="MIRNet SKFF",
    recognises=lambda module: has(module, "height", "conv_du", "fcs"),
    maps=lambda module, branches: branches,
    logits=_skff_logits,
    example=_fusion_example,
)
SK_FUSION = Family(
    name="DehazeFormer SKFusion",
    recognises=lambda module: has(module, "height", "mlp"),
    maps=lambda module, branches: branches,
    # gUNet's mlp begins with the pooling, which leaves one position as it is.
    logits=lambda module, pooled: branch_major(through_rows(module.mlp, pooled), module.height),
    example=_fusion_example,
)


# SimCLRv2's SK convolution (google-research/simclr and its PyTorch port).
#
# ``main_conv`` makes both branches at once, [B, 2 * C, H, W]; ``mixing_conv`` is the MLP.

SIMCLR = Family(
    name="SimCLRv2 SK convolution",
    recognises=lambda module: has(module, "main_conv", "mixing_conv"),
    maps=lambda module, x: module.main_conv(x).chunk(2, 1),
    logits=lambda module, pooled: branch_major(module.mixing_conv(unpooled(pooled)), 2),
    example=lambda module: (images(first_conv(module.main_conv).in_channels),),
)


# The reweighting of three spatial mixers: CycleMLP and Vision Permutator, on maps [B, H, W, C].
#
# ``reweight`` gives logits [B, C, 3]; ``proj`` and ``proj_drop`` follow.

_MIXED = ("mlp_c", "reweight", "proj", "proj_drop")


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _reweight_logits(module: Any, pooled: Tensor) -> Tensor:
    wide: Tensor = module.reweight(pooled)
    return wide.reshape(*pooled.shape, 3).transpose(1, 2)


def _cycle_maps(module: Any, x: Tensor) -> list[Tensor]:
    maps = _channels_first(x)
    return [module.sfc_h(maps), module.sfc_w(maps), _channels_first(module.mlp_c(x))]


def _permutator_maps(module: Any, x: Tensor) -> list[Tensor]:
    segments = x.reshape(*x.shape[:3], module.segment_dim, -1)
    h, w = _mixed(module.mlp_h, segments, 1), _mixed(module.mlp_w, segments, 2)
    return [_channels_first(part) for part in (h, w, module.mlp_c(x))]


def _mixed(mlp: nn.Module, segments: Tensor, axis: int) -> Tensor:
    """Applies a linear layer over one axis of space and the channels of a segment."""
    turned = segments.transpose(axis, 3)
    mixed: Tensor = mlp(turned.flatten(3)).reshape(turned.shape)
    return mixed.transpose(axis, 3).flatten(3)


def _maps_of(module: Any, side: int) -> Tensor:
    return torch.randn(BATCH, side, side, module.mlp_c.in_features, dtype=torch.float64)


CYCLE_MLP = Family(
    name="CycleMLP reweighting",
    recognises=lambda module: has(module, "sfc_h", "sfc_w", *_MIXED),
    maps=_cycle_maps,
    logits=_reweight_logits,
    example=lambda module: (_maps_of(module, HEIGHT),),
    finish=lambda module, out: module.proj_drop(module.proj(out.movedim(1, -1))),
    stacks=False,
)
VISION_PERMUTATOR = replace(
    CYCLE_MLP,
    name="Vision Permutator reweighting",
    recognises=lambda module: has(module, "mlp_h", "mlp_w", "segment_dim", *_MIXED),
    maps=_permutator_maps,
    # mlp_h maps height * (C / segments) numbers, and segments equals height.
    example=lambda module: (_maps_of(module, module.segment_dim),),
)

register_built_in(
    TIMM,
    PORTS,
    SPLIT_ATTENTION,
    SPLIT_ATTENTION_RADIX_1,
    MIRNET_SKFF,
    SK_FUSION,
    SIMCLR,
    CYCLE_MLP,
    VISION_PERMUTATOR,
)
