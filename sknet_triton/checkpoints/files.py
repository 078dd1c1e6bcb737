"""Reading checkpoints from files, told by their content and not by their names."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Reads a safetensors file or one that torch.save wrote, onto the CPU.

    A torch file is read with ``weights_only=True``: a pickle that wants more than tensors and plain
    containers is refused, and nothing of it is run.

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
    if head.startswith((_ZIP, _PICKLE)):
        return _read_torch(path)
    # A header of JSON after its length in eight bytes.
    if head[8:] == b"{":
        return read_safetensors(path)
    raise ValueError(
        f"{path}: expected a safetensors file or one that torch.save wrote, got "
        f"{f'one that begins with {head!r}' if head else 'an empty one'}"
    )


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
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
