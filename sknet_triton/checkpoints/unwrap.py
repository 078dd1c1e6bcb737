"""The state dict inside of what training scripts save."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Under these keys a training script's checkpoint has its state dict.
_HOLDERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "state_dict_ema",
    "model_ema",
)
# Modules that torch.compile, activation checkpointing and FSDP put around a part of a network.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint without the names of wrappers within their keys.

    Raises:
        TypeError: ``checkpoint`` is no mapping from strings.
        ValueError: it holds no state dict or several, or something other than dense tensors.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(checkpoint).__name__}")
    held = [name for name in _HOLDERS if isinstance(checkpoint.get(name), Mapping)]
    if len(held) > 1:
        raise ValueError(
            f"state_dict: expected one state dict, got {len(held)}, under {held}; pass one of them"
        )
    if held:
        return unwrap(checkpoint[held[0]])
    tensors: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        _check(key, value)
        name = _bare(key)
        if name in tensors:
            raise ValueError(f"state_dict: two keys stand for {name!r}, one of them {key!r}")
        tensors[name] = value
    return tensors


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _check(key: Any, value: Any) -> None:
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
