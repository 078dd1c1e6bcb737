"""Loading another implementation's checkpoint into a model of this package."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sknet_triton.checkpoints.convert import convert_state_dict
from sknet_triton.checkpoints.detect import Source
from sknet_triton.checkpoints.diff import CheckpointMismatchError, StateDiff, diff_states
from sknet_triton.checkpoints.files import read_checkpoint
from sknet_triton.checkpoints.hints import hints
from sknet_triton.checkpoints.layouts import LAYOUTS


def load_checkpoint(
    model: nn.Module,
    checkpoint: Mapping[str, Any] | str | os.PathLike[str],
    source: Source = "auto",
    strict: bool = True,
) -> StateDiff:
    """Loads a checkpoint of any known layout into ``model``, if it fits.

    It is compared before anything is loaded: a refusal leaves ``model`` as it was.

    Args:
        model: an `SKNet`, or a module with the same names.
        checkpoint: a state dict or a training script's checkpoint, as `convert_state_dict` takes
            it, or the path of a safetensors or torch file, as `read_checkpoint` takes it.
        source: as in `convert_state_dict`.
        strict: whether every key and shape must agree; else what agrees is loaded.

    Returns:
        The differences: with ``strict`` there are none.

    Raises:
        CheckpointMismatchError: with ``strict``, a key or a shape does not agree; a ValueError
            with the list of them, and the published network that the checkpoint does fit.
        ImportError, OSError, TypeError, ValueError: as in `convert_state_dict` and
            `read_checkpoint`; or ``model`` has other names, or is on the meta device.
    """
    state = _state(model)
    if isinstance(checkpoint, (str, os.PathLike)):
        tensors = convert_state_dict(read_checkpoint(checkpoint), source)
    else:
        tensors = convert_state_dict(checkpoint, source)
    diff = diff_states(state, tensors)
    if diff and strict:
        raise CheckpointMismatchError(diff, hints(diff, tensors))
    differing = {row.key for row in diff}
    model.load_state_dict({k: v for k, v in tensors.items() if k not in differing}, strict=False)
    return diff


def _state(model: nn.Module) -> Mapping[str, Tensor]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    state: Mapping[str, Tensor] = model.state_dict()
    if LAYOUTS["sknet_triton"].mark not in state:
        raise ValueError(
            f"model: expected an SKNet or a module with its names, got {type(model).__name__}; of "
            "a wrapper pass what is inside, such as ddp.module or compiled._orig_mod"
        )
    if any(tensor.device == torch.device("meta") for tensor in state.values()):
        raise ValueError(
            "model: expected memory for its tensors, got the meta device; "
            "model.to_empty(device=...) gives it some"
        )
    return state
