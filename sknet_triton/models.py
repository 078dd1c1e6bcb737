"""SKNet for ImageNet (Li et al. 2019, table 1): the stage tables as data, the network, the entries.

Initialisation follows the published prototxt: convolutions by He et al. with fan-in, fc1 and fc2
and the classifier Gaussian with standard deviation 0.01.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, ParamSpec, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sknet_triton.layers import BranchSpec, SKConv, SKUnit
from sknet_triton.layers.parts import conv_bn
from sknet_triton.layers.sk_conv import Aggregate, FcNorm

Variant = Literal["paper", "caffe"]

STEM_CHANNELS = 64
_UNIT_OPTIONS = ("M", "r", "L", "G", "branches", "aggregate", "fc_norm")
_Options = ParamSpec("_Options")


@dataclass(frozen=True)
class StageSpec:
    """One stage: ``units`` SK units of ``width`` channels, the first with ``stride``.

    ``d`` fixes the width of fc1 in this stage; None leaves the rule max(width // r, L).
    """

    width: int
    units: int
    stride: int = 2
    d: int | None = None


SKNET26 = (StageSpec(128, 2, 1), StageSpec(256, 2), StageSpec(512, 2), StageSpec(1024, 2))
SKNET50 = (StageSpec(128, 3, 1), StageSpec(256, 4), StageSpec(512, 6), StageSpec(1024, 3))
SKNET101 = (StageSpec(128, 3, 1), StageSpec(256, 4), StageSpec(512, 23), StageSpec(1024, 3))
# The released sknet101.prototxt does not apply L = 32 in its second stage: d = 256 / 16.
SKNET101_CAFFE = (
    StageSpec(128, 3, 1),
    StageSpec(256, 4, d=16),
    StageSpec(512, 23),
    StageSpec(1024, 3),
)


class SKNet(nn.Module):
    """Selective-kernel network for images [B, in_chans, H, W] of at least 32x32 pixels.

    Args:
        stages: the stage table, such as `SKNET50`.
        num_classes: classes of the head; 0 leaves the pooled features [B, num_features].
        in_chans: channels of the input.
        variant: ``"paper"``, or ``"caffe"`` for the stem pooling of the released prototxt
            (ceil mode without padding).
        unit_options: passed to every `SKUnit`: M, r, L, G, branches, aggregate, fc_norm.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        num_features: channels of the last stage.
        feature_info: a dict for the output of the stem and of every stage, as timm has them:
            ``module``, its name, ``num_chs``, its channels, and ``reduction`` of the input.

    Raises:
        ValueError: an argument is out of range, named with the value.
        TypeError: ``unit_options`` has another key.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec] = SKNET50,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        variant: Variant = "paper",
        unit_options: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        unit_options = unit_options or {}
        _check_arguments(stages, num_classes, in_chans, variant, unit_options)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = conv_bn(in_chans, STEM_CHANNELS, 7, stride=2, padding=3, **factory)
        rounding: dict[str, Any] = {"padding": 1} if variant == "paper" else {"ceil_mode": True}
        self.pool = nn.MaxPool2d(3, 2, **rounding)
        self.feature_info = _feature_info(stages)
        channels = [info["num_chs"] for info in self.feature_info]
        self.stages = nn.ModuleList(
            _stage(in_channels, spec, {**unit_options, **factory})
            for in_channels, spec in zip(channels, stages, strict=False)
        )
        self.num_features: int = channels[-1]
        self.grad_checkpointing = False
        self.num_classes = num_classes
        self.head = _head(self.num_features, num_classes, **factory)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits [B, num_classes]; no softmax is applied."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last stage's maps [B, num_features, H / 32, W / 32]."""
        x = self.pool(self.stem(x))
        for stage in self.stages:
            x = self._forward_stage(stage, x)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """Pools maps over space and classifies them."""
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Returns the maps of the stem and of every stage, as `feature_info` lists them."""
        maps = [self.stem(x)]
        x = self.pool(maps[0])
        for stage in self.stages:
            x = self._forward_stage(stage, x)
            maps.append(x)
        return maps

    def get_classifier(self) -> nn.Module:
        """Returns the head: a Linear, or an Identity where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a new head for ``num_classes`` on, on the device and in the dtype of the stem."""
        _check_count("num_classes", num_classes, 0)
        weight = cast(Tensor, self.stem.get_parameter("conv.weight"))
        self.num_classes = num_classes
        self.head = _head(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes every unit in the backward pass instead of keeping its activations.

        The recomputation updates the batch norms' running statistics a second time, as
        checkpointing of any batch norm does.
        """
        self.grad_checkpointing = enable

    def _forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return cast(Tensor, stage(x))
        for unit in cast(nn.Sequential, stage):
            x = checkpoint(unit, x, use_reentrant=False)
        return x

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, SKConv) and module.aggregate == "sk":
                nn.init.normal_(module.fc1.get_parameter("conv.weight"), std=0.01)
                nn.init.normal_(module.fc2.weight, std=0.01)


class SKNetFeatures(SKNet):
    """An SKNet without a head whose ``forward`` returns a list of feature maps.

    Args:
        stages: the stage table.
        out_indices: which maps to return: 0 is the stem, 1 the first stage; negative counts from
            the end. None returns all.
        **kwargs: as in `SKNet`, without ``num_classes``.

    Attributes:
        feature_info: as in `SKNet`, for each map returned, in order.

    Raises:
        ValueError: an index is out of range.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec] = SKNET50,
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(stages, num_classes=0, **kwargs)
        count = len(self.feature_info)
        indices = range(count) if out_indices is None else out_indices
        for index in indices:
            if not -count <= index < count:
                raise ValueError(
                    f"out_indices: expected indices of {count} feature maps, got {index}"
                )
        self.out_indices = tuple(index % count for index in indices)
        self.feature_info = [self.feature_info[index] for index in self.out_indices]

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]  # a backbone's contract
        """Returns the maps [B, num_chs, H / reduction, W / reduction] of `feature_info`."""
        maps = self.forward_intermediates(x)
        return [maps[index] for index in self.out_indices]


def _sknet(
    _tables: dict[str, Sequence[StageSpec]],
    variant: Variant = "paper",
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    M: int = 2,
    r: int = 16,
    L: int = 32,
    G: int = 32,
    branches: Sequence[BranchSpec | tuple[int, int, int]] | None = None,
    aggregate: Aggregate = "sk",
    fc_norm: FcNorm = "batch",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SKNet:
    """{summary}.

    Args:
        variant: ``"paper"``, or ``"caffe"`` for the stem pooling of the released prototxt and, in
            SKNet-101, its d = 16 in the second stage.
        num_classes: classes of the head; 0 leaves the pooled features [B, num_features].
        in_chans: channels of the input.
        features_only: returns an `SKNetFeatures`, whatever ``num_classes`` is.
        out_indices: the maps that it returns: 0 is the stem, 1 the first stage; None for all.
        M: number of branches.
        r: reduction ratio of fc1.
        L: least width of fc1.
        G: groups of every branch.
        branches: replaces M and G: a `BranchSpec` or (kernel, dilation, groups) per branch.
        aggregate: ``"sk"``, or ``"sum"`` for the plain sum of the branches.
        fc_norm: norm of fc1: ``"batch"`` as published, ``"layer"`` or ``"none"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an argument is out of range, named with the value.
    """
    unit = (M, r, L, G, branches, aggregate, fc_norm)
    options: dict[str, Any] = {
        "in_chans": in_chans,
        "variant": variant,
        "unit_options": dict(zip(_UNIT_OPTIONS, unit, strict=True)),
        "device": device,
        "dtype": dtype,
    }
    stages = _tables.get(variant, _tables["paper"])
    if features_only:
        return SKNetFeatures(stages, out_indices, **options)
    if out_indices is not None:
        raise ValueError(f"out_indices: expected features_only=True beside it, got {out_indices}")
    return SKNet(stages, num_classes, **options)


def _entry(
    build: Callable[Concatenate[dict[str, Sequence[StageSpec]], _Options], SKNet],
    name: str,
    summary: str,
    **tables: Sequence[StageSpec],
) -> Callable[_Options, SKNet]:
    """Returns ``build`` on ``tables``, by variant, as a function with its own name and help."""

    def entry(*args: _Options.args, **options: _Options.kwargs) -> SKNet:
        return build(tables, *args, **options)

    signature = inspect.signature(build)
    _, *parameters = signature.parameters.values()
    vars(entry)["__signature__"] = signature.replace(parameters=parameters)
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = cast(str, build.__doc__).format(summary=summary)
    return entry


sknet26 = _entry(
    _sknet, "sknet26", "SKNet-26: units 2, 2, 2, 2; 16,746,408 parameters", paper=SKNET26
)
sknet50 = _entry(
    _sknet,
    "sknet50",
    "SKNet-50 (table 1): units 3, 4, 6, 3; 27,479,784 parameters, 4.46 GMAC at 224x224",
    paper=SKNET50,
)
sknet101 = _entry(
    _sknet,
    "sknet101",
    'SKNet-101 (table 1): units 3, 4, 23, 3; 48,736,040 parameters, as "caffe" 48,686,760',
    paper=SKNET101,
    caffe=SKNET101_CAFFE,
)


def _stage(in_channels: int, spec: StageSpec, options: dict[str, Any]) -> nn.Sequential:
    first = SKUnit(in_channels, spec.width, stride=spec.stride, d=spec.d, **options)
    out_channels = SKUnit.expansion * spec.width
    rest = (SKUnit(out_channels, spec.width, d=spec.d, **options) for _ in range(spec.units - 1))
    return nn.Sequential(first, *rest)


def _head(in_features: int, num_classes: int, **factory: Any) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(in_features, num_classes, **factory)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def _feature_info(stages: Sequence[StageSpec]) -> list[dict[str, Any]]:
    info: list[dict[str, Any]] = [{"module": "stem", "num_chs": STEM_CHANNELS, "reduction": 2}]
    reduction = 4
    for i, spec in enumerate(stages):
        reduction *= spec.stride
        channels = SKUnit.expansion * spec.width
        info.append({"module": f"stages.{i}", "num_chs": channels, "reduction": reduction})
    return info


def _check_arguments(
    stages: Sequence[StageSpec],
    num_classes: int,
    in_chans: int,
    variant: str,
    unit_options: dict[str, Any],
) -> None:
    if not stages:
        raise ValueError("stages: expected at least one StageSpec, got none")
    _check_count("num_classes", num_classes, 0)
    _check_count("in_chans", in_chans, 1)
    if variant not in get_args(Variant):
        raise ValueError(f"variant: expected 'paper' or 'caffe', got {variant!r}")
    for name in unit_options:
        if name not in _UNIT_OPTIONS:
            raise TypeError(f"unit_options: expected {', '.join(_UNIT_OPTIONS)}, got {name!r}")


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
