"""Recording the weights of every selective-kernel unit while a model sees a data set."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sknet_triton.analysis.enlarge import enlarge
from sknet_triton.analysis.means import Means
from sknet_triton.analysis.table import to_frame, with_change
from sknet_triton.analysis.undisturbed import undisturbed, unwrapped
from sknet_triton.analysis.units import sk_units

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


def _record(
    model: nn.Module,
    loader: Iterable[Any],
    views: Mapping[float, View],
    device: torch.device | str | None,
) -> Means:
    _check_model(model)
    inner = unwrapped(model)
    units = sk_units(inner)
    where = next(inner.parameters()).device if device is None else torch.device(device)
    means = Means()
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


def _split(batch: Any) -> tuple[Tensor, list[int | None]]:
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
