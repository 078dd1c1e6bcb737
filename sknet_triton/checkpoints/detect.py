"""Which layout a state dict has, and under which prefix."""

from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

from sknet_triton.checkpoints.layouts import LAYOUTS, Layout, LayoutName

Source = Literal[LayoutName, "auto"]


class Found(NamedTuple):
    """A layout, and what its keys begin with: empty, or such as ``module.`` or ``encoder.``."""

    layout: Layout
    prefix: str


def layout_called(argument: str, name: str) -> Layout:
    """Returns the layout of that name.

    Raises:
        ValueError: there is none; ``argument`` says where ``name`` was given.
    """
    for layout in LAYOUTS.values():
        if layout.name == name:
            return layout
    names = ", ".join(map(repr, get_args(LayoutName)))
    raise ValueError(f"{argument}: expected one of {names}, got {name!r}")


def detect(keys: Collection[str], source: str) -> Found:
    """Finds the layout of ``keys`` by its mark: ``source``, or for ``"auto"`` the one that fits.

    Raises:
        ValueError: ``source`` is unknown; no layout fits, or several, or one under several
            prefixes.
    """
    wanted = LAYOUTS.values() if source == "auto" else [layout_called("source", source)]
    found = [
        Found(layout, key.removesuffix(layout.mark))
        for layout in wanted
        for key in keys
        if f".{key}".endswith(f".{layout.mark}")
    ]
    if not found:
        looked_for = "".join(f"\n  {layout.name}: {layout.mark}" for layout in wanted)
        raise ValueError(
            f"state_dict: no layout of an SKNet found for source={source!r}. Looked for a key, "
            f"after any prefix:{looked_for}\nin {len(keys)} keys: {_first(keys)}"
        )
    if len(found) > 1:
        places = ", ".join(f"{layout.name} under {prefix!r}" for layout, prefix in found)
        raise ValueError(f"state_dict: expected one network, got {len(found)}: {places}")
    return found[0]


def _first(keys: Collection[str], most: int = 5) -> str:
    shown = ", ".join(list(keys)[:most])
    return f"{shown}, ..." if len(keys) > most else shown
