"""Means of weights by unit, scale and class, kept as sums."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sknet_triton.analysis.units import Unit

Label = int | None


@dataclass(frozen=True)
class Row:
    """Means over the images of one class at one scale, and over channels, for one unit.

    Attributes:
        scale: how much the images were enlarged.
        path: as in `Unit`.
        stage: as in `Unit`.
        index: as in `Unit`.
        label: the class; None where images have none.
        images: how many.
        weights: of every branch.
    """

    scale: float
    path: str
    stage: int
    index: int
    label: Label
    images: int
    weights: tuple[float, ...]

    @property
    def difference(self) -> float:
        """The last branch's weight minus the first's."""
        return self.weights[-1] - self.weights[0]


@dataclass
class _Sum:
    images: int
    weights: Tensor


@dataclass
class Means:
    """Sums over images of the weights' means over channels."""

    _sums: dict[tuple[float, Unit, Label], _Sum] = field(default_factory=dict)
    _units: dict[Unit, None] = field(default_factory=dict)
    _scale: float = 1.0
    _labels: list[Label] = field(default_factory=list)

    def begin(self, scale: float, labels: list[Label]) -> None:
        """Says whose weights the reports until the next `begin` are about."""
        self._scale, self._labels = scale, labels

    def reporter(self, unit: Unit) -> Callable[[Tensor], None]:
        """Returns what takes the weights [B, M, C] of ``unit``.

        Raises:
            ValueError: (the function) B is not the number of labels.
        """
        self._units[unit] = None
        return lambda weights: self._add(unit, weights)

    def rows(self) -> list[Row]:
        """Returns the means, by scale, then unit, then class."""
        units = list(self._units)
        order = sorted(
            self._sums.items(),
            key=lambda item: (item[0][0], units.index(item[0][1]), _sortable(item[0][2])),
        )
        return [
            Row(
                scale,
                unit.path,
                unit.stage,
                unit.index,
                label,
                total.images,
                tuple((total.weights / total.images).tolist()),
            )
            for (scale, unit, label), total in order
        ]

    def _add(self, unit: Unit, weights: Tensor) -> None:
        if len(weights) != len(self._labels):
            raise ValueError(
                f"model: expected weights for each of {len(self._labels)} images in {unit.path!r}, "
                f"got {len(weights)}, which no class can be told for"
            )
        by_image = weights.mean(2)
        places: dict[Label, list[int]] = {}
        for i, label in enumerate(self._labels):
            places.setdefault(label, []).append(i)
        for label, at in places.items():
            key = (self._scale, unit, label)
            new = _Sum(len(at), by_image[at].sum(0))
            if key in self._sums:
                new.images += self._sums[key].images
                new.weights += self._sums[key].weights
            self._sums[key] = new


def _sortable(label: Label) -> tuple[bool, int]:
    return (label is not None, label or 0)
