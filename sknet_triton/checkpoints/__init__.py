"""Checkpoints: of other implementations, of files, and, in `hub`, of the Hugging Face Hub."""

from sknet_triton.checkpoints.convert import convert_state_dict, fold_fc2_bias
from sknet_triton.checkpoints.load import (
    CheckpointMismatchError,
    Difference,
    StateDiff,
    load_checkpoint,
    read_checkpoint,
)

__all__ = [
    "CheckpointMismatchError",
    "Difference",
    "StateDiff",
    "convert_state_dict",
    "fold_fc2_bias",
    "load_checkpoint",
    "read_checkpoint",
]
