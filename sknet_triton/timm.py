"""SKNets in timm's registry; needs the extra ``sknet-triton[timm]``.

Importing this module registers them. ``timm.create_model("sknet50.triton")`` then builds the
network of `sknet_triton.sknet50`, under the same parameter names, with timm's arguments and
methods. The arguments of `SKUnit` (M, r, L, G, branches, aggregate, fc_norm) can be given too. No
weights are published; a file of any layout that `sknet_triton.checkpoints` knows is loaded by
``pretrained=True, pretrained_cfg_overlay={"file": path}``, for other channels and classes as well.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sknet_triton.checkpoints import convert_state_dict
from sknet_triton.models import (
    SKNET26,
    SKNET50,
    SKNET101,
    SKNET101_CAFFE,
    SKNet,
    StageSpec,
    Variant,
)

try:
    from timm.layers import SelectAdaptivePool2d
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ModuleNotFoundError as error:
    raise ImportError("sknet_triton.timm needs timm: pip install 'sknet-triton[timm]'") from error

# timm's registry looks for these two names, and appends to the first.
__all__ = ["SKNetTimm", "sknet26", "sknet50", "sknet101", "sknet101_caffe"]


class SKNetTimm(SKNet):
    """An `SKNet` with the methods that timm's scripts and feature extractors call.

    ``global_pool`` is timm's name of a pooling; "" for none, where num_classes is 0. ``drop_rate``
    is of a dropout before the head, in training. ``unit_options`` are passed to every `SKUnit`; the
    other arguments are as in `SKNet`.

    Raises:
        ValueError: as in `SKNet`; or ``global_pool`` does not fit.
        TypeError: an argument is unknown.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec] = SKNET50,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        *,
        variant: Variant = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unit_options: Any,
    ) -> None:
        super().__init__(
            stages,
            num_classes,
            in_chans,
            variant=variant,
            unit_options=unit_options,
            device=device,
            dtype=dtype,
        )
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.global_pool = _pooling(global_pool, num_classes)

    @property
    def head_hidden_size(self) -> int:
        """The width of what the head classifies."""
        return self.num_features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools maps and classifies them; ``pre_logits`` leaves out the classifier."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward_intermediates(  # type: ignore[override]  # timm's contract
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the last maps, and those of ``indices`` in their order.

        Args:
            x: [B, in_chans, H, W].
            indices: entries of `feature_info`; a number n for the last n, None for all.
            norm: without meaning here: every map is normalised.
            stop_early: leaves out the stages after the last index.
            output_fmt: "NCHW".
            intermediates_only: returns the list alone.

        Raises:
            ValueError: ``output_fmt`` is another one, or an index is out of range.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        taken = self._taken(indices)
        maps = [self.stem(x)]
        x = self.pool(maps[0])
        for stage in self.stages[: max(taken)] if stop_early else self.stages:
            x = self._forward_stage(stage, x)
            maps.append(x)
        intermediates = [maps[index] for index in taken]
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the stages after the last index, and the head where that or ``prune_head`` asks.

        Returns:
            The indices, counted from the start.

        Raises:
            ValueError: an index is out of range.
        """
        taken = self._taken(indices)
        shortened = max(taken) < len(self.stages)
        if shortened:
            self.stages = self.stages[: max(taken)]
            self.num_features = self.feature_info[max(taken)]["num_chs"]
        if shortened or prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:  # type: ignore[override]  # timm's contract
        """Returns the head, or its name."""
        return "head" if name_only else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new head on, and another pooling unless ``global_pool`` is None."""
        kept = self.global_pool.pool_type
        self.global_pool = _pooling(kept if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Returns the parameter groups of layer-wise decay: stem, then units or whole stages."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" + ("" if coarse else r"\.(\d+)")}

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        count = 1 + len(self.stages)
        if indices is None:
            indices = count
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices: expected 1 to {count} feature maps, got {indices}")
            return list(range(count - indices, count))
        if not indices:
            raise ValueError(f"indices: expected at least one, got {indices!r}")
        for index in indices:
            if not -count <= index < count:
                raise ValueError(f"indices: expected indices of {count} feature maps, got {index}")
        return [index % count for index in indices]


def _pooling(name: str, num_classes: int) -> Any:
    if num_classes and not name:
        raise ValueError(f"global_pool: '' needs num_classes=0, got num_classes={num_classes}")
    pooling = SelectAdaptivePool2d(pool_type=name, flatten=bool(name))
    if pooling.feat_mult() != 1:
        raise ValueError(
            f"global_pool: expected a pooling that keeps the number of channels, got {name!r}"
        )
    return pooling


NETWORKS = {
    "sknet26": functools.partial(SKNetTimm, SKNET26),
    "sknet50": functools.partial(SKNetTimm, SKNET50),
    "sknet101": functools.partial(SKNetTimm, SKNET101),
    "sknet101_caffe": functools.partial(SKNetTimm, SKNET101_CAFFE, variant="caffe"),
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.triton": {
            "pool_size": (7, 7),
            "first_conv": "stem.conv",
            "classifier": "head",
            "license": "apache-2.0",
            "paper_name": "Selective Kernel Networks",
            "paper_ids": "arXiv:1903.06586",
        }
        for name in NETWORKS
    }
)


def sknet26(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds SKNet-26."""
    return _create("sknet26", pretrained, **kwargs)


def sknet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds SKNet-50."""
    return _create("sknet50", pretrained, **kwargs)


def sknet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds SKNet-101."""
    return _create("sknet101", pretrained, **kwargs)


def sknet101_caffe(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds SKNet-101 as in the released prototxt."""
    return _create("sknet101_caffe", pretrained, **kwargs)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        NETWORKS[name],
        name,
        pretrained,
        pretrained_filter_fn=_in_our_layout,
        feature_cfg={"feature_cls": "getter"},
        **kwargs,
    )
    return model


def _in_our_layout(state: Mapping[str, Any], *_: object) -> dict[str, Tensor]:
    # timm calls this with the model, and again without it after a TypeError.
    return convert_state_dict(state)


for _entry in (sknet26, sknet50, sknet101, sknet101_caffe):
    register_model(_entry)
