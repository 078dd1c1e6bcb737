"""The config.json of an SKNet: read off a network, and checked before a network is built."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from sknet_triton.checkpoints.diff import diff_states
from sknet_triton.layers import SKUnit
from sknet_triton.models import SKNet, StageSpec

MODEL_TYPE = "sknet"
# Far beyond any network, and small enough to be built without its tensors.
_MOST_UNITS, _MOST_CHANNELS = 1024, 2**20
_Check = Callable[[str, Any], Any]


def to_config(model: SKNet) -> dict[str, Any]:
    """Returns what builds ``model`` again, as plain data.

    Raises:
        ValueError: an SKNet built from it would have other tensors, as after `fuse_bn`.
    """
    first = cast(SKUnit, cast(nn.Sequential, model.stages[0])[0]).sk
    convs = [cast(nn.Conv2d, branch.get_submodule("conv")) for branch in first.branches]
    norms = {"bn": "batch", "norm": "layer"}
    children = [name for name, _ in first.fc1.named_children()] if first.aggregate == "sk" else []
    config = {
        "model_type": MODEL_TYPE,
        "stages": [_stage(cast(nn.Sequential, stage)) for stage in model.stages],
        "num_classes": model.num_classes,
        "in_chans": cast(nn.Conv2d, model.stem.get_submodule("conv")).in_channels,
        "variant": "caffe" if model.pool.ceil_mode else "paper",
        "unit_options": {
            "branches": [[c.kernel_size[0], c.dilation[0], c.groups] for c in convs],
            "aggregate": first.aggregate,
            "fc_norm": next((norms[name] for name in children if name in norms), "none"),
        },
    }
    rebuilt = SKNet(**from_config(config), device="meta")
    diff = diff_states(rebuilt.state_dict(), model.state_dict())
    if diff:
        raise ValueError(f"model: expected an SKNet as it was built, got changes: {diff}")
    return config


def from_config(config: Any) -> dict[str, Any]:
    """Checks a config and returns the arguments of `SKNet`.

    Raises:
        ValueError: a key is missing or unknown, or a value is of the wrong kind or out of range;
            named with the value.
    """
    given = _record("config", config, _CONFIG)
    if given.pop("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type: expected {MODEL_TYPE!r}, got {config['model_type']!r}")
    return given


def _stage(stage: nn.Sequential) -> dict[str, int | None]:
    sk = cast(SKUnit, stage[0]).sk
    d = sk.fc2.in_channels if sk.aggregate == "sk" else None
    return {"width": sk.out_channels, "units": len(stage), "stride": sk.stride, "d": d}


def _record(name: str, value: Any, checks: Mapping[str, _Check]) -> dict[str, Any]:
    """Checks a mapping with exactly the keys of ``checks``."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {value!r}")
    if value.keys() != checks.keys():
        raise ValueError(
            f"{name}: expected the keys {', '.join(checks)}, got {', '.join(map(str, value))}"
        )
    return {key: check(f"{name}.{key}", value[key]) for key, check in checks.items()}


def _integer(least: int, most: int) -> _Check:
    def check(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value!r}")
        return value

    return check


def _optional(inner: _Check) -> _Check:
    return lambda name, value: None if value is None else inner(name, value)


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {value!r}")
    return value


def _tuple(inner: _Check, length: int | None = None) -> _Check:
    def check(name: str, value: Any) -> tuple[Any, ...]:
        right = isinstance(value, Sequence) and not isinstance(value, str)
        if not right or (length is not None and len(value) != length):
            size = "" if length is None else f" of {length}"
            raise ValueError(f"{name}: expected a list{size}, got {value!r}")
        return tuple(inner(f"{name}[{i}]", item) for i, item in enumerate(value))

    return check


def _stage_spec(name: str, value: Any) -> StageSpec:
    return StageSpec(**_record(name, value, _STAGE))


def _unit_options(name: str, value: Any) -> dict[str, Any]:
    return _record(name, value, _OPTIONS)


_channels = _integer(1, _MOST_CHANNELS)
_STAGE = {
    "width": _channels,
    "units": _integer(1, _MOST_UNITS),
    "stride": _channels,
    "d": _optional(_channels),
}
_OPTIONS = {
    "branches": _tuple(_tuple(_channels, 3)),
    "aggregate": _string,
    "fc_norm": _string,
}
_CONFIG = {
    "model_type": _string,
    "stages": _tuple(_stage_spec),
    "num_classes": _integer(0, _MOST_CHANNELS),
    "in_chans": _channels,
    "variant": _string,
    "unit_options": _unit_options,
}
