"""fc2 as one convolution or as a head a branch, and what becomes of its bias.

A bias of zeros is none: it goes when heads are joined and comes when they are split.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_HEAD = re.compile(r"(?P<fc2>stages\.\d+\.\d+\.sk\.fc2)\.(?P<branch>\d+)\.(?P<leaf>weight|bias)")
_FC2 = re.compile(r"(?P<sk>stages\.\d+\.\d+\.sk)\.fc2\.weight")


def join_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins ``fc2.0``, ``fc2.1``, ... of every unit to ``fc2``, whose rows are branch-major.

    Raises:
        ValueError: the heads of a unit are not counted from 0, or differ in shape.
    """
    joined, heads = {}, dict[str, dict[int, Tensor]]()
    for key, tensor in tensors.items():
        match = _HEAD.fullmatch(key)
        if match is None:
            joined[key] = tensor
        else:
            heads.setdefault(f"{match['fc2']}.{match['leaf']}", {})[int(match["branch"])] = tensor
    for key, by_branch in heads.items():
        rows = [by_branch[branch] for branch in sorted(by_branch)]
        counted = sorted(by_branch) == list(range(len(rows)))
        if not counted or rows[0].dim() == 0 or len({row.shape for row in rows}) > 1:
            shapes = {branch: list(by_branch[branch].shape) for branch in sorted(by_branch)}
            raise ValueError(f"{key}: expected one head a branch, all of one shape, got {shapes}")
        if key.endswith("weight") or any(bool(row.any()) for row in rows):
            joined[key] = torch.cat(rows)
    return joined


def split_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits every ``fc2`` into ``fc2.0``, ``fc2.1``, ..., each with a bias.

    Raises:
        ValueError: the rows of an fc2 cannot be dealt out to the branches of its unit.
    """
    split = dict(tensors)
    for sk in _units(tensors):
        weight = split.pop(f"{sk}.fc2.weight")
        rows = weight.shape[0] if weight.dim() else 0
        bias = split.pop(f"{sk}.fc2.bias", weight.new_zeros(rows))
        M = sum(key.startswith(f"{sk}.branches.") and key.endswith("conv.weight") for key in split)
        if M == 0 or rows % M or bias.shape != (rows,):
            raise ValueError(
                f"{sk}.fc2: expected as many rows for each of {M} branches, got a weight "
                f"{list(weight.shape)} and a bias {list(bias.shape)}"
            )
        for branch, (w, b) in enumerate(zip(weight.chunk(M), bias.chunk(M), strict=True)):
            split[f"{sk}.fc2.{branch}.weight"] = w
            split[f"{sk}.fc2.{branch}.bias"] = b
    return split


def fold_fc2_bias(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moves the bias of every fc2 into one more channel of fc1, which is one for every image.

    `SKConv` has no bias on fc2. This makes a checkpoint that has one fit an SKNet whose
    `StageSpec` says ``d`` one larger, with equal outputs up to rounding, in training too: the new
    channel's batch norm has weight 0 and bias 1, and its convolution is 0. A gradient moves only
    that bias of 1 and the new column of fc2.

    Args:
        state_dict: with this package's keys, as `convert_state_dict` returns it.

    Returns:
        A new dict without ``fc2.bias``. It equals ``state_dict`` where no unit has such a bias;
        else every unit is widened, as a `StageSpec` has one ``d``.

    Raises:
        ValueError: a tensor of a unit's fc1, such as its batch norm's, or of its fc2 is missing or
            has other axes.
    """
    folded, units = dict(state_dict), _units(state_dict)
    if not any(f"{sk}.fc2.bias" in folded for sk in units):
        return folded
    for sk in units:
        weight = _taken(folded, f"{sk}.fc2.weight", 4)
        bias = _taken(folded, f"{sk}.fc2.bias", 1, weight.new_zeros(weight.shape[0]))
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{sk}.fc2.bias: expected {len(weight)} values, got {len(bias)}")
        folded[f"{sk}.fc2.weight"] = torch.cat([weight, bias.view(-1, 1, 1, 1)], 1)
        for leaf, (axes, value) in _NEW_CHANNEL.items():
            rows = _taken(folded, f"{sk}.fc1.{leaf}", axes)
            row = rows.new_full((1, *rows.shape[1:]), value)
            folded[f"{sk}.fc1.{leaf}"] = torch.cat([rows, row])
    return folded


def _taken(
    tensors: dict[str, Tensor], key: str, axes: int, default: Tensor | None = None
) -> Tensor:
    tensor = tensors.pop(key, default)
    if tensor is None or tensor.dim() != axes:
        got = "none" if tensor is None else list(tensor.shape)
        raise ValueError(f"{key}: expected a tensor of {axes} axes to fold the bias, got {got}")
    return tensor


# Axes of the tensor, value of the new channel.
_NEW_CHANNEL = {
    "conv.weight": (4, 0.0),
    "bn.weight": (1, 0.0),
    "bn.bias": (1, 1.0),
    "bn.running_mean": (1, 0.0),
    "bn.running_var": (1, 1.0),
}


def _units(tensors: Mapping[str, Tensor]) -> list[str]:
    matches = (_FC2.fullmatch(key) for key in tensors)
    return [match["sk"] for match in matches if match is not None]
