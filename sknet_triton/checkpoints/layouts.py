"""Where the known implementations of SKNet keep their modules, one table a layout, and renaming.

The keys were read from the implementations themselves: timm 1.0.31, pytorchcv 0.0.74, and
bobo0810/SKNet_Pytorch, developer0hye/SKNet-PyTorch, syt2/SKNet and implus/PytorchInsight.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

LayoutName = Literal[
    "sknet_triton", "timm", "ports", "pytorchcv", "developer0hye", "syt2", "pytorchinsight"
]


@dataclass(frozen=True)
class Layout:
    """The names of one implementation.

    Attributes:
        name: what callers call it.
        mark: a key that this layout has and no other.
        modules: the paths of this package's modules and theirs. ``{stage}``, ``{unit}`` and
            ``{branch}`` stand for numbers, which this package counts from 0. What follows the path
            of a module (``weight``, ``running_mean``, ...) is the same everywhere.
        first: the number of their first stage, unit and branch.
        fc2_bias: whether the rows of fc2 may have a bias.
    """

    name: LayoutName
    mark: str
    modules: Mapping[str, str]
    first: tuple[int, int, int] = (1, 0, 0)
    fc2_bias: bool = False


_UNIT = "stages.{stage}.{unit}"
_BRANCH = f"{_UNIT}.sk.branches.{{branch}}"
# fc2 as one head a branch: conversion joins the heads to this package's fc2.
FC2, HEAD = f"{_UNIT}.sk.fc2", f"{_UNIT}.sk.fc2.{{branch}}"


def _blocks(paths: Mapping[str, str], conv: str, bn: str) -> dict[str, str]:
    """Completes paths of blocks, which hold a convolution and its batch norm."""
    ends = (("conv", conv), ("bn", bn))
    return {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in paths.items() for a, b in ends}


_OURS = (
    "stem",
    f"{_UNIT}.reduce",
    _BRANCH,
    f"{_UNIT}.sk.fc1",
    f"{_UNIT}.increase",
    f"{_UNIT}.shortcut",
)

_TIMM_UNIT = "layer{stage}.{unit}"
_CV_UNIT = "features.stage{stage}.unit{unit}"
_STAGED_UNIT = "stage_{stage}.{unit}"


def _staged(name: LayoutName, sk: str) -> Layout:
    """The two implementations with ``stage_1``, ``convs`` and a biased head a branch."""
    return Layout(
        name=name,
        mark=f"stage_1.0.{sk}.convs.0.0.weight",
        modules={
            **_blocks(
                {
                    "stem": "basic_conv",
                    f"{_UNIT}.reduce": f"{_STAGED_UNIT}.conv1",
                    _BRANCH: f"{_STAGED_UNIT}.{sk}.convs.{{branch}}",
                    f"{_UNIT}.sk.fc1": f"{_STAGED_UNIT}.{sk}.fc",
                    f"{_UNIT}.increase": f"{_STAGED_UNIT}.conv3",
                    f"{_UNIT}.shortcut": f"{_STAGED_UNIT}.shortcut",
                },
                "0",
                "1",
            ),
            HEAD: f"{_STAGED_UNIT}.{sk}.fcs.{{branch}}",
            "head": "classifier",
        },
        fc2_bias=True,
    )


LAYOUTS: Mapping[LayoutName, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="sknet_triton",
            mark="stages.0.0.sk.branches.0.conv.weight",
            modules={
                **_blocks({path: path for path in _OURS}, "conv", "bn"),
                f"{_UNIT}.sk.fc1.norm": f"{_UNIT}.sk.fc1.norm",
                FC2: FC2,
                "head": "head",
            },
            first=(0, 0, 0),
            fc2_bias=True,
        ),
        Layout(
            name="timm",
            mark="layer1.0.conv2.paths.0.conv.weight",
            modules={
                "stem.conv": "conv1",
                "stem.bn": "bn1",
                **_blocks(
                    {
                        f"{_UNIT}.reduce": f"{_TIMM_UNIT}.conv1",
                        _BRANCH: f"{_TIMM_UNIT}.conv2.paths.{{branch}}",
                        f"{_UNIT}.increase": f"{_TIMM_UNIT}.conv3",
                    },
                    "conv",
                    "bn",
                ),
                f"{_UNIT}.sk.fc1.conv": f"{_TIMM_UNIT}.conv2.attn.fc_reduce",
                f"{_UNIT}.sk.fc1.bn": f"{_TIMM_UNIT}.conv2.attn.bn",
                FC2: f"{_TIMM_UNIT}.conv2.attn.fc_select",
                **_blocks({f"{_UNIT}.shortcut": f"{_TIMM_UNIT}.downsample"}, "0", "1"),
                "head": "fc",
            },
        ),
        Layout(
            name="ports",
            mark="layer1.0.conv2.conv.0.0.weight",
            modules={
                **_blocks(
                    {
                        "stem": "conv",
                        f"{_UNIT}.reduce": f"{_TIMM_UNIT}.conv1",
                        _BRANCH: f"{_TIMM_UNIT}.conv2.conv.{{branch}}",
                        f"{_UNIT}.sk.fc1": f"{_TIMM_UNIT}.conv2.fc1",
                        f"{_UNIT}.increase": f"{_TIMM_UNIT}.conv3",
                        f"{_UNIT}.shortcut": f"{_TIMM_UNIT}.downsample",
                    },
                    "0",
                    "1",
                ),
                FC2: f"{_TIMM_UNIT}.conv2.fc2",
                "head": "fc",
            },
        ),
        Layout(
            name="pytorchcv",
            mark="features.stage1.unit1.body.conv2.branches.branch2.conv.weight",
            modules={
                **_blocks(
                    {
                        "stem": "features.init_block.conv",
                        f"{_UNIT}.reduce": f"{_CV_UNIT}.body.conv1",
                        _BRANCH: f"{_CV_UNIT}.body.conv2.branches.branch{{branch}}",
                        f"{_UNIT}.sk.fc1": f"{_CV_UNIT}.body.conv2.fc1",
                        f"{_UNIT}.increase": f"{_CV_UNIT}.body.conv3",
                        f"{_UNIT}.shortcut": f"{_CV_UNIT}.identity_conv",
                    },
                    "conv",
                    "bn",
                ),
                FC2: f"{_CV_UNIT}.body.conv2.fc2",
                "head": "output",
            },
            first=(1, 1, 2),
        ),
        _staged("developer0hye", "conv2_sk"),
        _staged("syt2", "conv2"),
        Layout(
            name="pytorchinsight",
            mark="layer1.0.conv2g.weight",
            modules={
                "stem.conv": "conv1",
                "stem.bn": "bn1",
                f"{_UNIT}.reduce.conv": f"{_TIMM_UNIT}.conv1",
                f"{_UNIT}.reduce.bn": f"{_TIMM_UNIT}.bn1",
                f"{_UNIT}.sk.branches.0.conv": f"{_TIMM_UNIT}.conv2",
                f"{_UNIT}.sk.branches.0.bn": f"{_TIMM_UNIT}.bn2",
                f"{_UNIT}.sk.branches.1.conv": f"{_TIMM_UNIT}.conv2g",
                f"{_UNIT}.sk.branches.1.bn": f"{_TIMM_UNIT}.bn2g",
                f"{_UNIT}.sk.fc1.conv": f"{_TIMM_UNIT}.conv_fc1",
                f"{_UNIT}.sk.fc1.bn": f"{_TIMM_UNIT}.bn_fc1",
                FC2: f"{_TIMM_UNIT}.conv_fc2",
                f"{_UNIT}.increase.conv": f"{_TIMM_UNIT}.conv3",
                f"{_UNIT}.increase.bn": f"{_TIMM_UNIT}.bn3",
                **_blocks({f"{_UNIT}.shortcut": f"{_TIMM_UNIT}.downsample"}, "0", "1"),
                "head": "fc",
            },
        ),
    )
}

_NUMBERS = ("stage", "unit", "branch")


def renamer(layout: Layout, *, back: bool = False) -> Callable[[str], str | None]:
    """Returns the function from a key of ``layout`` to this package's.

    It gives None for a key that is not in the layout's table. ``back`` is the other direction.
    """
    pairs = [(theirs, ours) for ours, theirs in layout.modules.items()]
    pairs = [(ours, theirs) for theirs, ours in pairs] if back else pairs
    patterns = [(_pattern(known), wanted) for known, wanted in pairs]
    sign = 1 if back else -1
    steps = {name: sign * first for name, first in zip(_NUMBERS, layout.first, strict=True)}

    def rename(key: str) -> str | None:
        path, _, leaf = key.rpartition(".")
        for pattern, wanted in patterns:
            match = pattern.fullmatch(path)
            if match is None:
                continue
            numbers = {name: int(text) + steps[name] for name, text in match.groupdict().items()}
            if min(numbers.values(), default=0) >= 0:
                return f"{wanted.format(**numbers)}.{leaf}"
        return None

    return rename


def _pattern(template: str) -> re.Pattern[str]:
    # No leading zeros: every key that matches is the one that the numbers give back.
    fields = {name: f"(?P<{name}>0|[1-9][0-9]*)" for name in _NUMBERS}
    return re.compile(template.replace(".", r"\.").format(**fields))
