"""What `accelerate` and `restore` did, module by module."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["accelerated", "restored", "left"]


@dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        path: its name in the model, as ``model.get_submodule`` takes it; empty for the model.
        kind: its family, or the name of its class where none was found.
        status: what became of it.
        reason: why it was left, or a remark.
    """

    path: str
    kind: str
    status: Status
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.status:<11}  {self.path or '(the model)'}  [{self.kind}]"
        return f"{text}  {self.reason}" if self.reason else text


@dataclass(frozen=True)
class Report:
    """The rows in the model's order; printing it gives one line a module."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def paths(self, status: Status) -> list[str]:
        """Returns the paths of the modules with that status."""
        return [row.path for row in self.rows if row.status == status]

    def __str__(self) -> str:
        if not self.rows:
            return "no selective-kernel module found"
        counts = {s: len(self.paths(s)) for s in ("accelerated", "restored", "left")}
        head = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return "\n".join([head, *map(str, self.rows)])
