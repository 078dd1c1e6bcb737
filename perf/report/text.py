"""Tables of text, for a terminal and for a document."""

from collections.abc import Mapping, Sequence
from typing import Literal

Align = Literal["left", "right"]

# Columns are this much wider than their names at least, so that names stand apart.
PADDING = 2


def text_table(
    lines: Sequence[Sequence[str]], columns: Mapping[str, Align], *, markdown: bool = False
) -> str:
    """Returns ``lines`` under the names of ``columns``, each cell where its column says."""
    widths = [
        max(len(name) + PADDING, *(len(line[i]) for line in lines), 0)
        for i, name in enumerate(columns)
    ]
    placed = [
        [
            cell.rjust(width) if align == "right" else cell.ljust(width)
            for cell, width, align in zip(line, widths, columns.values(), strict=True)
        ]
        for line in (list(columns), *lines)
    ]
    if markdown:
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        rows = [f"| {' | '.join(cells)} |" for cells in placed]
    else:
        rule = "  ".join("-" * width for width in widths)
        rows = ["  ".join(cells).rstrip() for cells in placed]
    return "\n".join([rows[0], rule, *rows[1:]])
