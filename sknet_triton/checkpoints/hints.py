"""What a person can do about a checkpoint that does not fit."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from sknet_triton.checkpoints.diff import StateDiff, diff_states
from sknet_triton.checkpoints.heads import fold_fc2_bias
from sknet_triton.checkpoints.layouts import LAYOUTS
from sknet_triton.checkpoints.names import renamer
from sknet_triton.models import SKNet, StageSpec
from sknet_triton.models.sknet import SKNET26, SKNET50, SKNET101, SKNET101_CAFFE

Stages = tuple[StageSpec, ...]

# Function, arguments, table.
_PUBLISHED: tuple[tuple[str, tuple[str, ...], Stages], ...] = (
    ("sknet26", (), SKNET26),
    ("sknet50", (), SKNET50),
    ("sknet101", (), SKNET101),
    ("sknet101", ("variant='caffe'",), SKNET101_CAFFE),
)
_DEFAULTS = {"num_classes": 1000, "in_chans": 3, "M": 2}
_UNIT = re.compile(r"stages\.(\d+)\.\d+\.reduce\.conv\.weight")
_BRANCH = re.compile(r"stages\.0\.0\.sk\.branches\.\d+\.conv\.weight")


def hints(diff: StateDiff, checkpoint: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns advice about ``diff``, a line each; ``checkpoint`` has this package's keys."""
    known = renamer(LAYOUTS["sknet_triton"])
    tensors = {key: tensor for key, tensor in checkpoint.items() if known(key) is not None}
    return (*_about_head(diff), *_about_bias(diff), _about_models(_without_bias(tensors)))


def _about_head(diff: StateDiff) -> Iterator[str]:
    rows = {row.key: row for row in diff}
    if rows.keys() != {"head.weight", "head.bias"}:
        return
    found, wanted = rows["head.weight"].checkpoint, rows["head.weight"].model
    yield (
        f"only the head differs: num_classes is {found.shape[0] if found else 0} in the checkpoint "
        f"and {wanted.shape[0] if wanted else 0} in the model; strict=False loads all the rest"
    )


def _about_bias(diff: StateDiff) -> Iterator[str]:
    if any(key.endswith(".sk.fc2.bias") for key in diff.keys("unexpected")):
        yield (
            "fc2 of SKConv has no bias: fold_fc2_bias(convert_state_dict(...)) moves it into one "
            "more channel of fc1, for which d of a StageSpec makes room"
        )


def _without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return fold_fc2_bias(tensors)
    except ValueError:  # no SKNet fits them either way, which is what will be said
        return tensors


def _about_models(tensors: Mapping[str, Tensor]) -> str:
    """Names the published network that the tensors fit by keys and shapes."""
    sizes, units = _sizes(tensors), _units(tensors)
    given = [f"{name}={size}" for name, size in sizes.items() if size != _DEFAULTS[name]]
    for name, arguments, stages in _candidates(tensors):
        if [spec.units for spec in stages] == units and not _differs(stages, sizes, tensors):
            return f"what it fits: {name}({', '.join([*arguments, *given])})"
    names = ", ".join(dict.fromkeys(name for name, _, _ in _PUBLISHED))
    return f"it fits none of {names}, whatever their {', '.join(_DEFAULTS)} and d"


def _candidates(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str], Stages]]:
    """Yields the published networks, then with the widths of fc1 that the checkpoint has."""
    for name, arguments, stages in _PUBLISHED:
        yield name, list(arguments), stages
    for _, _, stages in _PUBLISHED:
        wide = tuple(_with_width(spec, i, tensors) for i, spec in enumerate(stages))
        yield "SKNet", [f"({', '.join(map(_text, wide))})"], wide


def _differs(stages: Stages, sizes: Mapping[str, int], tensors: Mapping[str, Tensor]) -> bool:
    options = {"M": sizes["M"]}
    try:
        model = SKNet(
            stages, sizes["num_classes"], sizes["in_chans"], unit_options=options, device="meta"
        )
    except ValueError:  # sizes that no SKNet has, such as no channel
        return True
    return bool(diff_states(model.state_dict(), tensors))


def _units(tensors: Mapping[str, Tensor]) -> list[int]:
    counts = Counter(match[1] for match in map(_UNIT.fullmatch, tensors) if match is not None)
    return [counts[str(stage)] for stage in range(len(counts))]


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {
        "num_classes": _size(tensors, "head.weight", 0, 0),
        "in_chans": _size(tensors, "stem.conv.weight", 1, _DEFAULTS["in_chans"]),
        "M": sum(_BRANCH.fullmatch(key) is not None for key in tensors),
    }


def _with_width(spec: StageSpec, stage: int, tensors: Mapping[str, Tensor]) -> StageSpec:
    d = _size(tensors, f"stages.{stage}.0.sk.fc2.weight", 1, 0)
    return replace(spec, d=d) if d else spec


def _size(tensors: Mapping[str, Tensor], key: str, axis: int, default: int) -> int:
    tensor = tensors.get(key)
    return default if tensor is None or tensor.dim() <= axis else tensor.shape[axis]


def _text(spec: StageSpec) -> str:
    return f"StageSpec({spec.width}, {spec.units}, {spec.stride}, d={spec.d})"
