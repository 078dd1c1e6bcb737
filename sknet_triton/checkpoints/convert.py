"""State dicts from one implementation's keys to another's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sknet_triton.checkpoints.detect import Source, detect, layout_called
from sknet_triton.checkpoints.heads import join_heads, split_heads
from sknet_triton.checkpoints.layouts import HEAD, Layout, LayoutName
from sknet_triton.checkpoints.names import renamer
from sknet_triton.checkpoints.unwrap import unwrap


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
        state_dict: key to tensor; or a training script's checkpoint that has it under
            ``state_dict``, ``model``, ``model_state_dict``, ``net``, ``state_dict_ema`` or
            ``model_ema``. A prefix, such as ``module.`` of DDP or ``encoder.``, is taken off the
            source's keys, and ``_orig_mod`` of torch.compile anywhere.
        source: the layout of ``state_dict``; ``"auto"`` tells it by the keys.
        target: the layout to convert to.

    Returns:
        A new dict; its tensors are those of ``state_dict``, not copies.

    Raises:
        TypeError: ``state_dict`` is no mapping from strings.
        ValueError: the layout is not found or not the only one; a key has no place in the target,
            or is unknown to the source and would mean something to the target.
    """
    wanted = layout_called("target", target)
    tensors = unwrap(state_dict)
    layout, prefix = detect(tensors, source)
    known, unknown = _renamed(tensors, layout, prefix)
    converted = _laid_out(join_heads(known), wanted)
    meant = renamer(wanted)
    for key in unknown:
        if meant(key) is not None:
            raise ValueError(
                f"state_dict: {key!r} is unknown to the layout {layout.name!r} under {prefix!r}, "
                f"and {target!r} would take it for its own; remove or rename it"
            )
    return {**converted, **unknown}


def _renamed(
    tensors: Mapping[str, Tensor], layout: Layout, prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what the layout knows with this package's keys, and the rest as it is."""
    rename = renamer(layout)
    known, unknown = {}, {}
    for key, tensor in tensors.items():
        name = rename(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if name is None:
            unknown[key] = tensor
        else:
            known[name] = tensor
    return known, unknown


def _laid_out(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    rename = renamer(layout, back=True)
    placed, homeless = {}, []
    for key, tensor in (split_heads(tensors) if HEAD in layout.modules else tensors).items():
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
