"""Recording how selective-kernel units weigh while a model sees images, as such or enlarged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sknet_triton.analysis.table import Label, Row, to_frame, with_change
from sknet_triton.analysis.units import Unit, sk_units, undisturbed, unwrapped
from sknet_triton.reference import accumulation_dtype

# Those of the paper's Figure 3; its Figure 4 has the first two.
SCALES = (1.0, 1.5, 2.0)

View = Callable[[Tensor], Tensor]


def record_attention(
    model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None
) -> pd.DataFrame:
    """Records how every selective-kernel unit weighs its branches, for each class of images.

    The model evaluates (dropout off, running statistics) without gradients. Afterwards, also after
    an error or an interrupt, its modes, buffers, hooks and torch's random states are as before.
    Sums are kept, in float64, not weights: the memory does not depend on the number of images.

    It works on every backend. Inside of torch.compile's and the data-parallel wrappers the module
    itself is run, eagerly; in a process group each process records what its own loader gives.

    Args:
        model: contains an `SKConv`, or modules that `accelerate` swapped or would swap; those have
            their branches computed twice.
        loader: yields (images, labels) or images: a tensor [B, ...] that the model takes, and a
            tensor, array or sequence of B integers.
        device: where images are moved; None for that of the model's first parameter.

    Returns:
        One row for every unit and class, in the model's order and that of the classes:

        - ``path``, ``stage``, ``index``: as in `Unit`.
        - ``label``: the class; missing where the loader gives none.
        - ``images``: how many images the means are over. A unit that the model calls k times
          counts each image k times; one that it does not call has no row.
        - ``difference``: the mean over images and channels of the last branch's weight minus the
          first's; for the published unit, of (dilated - 3x3).
        - ``weight_0``, ``weight_1``, ...: the same mean of every branch's weight; missing beyond
          the branches that a unit has.

    Raises:
        TypeError: an argument, or what the loader yields, is of another type.
        ValueError: the model has no such unit or calls none, the loader yields no image, or the
            labels or the maps in a unit are not as many as the images.
    """
    means = _record(model, loader, {1.0: lambda images: images}, device)
    return to_frame(means.rows()).drop(columns="scale")


def record_sizes(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    scales: Sequence[float] = SCALES,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Records the weights for images enlarged by each scale (figures 3 and 4 of the paper).

    The loader is gone through once: every scale sees the same images, by `enlarge`.

    Args:
        model: as in `record_attention`.
        loader: likewise; images are [B, C, H, W].
        scales: 1.0 and others above it.
        device: as in `record_attention`.

    Returns:
        The columns of `record_attention`, before them ``scale`` and beside ``difference``
        ``change``: the difference minus the one at 1.0 of the same unit and class.

    Raises:
        TypeError: as in `record_attention` and `enlarge`.
        ValueError: likewise, or ``scales`` lacks 1.0.
    """
    if 1.0 not in scales:
        raise ValueError(f"scales: expected 1.0 among them, got {tuple(scales)}")
    views = {float(scale): partial(enlarge, scale=scale) for scale in scales}
    return with_change(to_frame(_record(model, loader, views, device).rows()))


def enlarge(images: Tensor, scale: float) -> Tensor:
    """Enlarges images around their centre and keeps their size (Li et al. 2019, figure 3).

    The paper crops the centre and resizes the crop. Here the crop is exactly H / scale by
    W / scale, not rounded to whole pixels, and the resizing is bilinear: with pixel i covering
    [i, i + 1), the middle of output pixel i reads position n / 2 + (i + 1/2 - n / 2) / scale of a
    side of n pixels. So the centre stays the centre at odd and even sizes, every position read
    lies within the image, and 1.0 returns the same values. Beside ``F.interpolate`` of a crop of
    whole pixels only the outermost pixels differ: they read on across the border of the crop,
    where ``F.interpolate`` repeats its last pixel.

    Args:
        images: [..., H, W], floating point.
        scale: at least 1.

    Returns:
        Images of the same shape, dtype and device.

    Raises:
        TypeError: ``images`` is not a floating-point tensor.
        ValueError: ``scale`` is below 1, which would need pixels outside the image, or not finite;
            or ``images`` has fewer than two axes.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor, got {got}")
    if images.dim() < 2:
        raise ValueError(f"images: expected shape [..., H, W], got {tuple(images.shape)}")
    if not 1 <= scale < float("inf"):
        raise ValueError(f"scale: expected a finite number of at least 1, got {scale}")
    dtype = accumulation_dtype(images.dtype)
    rows, columns = (_reading(n, scale).to(images.device, dtype) for n in images.shape[-2:])
    return (rows @ images.to(dtype) @ columns.T).to(images.dtype)


@dataclass
class _Sum:
    images: int
    weights: Tensor


@dataclass
class _Means:
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


def _record(
    model: nn.Module,
    loader: Iterable[Any],
    views: Mapping[float, View],
    device: torch.device | str | None,
) -> _Means:
    _check_model(model)
    inner = unwrapped(model)
    units = sk_units(inner)
    where = next(inner.parameters()).device if device is None else torch.device(device)
    means = _Means()
    images_seen = 0
    with ExitStack() as stack:
        stack.enter_context(undisturbed(inner))
        for unit in units:
            stack.callback(unit.watch(means.reporter(unit)).remove)
        for batch in loader:
            images, labels = _split(batch)
            images_seen += len(images)
            for scale, view in views.items():
                means.begin(scale, labels)
                inner(view(images.to(where)))
    if not images_seen:
        raise ValueError("loader: expected at least one image, got none")
    if not means.rows():
        raise ValueError(
            f"model: expected one that calls its selective-kernel units, got "
            f"{type(inner).__name__}, which called none of its {len(units)}"
        )
    return means


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected a module in Python, got a TorchScript module")


def _split(batch: Any) -> tuple[Tensor, list[Label]]:
    """Returns the images of a batch, and a label for each, None where there are none."""
    images, labels = batch, None
    if isinstance(batch, (list, tuple)) and len(batch) in (1, 2):
        images, labels = batch[0], batch[1] if len(batch) == 2 else None
    if not isinstance(images, Tensor) or images.dim() == 0:
        raise TypeError(
            "loader: expected it to yield images or (images, labels), the images as a tensor "
            f"[B, ...], got {_described(batch)}"
        )
    if labels is None:
        return images, [None] * len(images)
    listed = labels.tolist() if hasattr(labels, "tolist") else labels
    if not isinstance(listed, (list, tuple)) or not all(type(label) is int for label in listed):
        raise TypeError(
            "loader: expected a tensor, array or sequence of integers as labels, "
            f"got {_described(labels)}"
        )
    if len(listed) != len(images):
        raise ValueError(f"loader: expected {len(images)} labels, one an image, got {len(listed)}")
    return images, list(listed)


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)} and {x.dtype}"
    if isinstance(x, (list, tuple)):
        return (
            f"a {type(x).__name__} of {', '.join(type(part).__name__ for part in x) or 'nothing'}"
        )
    return type(x).__name__


def _reading(n: int, scale: float) -> Tensor:
    """Returns the weights [n, n] with which each output pixel of a side reads the input's."""
    out = torch.arange(n, dtype=torch.float64)
    # Counted from the middle of the first pixel.
    position = (n - 1) / 2 + (out - (n - 1) / 2) / scale
    distance = (position[:, None] - torch.arange(n, dtype=torch.float64)).abs()
    return (1 - distance).clamp_min(0)
