"""Whole networks of other packages, rebuilt by hand from their structure.

Names of children are theirs, since checkpoints are told by their keys. The selective-kernel
modules within are those of `perf.peers.rebuilt`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perf.peers import rebuilt


@dataclass(frozen=True)
class Sizes:
    """Units a stage, the width within them, and whatever else changes shapes."""

    units: Sequence[int] = (1, 2)
    widths: Sequence[int] = (32, 64)
    num_classes: int = 5
    groups: int = 32
    least: int = 32  # of the width of fc1
    split_input: bool = False

    def options(self, channels: int, stride: int) -> dict[str, Any]:
        """Returns the options of a selective-kernel module of ``channels``."""
        width = max(channels // 16, self.least)
        return {"stride": stride, "groups": self.groups, "width": width}

    def stages(self) -> list[tuple[int, int, int]]:
        """Units, width and stride of every stage."""
        strides = [1] + [2] * (len(self.units) - 1)
        return list(zip(self.units, self.widths, strides, strict=True))


PUBLISHED_WIDTHS = (128, 256, 512, 1024)
UNITS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def published(depth: int, num_classes: int = 1000, **changes: Any) -> Sizes:
    return Sizes(UNITS[depth], PUBLISHED_WIDTHS, num_classes, **changes)


def conv(cin: int, cout: int, k: int = 1, stride: int = 1, groups: int = 1) -> Any:
    return nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False)


def block(convolution: nn.Module, cout: int, *, act: bool = True, named: bool = False) -> Any:
    """Convolution, batch norm, ReLU: as 0, 1, 2, or as conv, bn, act."""
    parts = [convolution, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)][: 3 if act else 2]
    names = ("conv", "bn", "act") if named else ("0", "1", "2")
    return nn.Sequential(OrderedDict(zip(names, parts, strict=False)))


def stacked_stages(
    sizes: Sizes, unit: Callable[..., nn.Module], expansion: int = 2
) -> list[nn.Sequential]:
    """Builds unit(cin, width, cout, stride, sizes) for every unit."""
    stages, channels = [], 64
    for units, width, stride in sizes.stages():
        out = expansion * width
        first = unit(channels, width, out, stride, sizes)
        rest = [unit(out, width, out, 1, sizes) for _ in range(units - 1)]
        stages.append(nn.Sequential(first, *rest))
        channels = out
    return stages


class Residual(nn.Module):
    """The unit that all of them have, whatever its parts are called."""

    parts: tuple[str, ...]
    shortcut_name: str

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for name in self.parts:
            out = self.get_submodule(name)(out)
        has = hasattr(self, self.shortcut_name)
        shortcut = self.get_submodule(self.shortcut_name)(x) if has else x
        return (out + shortcut).relu()


class Network(nn.Module):
    """Stem, pooling, stages, average, classifier, whatever they are called."""

    stem_names: tuple[str, ...]
    stage_names: list[str]
    classifier_name: str

    def forward(self, x: Tensor) -> Tensor:
        for name in self.stem_names:
            x = self.get_submodule(name)(x)
        x = nn.functional.max_pool2d(x.relu(), 3, 2, 1)
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        out: Tensor = self.get_submodule(self.classifier_name)(x.mean((2, 3)))
        return out

    def add_stages(self, prefix: str, stages: list[nn.Sequential]) -> None:
        self.stage_names = [f"{prefix}{i + 1}" for i in range(len(stages))]
        for name, stage in zip(self.stage_names, stages, strict=True):
            self.add_module(name, stage)


# timm 1.0.31: skresnext50_32x4d; with split_input, segmentation_models_pytorch 0.6.0


class TimmUnit(Residual):
    parts, shortcut_name = ("conv1", "conv2", "conv3"), "downsample"

    def __init__(self, cin: int, width: int, cout: int, stride: int, sizes: Sizes) -> None:
        super().__init__()
        self.conv1 = block(conv(cin, width), width, named=True)
        options = sizes.options(width, stride)
        self.conv2 = rebuilt.SelectiveKernel(width, width, split=sizes.split_input, **options)
        self.conv3 = block(conv(width, cout), cout, act=False, named=True)
        if stride != 1 or cin != cout:
            self.downsample = block(conv(cin, cout, stride=stride), cout, act=False)


class TimmSKNet(Network):
    stem_names, classifier_name = ("conv1", "bn1"), "fc"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.add_stages("layer", stacked_stages(sizes, TimmUnit))
        self.fc = nn.Linear(2 * sizes.widths[-1], sizes.num_classes)


# bobo0810/SKNet_Pytorch and its copies


class PortUnit(Residual):
    parts, shortcut_name = ("conv1", "conv2", "conv3"), "downsample"

    def __init__(self, cin: int, width: int, cout: int, stride: int, sizes: Sizes) -> None:
        super().__init__()
        self.conv1 = block(conv(cin, width), width)
        self.conv2 = rebuilt.SKConv(width, width, **sizes.options(width, stride))
        self.conv3 = block(conv(width, cout), cout, act=False)
        if stride != 1 or cin != cout:
            self.downsample = block(conv(cin, cout, stride=stride), cout, act=False)


class PortSKNet(Network):
    stem_names, classifier_name = ("conv",), "fc"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.conv = block(conv(3, 64, 7, 2), 64)
        self.add_stages("layer", stacked_stages(sizes, PortUnit))
        self.fc = nn.Linear(2 * sizes.widths[-1], sizes.num_classes)


# pytorchcv 0.0.74: sknet50, sknet101


class CvUnit(Residual):
    parts, shortcut_name = ("body.conv1", "body.conv2", "body.conv3"), "identity_conv"

    def __init__(self, cin: int, width: int, cout: int, stride: int, sizes: Sizes) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "conv1": block(conv(cin, width), width, named=True),
                "conv2": rebuilt.SKConvBlock(width, width, **sizes.options(width, stride)),
                "conv3": block(conv(width, cout), cout, act=False, named=True),
            }
        )
        if stride != 1 or cin != cout:
            self.identity_conv = block(conv(cin, cout, stride=stride), cout, act=False, named=True)


class CvSKNet(Network):
    stem_names, classifier_name = ("features.init_block",), "output"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        stem = nn.Sequential(OrderedDict(conv=block(conv(3, 64, 7, 2), 64, named=True)))
        self.features = nn.ModuleDict({"init_block": stem})
        self.stage_names = []
        for i, stage in enumerate(stacked_stages(sizes, CvUnit)):
            units = {f"unit{j + 1}": unit for j, unit in enumerate(stage)}
            self.features[f"stage{i + 1}"] = nn.Sequential(OrderedDict(units))
            self.stage_names.append(f"features.stage{i + 1}")
        self.output = nn.Linear(2 * sizes.widths[-1], sizes.num_classes)


# developer0hye/SKNet-PyTorch and syt2/SKNet: a biased head a branch


class HeadsUnit(Residual):
    shortcut_name = "shortcut"
    sk = "conv2_sk"

    def __init__(self, cin: int, width: int, cout: int, stride: int, sizes: Sizes) -> None:
        super().__init__()
        self.parts = ("conv1", self.sk, "conv3")
        self.conv1 = block(conv(cin, width), width)
        sk = rebuilt.SKConvHeads(width, width, M=2, **sizes.options(width, stride))
        self.add_module(self.sk, sk)
        self.conv3 = block(conv(width, cout), cout, act=False)
        if cin != cout:
            self.shortcut = block(conv(cin, cout, stride=stride), cout, act=False)


class Syt2Unit(HeadsUnit):
    sk = "conv2"


class HeadsSKNet(Network):
    stem_names, classifier_name = ("basic_conv",), "classifier"
    unit: type[HeadsUnit] = HeadsUnit

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.basic_conv = block(conv(3, 64, 7, 2), 64)
        self.add_stages("stage_", stacked_stages(sizes, self.unit))
        self.classifier = nn.Linear(2 * sizes.widths[-1], sizes.num_classes)


class Syt2SKNet(HeadsSKNet):
    unit = Syt2Unit


# implus/PytorchInsight: sk_resnet50, sk_resnet101


class InsightUnit(nn.Module):
    def __init__(self, cin: int, width: int, cout: int, stride: int, sizes: Sizes) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2g = conv(width, width, 3, stride, groups=sizes.groups)
        self.bn2g = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, cout), nn.BatchNorm2d(cout)
        self.conv_fc1, self.bn_fc1 = conv(width, width // 16), nn.BatchNorm2d(width // 16)
        self.conv_fc2 = conv(width // 16, 2 * width)
        if stride != 1 or cin != cout:
            self.downsample = block(conv(cin, cout, stride=stride), cout, act=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(x)).relu()
        maps = [self.bn2(self.conv2(inner)).relu(), self.bn2g(self.conv2g(inner)).relu()]
        stacked = torch.stack(maps, 1)
        z = self.bn_fc1(self.conv_fc1(stacked.sum(1).mean((2, 3), keepdim=True))).relu()
        inner = rebuilt.weighted(stacked, self.conv_fc2(z).view(stacked.shape[:3]).softmax(1))
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        out: Tensor = (self.bn3(self.conv3(inner)) + shortcut).relu()
        return out


class InsightSKNet(Network):
    stem_names, classifier_name = ("conv1", "bn1"), "fc"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.add_stages("layer", stacked_stages(sizes, InsightUnit, expansion=4))
        self.fc = nn.Linear(4 * sizes.widths[-1], sizes.num_classes)


PEERS: Mapping[str, Callable[[Sizes], nn.Module]] = {
    "timm": TimmSKNet,
    "ports": PortSKNet,
    "pytorchcv": CvSKNet,
    "developer0hye": HeadsSKNet,
    "syt2": Syt2SKNet,
    "pytorchinsight": InsightSKNet,
}
