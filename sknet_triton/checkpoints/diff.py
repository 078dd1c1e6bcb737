"""What keeps a checkpoint from loading, key by key."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

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
    """One key.

    Attributes:
        key: in this package's names, or as the checkpoint has it where it is no such name.
        model: what the model has there, None for nothing.
        checkpoint: what the checkpoint has there, None for nothing.
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
        kinds: tuple[Kind, ...] = ("missing", "unexpected", "different")
        counts = {kind: len(self.keys(kind)) for kind in kinds}
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

    def __init__(self, diff: StateDiff, hints: tuple[str, ...] = ()) -> None:
        self.diff = diff
        text = "\n".join([f"the checkpoint does not fit the model: {diff}", *hints])
        super().__init__(text)
        self.hints = hints

    def __reduce__(
        self,
    ) -> tuple[type["CheckpointMismatchError"], tuple[StateDiff, tuple[str, ...]]]:
        # The default would call the class with the message.
        return type(self), (self.diff, self.hints)


def diff_states(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> StateDiff:
    """Compares keys, shapes, and whether the tensors are of floating point.

    A count of batches that the checkpoint lacks is no difference: PyTorch before 0.4.1 had none.
    """
    rows = []
    for key, tensor in model.items():
        found = checkpoint.get(key)
        if found is None:
            if not key.endswith(".num_batches_tracked"):
                rows.append(Difference(key, _entry(tensor), None))
        elif not _fits(tensor, found):
            rows.append(Difference(key, _entry(tensor), _entry(found)))
    extra = [key for key in checkpoint if key not in model]
    rows += [Difference(key, None, _entry(checkpoint[key])) for key in extra]
    return StateDiff(tuple(rows))


def _fits(tensor: Tensor, found: Tensor) -> bool:
    same_kind = tensor.is_floating_point() == found.is_floating_point()
    return tensor.shape == found.shape and same_kind


def _entry(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype)
