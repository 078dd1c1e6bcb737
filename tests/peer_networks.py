"""Whole networks of other packages, rebuilt by hand from their structure.

Names of children are theirs, since checkpoints are told by their keys. The selective-kernel
modules within are those of `perf.peers.rebuilt`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perf.peers import rebuilt
from perf.peers.rebuilt import conv


@dataclass(frozen=True)
class Sizes:
    """Units a stage, the width within them, and whatever else changes shapes."""

    units: Sequence[int] = (1, 2)
    widths: Sequence[int] = (32, 64)
    num_classes: int = 5
    groups: int = 32
    least: int = 32  # of the width of fc1
    split_input: bool = False

    def options(self, width: int, stride: int) -> dict[str, Any]:
        """Returns the options of a selective-kernel module of ``width`` channels."""
        split = {"split": True} if self.split_input else {}
        narrow = max(width // 16, self.least)
        return {"stride": stride, "groups": self.groups, "width": narrow, **split}


PUBLISHED_WIDTHS = (128, 256, 512, 1024)
UNITS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def published(depth: int, num_classes: int = 1000, **changes: Any) -> Sizes:
    return Sizes(UNITS[depth], PUBLISHED_WIDTHS, num_classes, **changes)


def block(convolution: nn.Module, cout: int, *, act: bool = True, named: bool = False) -> Any:
    """Convolution, batch norm, ReLU: as 0, 1, 2, or as conv, bn, act."""
    parts = [convolution, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)][: 3 if act else 2]
    names = ("conv", "bn", "act") if named else ("0", "1", "2")
    return nn.Sequential(OrderedDict(zip(names, parts, strict=False)))


def put(root: nn.Module, path: str, child: nn.Module) -> None:
    """Makes ``child`` what ``root`` has at ``path``, and what is missing on the way."""
    *folders, name = path.split(".")
    for folder in folders:
        if not hasattr(root, folder):
            root.add_module(folder, nn.Module())
        root = root.get_submodule(folder)
    root.add_module(name, child)


@dataclass(frozen=True)
class Peer:
    """What a package calls the children of its network; called with sizes, it builds one."""

    stem: tuple[str, ...]  # a block, or a convolution and a norm
    stage: str
    classifier: str
    sk: Callable[..., nn.Module]
    parts: tuple[str, str, str] = ("conv1", "conv2", "conv3")
    shortcut: str = "downsample"
    unit: str = "{0}"  # by its index in a stage, or its number
    blocks: tuple[str, ...] = ()  # those whose layers have names
    expansion: int = 2

    def __call__(self, sizes: Sizes) -> nn.Module:
        return Network(self, sizes)


class Network(nn.Module):
    """Stem, pooling, stages, average, classifier."""

    def __init__(self, peer: Peer, sizes: Sizes) -> None:
        super().__init__()
        self.peer = peer
        self.stages = [peer.stage.format(i + 1) for i in range(len(sizes.units))]
        stem = [conv(3, 64, 7, 2), nn.BatchNorm2d(64)]
        if len(peer.stem) == 1:
            stem = [block(stem[0], 64, named=peer.stem[0] in peer.blocks)]
        for path, child in zip(peer.stem, stem, strict=True):
            put(self, path, child)
        channels = 64
        for i, (count, width) in enumerate(zip(sizes.units, sizes.widths, strict=True)):
            for j in range(count):
                stride = 2 if i and not j else 1
                cout = peer.expansion * width
                kind = InsightUnit if peer.sk is InsightUnit else Unit
                unit = kind(peer, channels, width, cout, stride, sizes)
                put(self, f"{self.stages[i]}.{peer.unit.format(j, j + 1)}", unit)
                channels = cout
        put(self, peer.classifier, nn.Linear(channels, sizes.num_classes))

    def forward(self, x: Tensor) -> Tensor:
        for path in self.peer.stem:
            x = self.get_submodule(path)(x)
        x = nn.functional.max_pool2d(x.relu(), 3, 2, 1)
        for path in self.stages:
            for unit in self.get_submodule(path).children():
                x = unit(x)
        out: Tensor = self.get_submodule(self.peer.classifier)(x.mean((2, 3)))
        return out


class Unit(nn.Module):
    """The unit that most of them have, whatever its parts are called."""

    def __init__(
        self, peer: Peer, cin: int, width: int, cout: int, stride: int, sizes: Sizes
    ) -> None:
        super().__init__()
        self.peer = peer
        first, sk, last = peer.parts
        put(self, first, block(conv(cin, width, 1), width, named=first in peer.blocks))
        put(self, sk, peer.sk(width, width, **sizes.options(width, stride)))
        put(self, last, block(conv(width, cout, 1), cout, act=False, named=last in peer.blocks))
        if stride != 1 or cin != cout:
            named = peer.shortcut in peer.blocks
            shortcut = block(conv(cin, cout, 1, stride), cout, act=False, named=named)
            put(self, peer.shortcut, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for path in self.peer.parts:
            out = self.get_submodule(path)(out)
        has = hasattr(self, self.peer.shortcut)
        shortcut = self.get_submodule(self.peer.shortcut)(x) if has else x
        return (out + shortcut).relu()


class InsightUnit(nn.Module):
    def __init__(
        self, peer: Peer, cin: int, width: int, cout: int, stride: int, sizes: Sizes
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2g = conv(width, width, 3, stride, groups=sizes.groups)
        self.bn2g = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, cout, 1), nn.BatchNorm2d(cout)
        self.conv_fc1, self.bn_fc1 = conv(width, width // 16, 1), nn.BatchNorm2d(width // 16)
        self.conv_fc2 = conv(width // 16, 2 * width, 1)
        if stride != 1 or cin != cout:
            self.downsample = block(conv(cin, cout, 1, stride), cout, act=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(x)).relu()
        maps = [self.bn2(self.conv2(inner)).relu(), self.bn2g(self.conv2g(inner)).relu()]
        stacked = torch.stack(maps, 1)
        z = self.bn_fc1(self.conv_fc1(stacked.sum(1).mean((2, 3), keepdim=True))).relu()
        inner = rebuilt.weighted(stacked, self.conv_fc2(z).view(stacked.shape[:3]).softmax(1))
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        out: Tensor = (self.bn3(self.conv3(inner)) + shortcut).relu()
        return out


# developer0hye/SKNet-PyTorch: a biased head a branch.
HEADS = Peer(
    stem=("basic_conv",),
    stage="stage_{}",
    classifier="classifier",
    sk=partial(rebuilt.SKConvHeads, M=2),
    parts=("conv1", "conv2_sk", "conv3"),
    shortcut="shortcut",
)
PEERS: Mapping[str, Peer] = {
    # timm 1.0.31: skresnext50_32x4d; with split_input, segmentation_models_pytorch 0.6.0.
    "timm": Peer(
        ("conv1", "bn1"), "layer{}", "fc", rebuilt.SelectiveKernel, blocks=("conv1", "conv3")
    ),
    # bobo0810/SKNet_Pytorch and its copies.
    "ports": Peer(("conv",), "layer{}", "fc", rebuilt.SKConv),
    # pytorchcv 0.0.74: sknet50, sknet101.
    "pytorchcv": Peer(
        stem=("features.init_block.conv",),
        stage="features.stage{}",
        classifier="output",
        sk=rebuilt.SKConvBlock,
        parts=("body.conv1", "body.conv2", "body.conv3"),
        shortcut="identity_conv",
        unit="unit{1}",
        blocks=("features.init_block.conv", "body.conv1", "body.conv3", "identity_conv"),
    ),
    "developer0hye": HEADS,
    # syt2/SKNet.
    "syt2": replace(HEADS, parts=("conv1", "conv2", "conv3")),
    # implus/PytorchInsight: sk_resnet50, sk_resnet101.
    "pytorchinsight": Peer(("conv1", "bn1"), "layer{}", "fc", InsightUnit, expansion=4),
}
