"""Renaming keys between this package and a layout."""

import re
from collections.abc import Callable

from sknet_triton.checkpoints.layouts import Layout

_NUMBERS = ("stage", "unit", "branch")


def renamer(layout: Layout, *, back: bool = False) -> Callable[[str], str | None]:
    """Returns the function from a key of ``layout`` to this package's.

    It gives None for a key that is not in the layout's table. ``back`` is the other direction.
    """
    pairs = [(theirs, ours) for ours, theirs in layout.modules.items()]
    pairs = [(ours, theirs) for theirs, ours in pairs] if back else pairs
    patterns = [(_pattern(known), wanted) for known, wanted in pairs]
    sign = 1 if back else -1
    steps = {name: sign * first for name, first in zip(_NUMBERS, layout.first, strict=True)}

    def rename(key: str) -> str | None:
        path, _, leaf = key.rpartition(".")
        for pattern, wanted in patterns:
            match = pattern.fullmatch(path)
            if match is None:
                continue
            numbers = {name: int(text) + steps[name] for name, text in match.groupdict().items()}
            if min(numbers.values(), default=0) >= 0:
                return f"{wanted.format(**numbers)}.{leaf}"
        return None

    return rename


def _pattern(template: str) -> re.Pattern[str]:
    # No leading zeros: every key that matches is the one that the numbers give back.
    fields = {name: f"(?P<{name}>0|[1-9][0-9]*)" for name in _NUMBERS}
    return re.compile(template.replace(".", r"\.").format(**fields))
