"""A model under observation: its selective-kernel units, their weights, and no trace left on it."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sknet_triton.acceleration import Family
from sknet_triton.acceleration.check import fitting
from sknet_triton.acceleration.swap import Accelerated
from sknet_triton.layers import SKConv
from sknet_triton.reference.sk_select import attention

# Takes a unit's weights [B, M, C] of one call.
Report = Callable[[Tensor], None]


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
    watch: Callable[[Report], RemovableHandle]


def sk_units(model: nn.Module) -> list[Unit]:
    """Returns the selective-kernel units of ``model``, in its order.

    Those are every `SKConv` that selects, and the modules that `accelerate` swapped or would swap.
    One that looks like a known module and computes something else is not among them; the report of
    `accelerate` names it.

    Raises:
        ValueError: there is none; the reasons are named where a module comes near to one.
    """
    found: list[tuple[str, Callable[[Report], RemovableHandle]]] = []
    reasons: list[str] = []
    for path, module in model.named_modules():
        watch = _watch(module)
        if isinstance(watch, str):
            reasons.append(f"; {path or 'the model'}: {watch}")
        elif watch is not None:
            found.append((path, watch))
    if not found:
        raise ValueError(
            "model: expected a selective-kernel unit, an SKConv or a module that accelerate knows, "
            f"got {type(model).__name__} with none{''.join(reasons)}"
        )
    places = _places([path for path, _ in found])
    return [
        Unit(path, stage, index, watch)
        for (path, watch), (stage, index) in zip(found, places, strict=True)
    ]


def _places(paths: list[str]) -> list[tuple[int, int]]:
    """Numbers the stages and the units within each."""
    sizes: dict[str, int] = {}
    places = []
    for path in paths:
        parts = path.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        stage = ".".join(parts[: numbers[-1]]) if numbers else ""
        sizes[stage] = sizes.get(stage, 0) + 1
        places.append((1 + list(sizes).index(stage), sizes[stage]))
    return places


def _watch(module: nn.Module) -> Callable[[Report], RemovableHandle] | str | None:
    """Returns how to watch ``module``, why it cannot be, or None for another kind of module."""
    if isinstance(module, SKConv):
        if module.aggregate == "sum":
            return "SKConv(aggregate='sum') has no weights"
        return functools.partial(_watch_conv, module)
    if isinstance(module, Accelerated):
        return functools.partial(_watch_family, module, module._skt_family)
    found = fitting(module, besides=False)
    return (
        found
        if found is None or isinstance(found, str)
        else functools.partial(_watch_family, module, found[0])
    )


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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluates ``model`` inside the block, eagerly and without gradients.

    Afterwards, also after an error or an interrupt, the training mode of every module, the buffers
    and torch's random states are as they were. A compiled model keeps its graphs.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    tables: list[dict[str, Any]] = [module._buffers for module in modules]
    held = [dict(table) for table in tables]
    written = {id(x): x for table in held for x in table.values() if x is not None}
    values = [(x, x.detach().clone()) for x in written.values()]
    gpus = list({x.device for x in model.parameters() if x.is_cuda})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.no_grad())
        # Whoever compiled a model has imported it. A graph does not see hooks that came later.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in modules:
                # Not eval(), which a model may override with more than this.
                module.training = False
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for table, before in zip(tables, held, strict=True):
                table.clear()
                table.update(before)
            for x, value in values:
                if not torch.equal(x, value):
                    # Through .data: a graph that waits for its backward finds its version.
                    x.data.copy_(value)


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module inside of torch.compile's and the data-parallel wrappers."""
    dynamo = sys.modules.get("torch._dynamo")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif dynamo is not None and isinstance(model, dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model
