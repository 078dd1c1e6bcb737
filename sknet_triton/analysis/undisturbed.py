"""Running a model without leaving a trace on it."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


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
