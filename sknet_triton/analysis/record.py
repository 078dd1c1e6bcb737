"""How selective-kernel units weigh while a model sees images, as such or enlarged: recorded."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sknet_triton.acceleration import Family
from sknet_triton.acceleration.check import fitting
from sknet_triton.acceleration.swap import Accelerated, check_model
from sknet_triton.analysis.table import WEIGHT, with_change
from sknet_triton.layers import SKConv
from sknet_triton.reference import accumulation_dtype
from sknet_triton.reference.sk_select import attention

# Those of the paper's Figure 3; its Figure 4 has the first two.
SCALES = (1.0, 1.5, 2.0)

# The class of an image; None where it has none.
Label: TypeAlias = int | None
# Takes a unit's weights [B, M, C] of one call.
Report = Callable[[Tensor], None]
Watch = Callable[[Report], RemovableHandle]


@dataclass(frozen=True)
class Unit:
    """One selective-kernel module of a model.

    Attributes:
        path: its name, as ``model.get_submodule`` takes it.
        stage: which of the model's stages it is in, from 1. A stage is what the path names before
            its last number: ``stages.0`` of ``stages.0.1.sk``.
        index: its place in the stage, from 1. The paper's SK_2_3 is stage 1, index 3: the paper
            counts the stem as the first stage.
        watch: calls its argument with the weights [B, M, C] at every call of the module, until
            the handle is removed.
    """

    path: str
    stage: int
    index: int
    watch: Watch


def sk_units(model: nn.Module) -> list[Unit]:
    """Returns the selective-kernel units of ``model``, in its order.

    Those are every `SKConv` that selects, and the modules that `accelerate` swapped or would swap.

    Raises:
        ValueError: there is none; the reasons are named where a module comes near to one.
    """
    units: list[Unit] = []
    reasons: list[str] = []
    sizes: dict[str, int] = {}  # of the stages
    for path, module in model.named_modules():
        watch = _watch(module)
        if isinstance(watch, str):
            reasons.append(f"; {path or 'the model'}: {watch}")
        elif watch is not None:
            parts = path.split(".")
            numbers = [i for i, part in enumerate(parts) if part.isdigit()]
            stage = ".".join(parts[: numbers[-1]]) if numbers else ""
            sizes[stage] = sizes.get(stage, 0) + 1
            units.append(Unit(path, 1 + [*sizes].index(stage), sizes[stage], watch))
    if not units:
        raise ValueError(
            "model: expected a selective-kernel unit, an SKConv or a module that accelerate knows, "
            f"got {type(model).__name__} with none{''.join(reasons)}"
        )
    return units


def _watch(module: nn.Module) -> Watch | str | None:
    """Returns how to watch ``module``, why it cannot be, or None for another kind of module."""
    if isinstance(module, SKConv):
        if module.aggregate == "sum":
            return "SKConv(aggregate='sum') has no weights"
        return functools.partial(_watch_conv, module)
    if isinstance(module, Accelerated):
        return functools.partial(_watch_family, module, module._skt_family)
    found = fitting(module, besides=False)
    if found is None or isinstance(found, str):
        return found
    return functools.partial(_watch_family, module, found[0])


def _watch_conv(sk: SKConv, report: Report) -> RemovableHandle:
    # A hook on fc2 brings the path back in which every module is called: the fused operator, which
    # calls none of them, steps aside.
    def hook(fc2: nn.Module, args: Any, out: Tensor) -> None:
        report(_weights(out.reshape(out.shape[0], sk.M, sk.out_channels), "softmax"))

    return sk.fc2.register_forward_hook(hook)


def _watch_family(module: nn.Module, family: Family, report: Report) -> RemovableHandle:
    # Where a foreign module keeps its logits is its own affair, so they are computed a second time
    # from its inputs, before it may write to them.
    own = module._skt_original if isinstance(module, Accelerated) else type(module)
    signature = inspect.signature(own.forward)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = signature.bind(module, *args, **kwargs).args[1:]
        _, logits = family.maps_and_logits(module, *inputs)
        report(_weights(logits, family.activation))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _weights(logits: Tensor, activation: str | None) -> Tensor:
    """Returns the weights in float64 on the CPU: not every device has float64."""
    wide = logits.detach().cpu().double()
    return attention(wide, wide.dtype, activation or "none")


def record_attention(
    model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None
) -> pd.DataFrame:
    """Records how every selective-kernel unit weighs its branches, for each class of images.

    The model evaluates (dropout off, running statistics) without gradients, on any backend.
    Afterwards, also after an error or an interrupt, its modes, buffers, hooks and torch's random
    states are as before. Sums are kept, in float64: the memory does not depend on the number of
    images. Inside of torch.compile's and the data-parallel wrappers the module itself is run,
    eagerly; in a process group each process records what its own loader gives.

    Args:
        model: contains an `SKConv`, or modules that `accelerate` swapped or would swap; those have
            their branches computed twice.
        loader: yields (images, labels) or images: a tensor [B, ...] that the model takes, and a
            tensor, array or sequence of B integers.
        device: where images are moved; None for that of the model's first parameter.

    Returns:
        One row for every unit and class, in the model's order and that of the classes: ``path``,
        ``stage`` and ``index`` as in `Unit`; ``label``, the class, missing where there is none;
        ``images``, how many the means are over, each counted at every call of the unit;
        ``difference``, the mean over images and channels of the last branch's weight minus the
        first's (of the published unit, dilated - 3x3); and ``weight_0``, ``weight_1``, ..., the
        same mean of every branch's weight, missing beyond the branches that a unit has.

    Raises:
        TypeError: an argument, or what the loader yields, is of another type.
        ValueError: the model has no such unit or calls none, the loader yields no image, or the
            labels or the maps in a unit are not as many as the images.
    """
    return _record(model, loader, (1.0,), device).drop(columns="scale")


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
        TypeError, ValueError: as in `record_attention` and `enlarge`; or ``scales`` lacks 1.0.
    """
    if 1.0 not in scales:
        raise ValueError(f"scales: expected 1.0 among them, got {tuple(scales)}")
    return with_change(_record(model, loader, scales, device))


def enlarge(images: Tensor, scale: float) -> Tensor:
    """Enlarges images around their centre and keeps their size (Li et al. 2019, figure 3).

    The paper crops the centre and resizes the crop. Here the crop is exactly H / scale by
    W / scale and the resizing bilinear: with pixel i covering [i, i + 1), the middle of output
    pixel i reads position n / 2 + (i + 1/2 - n / 2) / scale of a side of n pixels. Beside
    ``F.interpolate`` of a crop of whole pixels only the outermost pixels differ: they read on
    across the border of the crop.

    Args:
        images: [..., H, W], floating point.
        scale: at least 1, which returns the same values.

    Returns:
        Images of the same shape, dtype and device.

    Raises:
        TypeError: ``images`` is not a floating-point tensor.
        ValueError: ``scale`` is below 1 or not finite, or ``images`` has fewer than two axes.
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


def _record(
    model: nn.Module,
    loader: Iterable[Any],
    scales: Sequence[float],
    device: torch.device | str | None,
) -> pd.DataFrame:
    check_model(model)
    inner = _unwrapped(model)
    units = sk_units(inner)
    where = next(inner.parameters()).device if device is None else torch.device(device)
    # Images, and the sum over them of the weights' means over channels.
    sums: dict[tuple[float, Unit, Label], tuple[int, Tensor]] = {}
    calls: list[tuple[Unit, Tensor]] = []
    images_seen = 0

    def call(unit: Unit, weights: Tensor) -> None:
        calls.append((unit, weights.mean(2)))

    with ExitStack() as stack:
        stack.enter_context(_undisturbed(inner))
        for unit in units:
            stack.callback(unit.watch(functools.partial(call, unit)).remove)
        for batch in loader:
            images, labels = _split(batch)
            images_seen += len(images)
            for scale in scales:
                calls.clear()
                inner(images.to(where) if scale == 1 else enlarge(images.to(where), scale))
                for unit, by_image in calls:
                    for label, at in _by_class(unit, by_image, labels):
                        count, total = sums.get((scale, unit, label), (0, 0))
                        added = count + len(at), total + by_image[at].sum(0)
                        sums[scale, unit, label] = added
    if not images_seen:
        raise ValueError("loader: expected at least one image, got none")
    if not sums:
        raise ValueError(
            f"model: expected one that calls its selective-kernel units, got "
            f"{type(inner).__name__}, which called none of its {len(units)}"
        )
    return _table(sums, units)


def _by_class(
    unit: Unit, by_image: Tensor, labels: Sequence[Label]
) -> Iterator[tuple[Label, list[int]]]:
    """Yields each class with the places of its images."""
    if len(by_image) != len(labels):
        raise ValueError(
            f"model: expected weights for each of {len(labels)} images in {unit.path!r}, "
            f"got {len(by_image)}, which no class can be told for"
        )
    for label in dict.fromkeys(labels):
        yield label, [i for i, other in enumerate(labels) if other == label]


def _table(
    sums: dict[tuple[float, Unit, Label], tuple[int, Tensor]], units: list[Unit]
) -> pd.DataFrame:
    """Returns the means by scale, unit and class, with the columns of `record_sizes`."""
    rows = []
    for (scale, unit, label), (images, total) in sums.items():
        weights = (total / images).tolist()
        rows.append(
            {
                "scale": float(scale),
                "path": unit.path,
                "stage": unit.stage,
                "index": unit.index,
                "label": label,
                "images": images,
                "difference": weights[-1] - weights[0],
                **{f"{WEIGHT}{i}": weight for i, weight in enumerate(weights)},
            }
        )
    places = {unit.path: place for place, unit in enumerate(units)}
    return (
        pd.DataFrame(rows)
        .astype({"label": "Int64"})
        .sort_values(
            ["scale", "path", "label"],
            key=lambda column: column.map(places) if column.name == "path" else column,
            na_position="first",
            ignore_index=True,
        )
    )


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
        parts = ", ".join(type(part).__name__ for part in x)
        return f"a {type(x).__name__} of {parts or 'nothing'}"
    return type(x).__name__


def _reading(n: int, scale: float) -> Tensor:
    """Returns the weights [n, n] with which each output pixel of a side reads the input's."""
    out = torch.arange(n, dtype=torch.float64)
    # Counted from the middle of the first pixel.
    position = (n - 1) / 2 + (out - (n - 1) / 2) / scale
    distance = (position[:, None] - torch.arange(n, dtype=torch.float64)).abs()
    return (1 - distance).clamp_min(0)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluates ``model`` eagerly inside the block; puts modes, buffers and random states back."""
    before = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    values = [(x, x.detach().clone()) for x in model.buffers()]
    gpus = list({x.device for x in model.parameters() if x.is_cuda})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.no_grad())
        # Whoever compiled a model has imported it. A graph does not see hooks that came later.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, *_ in before:
                # Not eval(), which a model may override with more than this.
                module.training = False
            yield
        finally:
            for module, mode, buffers in before:
                module.training = mode
                module._buffers.clear()
                module._buffers.update(buffers)
            for x, value in values:
                if not torch.equal(x, value):
                    # Through .data: a graph that waits for its backward finds its version.
                    x.data.copy_(value)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module inside of torch.compile's and the data-parallel wrappers."""
    dynamo = sys.modules.get("torch._dynamo")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif dynamo is not None and isinstance(model, dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model
