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

    @property
    def has_heads(self) -> bool:
        """Whether fc2 is one head a branch, which conversion joins and splits."""
        return f"{_UNIT}.sk.fc2.{{branch}}" in self.modules


_UNIT = "stages.{stage}.{unit}"


def _modules(stem: str, unit: str, inside: Mapping[str, str], head: str) -> dict[str, str]:
    """Completes the paths inside a unit, and spells blocks out.

    A block holds a convolution and its batch norm: ``{kind}`` stands for conv and bn, ``{n}`` for
    0 and 1.
    """
    paths = {"stem": stem, **{f"{_UNIT}.{a}": f"{unit}.{b}" for a, b in inside.items()}}
    modules = {"head": head}
    for ours, theirs in paths.items():
        if "{kind}" in theirs or "{n}" in theirs:
            for n, kind in enumerate(("conv", "bn")):
                spelt = theirs.replace("{kind}", kind).replace("{n}", str(n))
                modules[f"{ours}.{kind}"] = spelt
        else:
            modules[ours] = theirs
    return modules


def _staged(name: LayoutName, sk: str) -> Layout:
    """The two implementations with ``stage_1``, ``convs`` and a biased head a branch."""
    inside = {
        "reduce": "conv1.{n}",
        "sk.branches.{branch}": f"{sk}.convs.{{branch}}.{{n}}",
        "sk.fc1": f"{sk}.fc.{{n}}",
        "sk.fc2.{branch}": f"{sk}.fcs.{{branch}}",
        "increase": "conv3.{n}",
        "shortcut": "shortcut.{n}",
    }
    modules = _modules("basic_conv.{n}", "stage_{stage}.{unit}", inside, "classifier")
    return Layout(name, f"stage_1.0.{sk}.convs.0.0.weight", modules, fc2_bias=True)


_OURS = {
    "reduce": "reduce.{kind}",
    "sk.branches.{branch}": "sk.branches.{branch}.{kind}",
    "sk.fc1": "sk.fc1.{kind}",
    "sk.fc1.norm": "sk.fc1.norm",
    "sk.fc2": "sk.fc2",
    "increase": "increase.{kind}",
    "shortcut": "shortcut.{kind}",
}
_TIMM = {
    "reduce": "conv1.{kind}",
    "sk.branches.{branch}": "conv2.paths.{branch}.{kind}",
    "sk.fc1.conv": "conv2.attn.fc_reduce",
    "sk.fc1.bn": "conv2.attn.bn",
    "sk.fc2": "conv2.attn.fc_select",
    "increase": "conv3.{kind}",
    "shortcut": "downsample.{n}",
}
_PORTS = {
    "reduce": "conv1.{n}",
    "sk.branches.{branch}": "conv2.conv.{branch}.{n}",
    "sk.fc1": "conv2.fc1.{n}",
    "sk.fc2": "conv2.fc2",
    "increase": "conv3.{n}",
    "shortcut": "downsample.{n}",
}
_PYTORCHCV = {
    "reduce": "body.conv1.{kind}",
    "sk.branches.{branch}": "body.conv2.branches.branch{branch}.{kind}",
    "sk.fc1": "body.conv2.fc1.{kind}",
    "sk.fc2": "body.conv2.fc2",
    "increase": "body.conv3.{kind}",
    "shortcut": "identity_conv.{kind}",
}
_INSIGHT = {
    "reduce": "{kind}1",
    "sk.branches.0": "{kind}2",
    "sk.branches.1": "{kind}2g",
    "sk.fc1": "{kind}_fc1",
    "sk.fc2": "conv_fc2",
    "increase": "{kind}3",
    "shortcut": "downsample.{n}",
}

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "sknet_triton",
            "stages.0.0.sk.branches.0.conv.weight",
            _modules("stem.{kind}", _UNIT, _OURS, "head"),
            first=(0, 0, 0),
            fc2_bias=True,
        ),
        Layout(
            "timm",
            "layer1.0.conv2.paths.0.conv.weight",
            _modules("{kind}1", "layer{stage}.{unit}", _TIMM, "fc"),
        ),
        Layout(
            "ports",
            "layer1.0.conv2.conv.0.0.weight",
            _modules("conv.{n}", "layer{stage}.{unit}", _PORTS, "fc"),
        ),
        Layout(
            "pytorchcv",
            "features.stage1.unit1.body.conv2.branches.branch2.conv.weight",
            _modules(
                "features.init_block.conv.{kind}",
                "features.stage{stage}.unit{unit}",
                _PYTORCHCV,
                "output",
            ),
            first=(1, 1, 2),
        ),
        _staged("developer0hye", "conv2_sk"),
        _staged("syt2", "conv2"),
        Layout(
            "pytorchinsight",
            "layer1.0.conv2g.weight",
            _modules("{kind}1", "layer{stage}.{unit}", _INSIGHT, "fc"),
        ),
    )
}

_NUMBERS = ("stage", "unit", "branch")


def renamer(layout: Layout, *, back: bool = False) -> Callable[[str], str | None]:
    """Returns the function from a key of ``layout`` to this package's.

    It gives None for a key that is not in the layout's table. ``back`` is the other direction.
    """
    pairs = [(o, t) if back else (t, o) for o, t in layout.modules.items()]
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
