"""Loading another implementation's checkpoint into a model of this package.

Files are told by their content and not by their names. What keeps a checkpoint from loading is
listed key by key.
"""

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sknet_triton.checkpoints.convert import Source, convert_state_dict
from sknet_triton.checkpoints.layouts import LAYOUTS

Kind = Literal["missing", "unexpected", "different"]

# As many lines as a terminal shows at once.
_MOST_LINES = 20


class Entry(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class Difference:
    """What a model and a checkpoint have under one key, None for nothing.

    The key is in this package's names, or as the checkpoint has it where it is no such name.
    """

    key: str
    model: Entry | None
    checkpoint: Entry | None

    @property
    def kind(self) -> Kind:
        """``"missing"`` from the checkpoint, ``"unexpected"`` in it, or ``"different"``."""
        if self.checkpoint is None:
            return "missing"
        return "unexpected" if self.model is None else "different"

    def __str__(self) -> str:
        line = f"{self.kind:<10}  {self.key}: {self.checkpoint or self.model}"
        return f"{line}, the model has {self.model}" if self.kind == "different" else line


@dataclass(frozen=True)
class StateDiff:
    """The differences in the model's order, then what only the checkpoint has.

    Printing it gives a line a key, at most twenty. It is false where there are none.
    """

    rows: tuple[Difference, ...]

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self, kind: Kind) -> list[str]:
        """Returns the keys of that kind."""
        return [row.key for row in self.rows if row.kind == kind]

    def __str__(self) -> str:
        counts = {kind: len(self.keys(kind)) for kind in get_args(Kind)}
        head = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        lines = [head or "no differences", *map(str, self.rows[:_MOST_LINES])]
        if len(self) > _MOST_LINES:
            lines.append(f"... and {len(self) - _MOST_LINES} more")
        return "\n".join(lines)


class CheckpointMismatchError(ValueError):
    """A checkpoint does not fit a model.

    Attributes:
        diff: every difference; the message shows the first.
    """

    def __init__(self, diff: StateDiff) -> None:
        super().__init__(diff)
        self.diff = diff

    def __str__(self) -> str:
        lines = [f"the checkpoint does not fit the model: {self.diff}", *_hints(self.diff)]
        return "\n".join(lines)


def _hints(diff: StateDiff) -> Iterator[str]:
    """Yields what a person can do about ``diff``, a line each."""
    rows = {row.key: row for row in diff}
    if rows.keys() == {"head.weight", "head.bias"}:
        found, wanted = rows["head.weight"].checkpoint, rows["head.weight"].model
        yield (
            f"only the head differs: num_classes is {found.shape[0] if found else 0} in the "
            f"checkpoint and {wanted.shape[0] if wanted else 0} in the model; strict=False loads "
            "all the rest"
        )
    if any(key.endswith(".sk.fc2.bias") for key in diff.keys("unexpected")):
        yield (
            "fc2 of SKConv has no bias: fold_fc2_bias(convert_state_dict(...)) moves it into one "
            "more channel of fc1, for which d of a StageSpec makes room"
        )


def diff_states(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> StateDiff:
    """Compares keys, shapes, and whether the tensors are of floating point.

    A count of batches that the checkpoint lacks is no difference: PyTorch before 0.4.1 had none.
    """
    rows = []
    for key in (*model, *(key for key in checkpoint if key not in model)):
        wanted, found = (
            None if key not in state else Entry(tuple(state[key].shape), state[key].dtype)
            for state in (model, checkpoint)
        )
        if wanted is None or found is None:
            differs = found is not None or not key.endswith(".num_batches_tracked")
        else:
            same_kind = wanted.dtype.is_floating_point == found.dtype.is_floating_point
            differs = wanted.shape != found.shape or not same_kind
        if differs:
            rows.append(Difference(key, wanted, found))
    return StateDiff(tuple(rows))


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
            with the list of them.
        ImportError, OSError, TypeError, ValueError: as in `convert_state_dict` and
            `read_checkpoint`; or ``model`` has other names, or is on the meta device.
    """
    state = _state(model)
    state_dict: Any = checkpoint
    if isinstance(checkpoint, (str, os.PathLike)):
        state_dict = read_checkpoint(checkpoint)
    tensors = convert_state_dict(state_dict, source)
    diff = diff_states(state, tensors)
    if diff and strict:
        raise CheckpointMismatchError(diff)
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


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Reads a safetensors file or one that torch.save wrote, onto the CPU.

    A pickle that wants more than tensors and plain containers is refused, and nothing of it is run.

    Returns:
        What the file holds, for `convert_state_dict` or `load_checkpoint`.

    Raises:
        ImportError: safetensors is needed and not installed.
        OSError: the file cannot be opened.
        ValueError: it is a folder, is neither kind of file, is damaged, or holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path}: expected a file, got a folder; SKNetHub.from_pretrained of "
            "sknet_triton.checkpoints.hub reads one that save_pretrained wrote"
        )
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip file or a pickle
        return _read_torch(path)
    if head[8:] == b"{":  # a header of JSON after its length in eight bytes
        return read_safetensors(path)
    raise ValueError(
        f"{path}: expected a safetensors file or one that torch.save wrote, got "
        f"{f'one that begins with {head!r}' if head else 'an empty one'}"
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU; raises as `read_checkpoint`."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{path}: a safetensors file needs safetensors: pip install 'sknet-triton[hub]'"
        ) from error
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: the safetensors file is damaged: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        # A file and no path: of a path, torch.load would go by the suffix.
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {asked[1]}" if asked else "is damaged or asks for more than tensors"
        # Not chained: torch's message advises to load it all the same.
        raise ValueError(
            f"{path}: the pickle {what}, and only tensors are loaded, since anything else could "
            "run code. Of a file that you trust, pass the state dict that torch.load returns"
        ) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes torch.load raise all kinds of exceptions
        raise ValueError(f"{path}: the torch file cannot be read: {error}") from error
