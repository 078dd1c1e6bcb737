"""State dicts from one implementation's keys to another's.

`convert_state_dict` takes a checkpoint out of what holds it, finds its layout and prefix, renames
its keys, and joins or splits fc2, which some keep as one head a branch.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sknet_triton.checkpoints.layouts import LAYOUTS, Layout, LayoutName, renamer

Source = Literal[LayoutName, "auto"]


def convert_state_dict(
    state_dict: Mapping[str, Any],
    source: Source = "auto",
    *,
    target: LayoutName = "sknet_triton",
) -> dict[str, Tensor]:
    """Renames the tensors of an SKNet from one implementation's keys to another's.

    The layouts: ``"sknet_triton"``; ``"timm"`` (skresnext50_32x4d, also as the encoder of
    segmentation_models_pytorch); ``"ports"`` (bobo0810/SKNet_Pytorch and the many that copy it);
    ``"pytorchcv"``; ``"developer0hye"`` and ``"syt2"``, which have a biased fc2 for every branch;
    ``"pytorchinsight"`` (sk_resnet50, whose widths fit no `SKNet`, but its units fit `SKUnit`).

    Converting there and back gives the same tensors. Only an fc2 with a head a branch changes its
    tensors: its heads are joined, or split. A bias of zeros is then the same as none; any other
    bias of fc2 stays, as ``fc2.bias``, which no `SKNet` has; `fold_fc2_bias` makes it fit one.

    A key that the source's table does not have stays as it is, so that loading names it.

    Args:
        state_dict: key to tensor; or a training script's checkpoint that has one network's,
            at any depth. A prefix, such as ``encoder.``, is taken off the source's keys, the
            names of wrappers (``module`` of DDP, DeepSpeed and averaged weights, ``_orig_mod`` of
            torch.compile, FSDP's and Lightning's) anywhere; counters that a wrapper keeps beside
            its network, such as ``n_averaged``, are left out.
        source: the layout of ``state_dict``; ``"auto"`` tells it by the keys.
        target: the layout to convert to.

    Returns:
        A new dict; its tensors are those of ``state_dict``, not copies.

    Raises:
        TypeError: ``state_dict`` is no mapping from strings.
        ValueError: the layout is not found or not the only one; a key has no place in the target,
            or is unknown to the source and would mean something to the target.
    """
    wanted = _layout_called("target", target)
    tensors = _unwrapped(state_dict)
    layout, prefix = _detected(tensors, source)
    rename, meant = renamer(layout), renamer(wanted)
    known, unknown = {}, {}
    for key, tensor in tensors.items():
        name = rename(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if name is not None:
            known[name] = tensor
        elif meant(key) is not None:
            raise ValueError(
                f"state_dict: {key!r} is unknown to the layout {layout.name!r} under {prefix!r}, "
                f"and {target!r} would take it for its own; remove or rename it"
            )
        elif not _is_counter(key, tensor, prefix):
            unknown[key] = tensor
    return {**_laid_out(_joined_heads(known), wanted), **unknown}


def _is_counter(key: str, tensor: Tensor, prefix: str) -> bool:
    """Tells whether ``key`` is what a wrapper counts beside its network, such as n_averaged."""
    beside = prefix.startswith(key.rpartition(".")[0])
    return beside and tensor.dim() == 0 and not tensor.is_floating_point()


def _laid_out(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    rename = renamer(layout, back=True)
    placed, homeless = {}, []
    for key, tensor in (_split_heads(tensors) if layout.has_heads else tensors).items():
        name = rename(key)
        if name is None or (key.endswith(".fc2.bias") and not layout.fc2_bias):
            homeless.append(key)
        else:
            placed[name] = tensor
    if homeless:
        raise ValueError(
            f"target: {layout.name!r} has no place for {len(homeless)} of the keys, the first "
            f"{homeless[0]!r}"
        )
    return placed


# Under these keys a training script's checkpoint has its state dict.
_HOLDERS = (
    *("state_dict", "model", "model_state_dict", "module", "net"),
    *("state_dict_ema", "model_ema"),
)
# Modules that torch.compile, activation checkpointing, FSDP, Lightning and the data-parallel and
# averaging wrappers put around a network or a part of it.
_WRAPPERS = {
    *("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"),
    *("_forward_module", "module"),
}


def _unwrapped(checkpoint: Any) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint without the names of wrappers within their keys."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(checkpoint).__name__}")
    held = dict(_networks(checkpoint, ())) or {
        name: checkpoint[name] for name in _HOLDERS if isinstance(checkpoint.get(name), Mapping)
    }
    if len(held) > 1:
        raise ValueError(
            f"state_dict: expected one state dict, got {len(held)}, under {list(held)}; "
            "pass one of them"
        )
    (state_dict,) = held.values() or (checkpoint,)
    if state_dict is not checkpoint:
        return _unwrapped(state_dict)
    tensors: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        # What a wrapper counts beside the tensors.
        if isinstance(key, str) and (value is None or isinstance(value, (bool, int, float, str))):
            continue
        _check_entry(key, value)
        name = _bare(key)
        if name in tensors:
            raise ValueError(f"state_dict: two keys stand for {name!r}, one of them {key!r}")
        tensors[name] = value
    return tensors


def _networks(checkpoint: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields the state dicts of a network inside ``checkpoint``, at any depth, by their place."""
    marks = tuple(f".{layout.mark}" for layout in LAYOUTS.values())
    if any(isinstance(key, str) and f".{_bare(key)}".endswith(marks) for key in checkpoint):
        yield ".".join(path), checkpoint
        return
    for key, value in checkpoint.items():
        if isinstance(value, Mapping):
            yield from _networks(value, (*path, str(key)))


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _check_entry(key: Any, value: Any) -> None:
    if not isinstance(key, str):
        raise TypeError(f"state_dict: expected strings as keys, got {key!r}")
    if not isinstance(value, Tensor):
        raise ValueError(
            f"state_dict: expected tensors, or one of the keys {', '.join(_HOLDERS)} with them, "
            f"got {type(value).__name__} under {key!r}"
        )
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise ValueError(
            f"state_dict: expected dense tensors, got {value.dtype}, {value.layout} on "
            f"{value.device} under {key!r}"
        )


def _layout_called(argument: str, name: str) -> Layout:
    if name not in LAYOUTS:
        names = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"{argument}: expected one of {names}, got {name!r}")
    return LAYOUTS[name]


def _detected(keys: Collection[str], source: str) -> tuple[Layout, str]:
    """Returns the layout of ``keys``, told by its mark, and what comes before it."""
    wanted = LAYOUTS.values() if source == "auto" else [_layout_called("source", source)]
    found = [
        (layout, key.removesuffix(layout.mark))
        for layout in wanted
        for key in keys
        if f".{key}".endswith(f".{layout.mark}")
    ]
    if not found:
        looked_for = "".join(f"\n  {layout.name}: {layout.mark}" for layout in wanted)
        first = ", ".join([*keys][:5]) + (", ..." if len(keys) > 5 else "")
        raise ValueError(
            f"state_dict: no layout of an SKNet found for source={source!r}. Looked for a key, "
            f"after any prefix:{looked_for}\nin {len(keys)} keys: {first}"
        )
    if len(found) > 1:
        places = ", ".join(f"{layout.name} under {prefix!r}" for layout, prefix in found)
        raise ValueError(f"state_dict: expected one network, got {len(found)}: {places}")
    return found[0]


# fc2 as one convolution or as a head a branch. A bias of zeros is none: it goes when heads are
# joined and comes when they are split.

_HEAD = re.compile(r"(?P<fc2>stages\.\d+\.\d+\.sk\.fc2)\.(?P<branch>\d+)\.(?P<leaf>weight|bias)")
_FC2 = re.compile(r"(?P<sk>stages\.\d+\.\d+\.sk)\.fc2\.weight")


def _joined_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins ``fc2.0``, ``fc2.1``, ... of every unit to ``fc2``, whose rows are branch-major."""
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


def _split_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits every ``fc2`` into ``fc2.0``, ``fc2.1``, ..., each with a bias."""
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
        folded.setdefault(f"{sk}.fc2.bias", weight.new_zeros(weight.shape[0]))
        bias = _taken(folded, f"{sk}.fc2.bias", 1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{sk}.fc2.bias: expected {len(weight)} values, got {len(bias)}")
        folded[f"{sk}.fc2.weight"] = torch.cat([weight, bias.view(-1, 1, 1, 1)], 1)
        for leaf, (axes, value) in _NEW_CHANNEL.items():
            rows = _taken(folded, f"{sk}.fc1.{leaf}", axes)
            row = rows.new_full((1, *rows.shape[1:]), value)
            folded[f"{sk}.fc1.{leaf}"] = torch.cat([rows, row])
    return folded


# Axes of the tensor, value of the new channel.
_NEW_CHANNEL = {
    "conv.weight": (4, 0.0),
    "bn.weight": (1, 0.0),
    "bn.bias": (1, 1.0),
    "bn.running_mean": (1, 0.0),
    "bn.running_var": (1, 1.0),
}


def _taken(tensors: dict[str, Tensor], key: str, axes: int) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None or tensor.dim() != axes:
        got = "none" if tensor is None else list(tensor.shape)
        raise ValueError(f"{key}: expected a tensor of {axes} axes to fold the bias, got {got}")
    return tensor


def _units(tensors: Mapping[str, Tensor]) -> list[str]:
    matches = (_FC2.fullmatch(key) for key in tensors)
    return [match["sk"] for match in matches if match is not None]
