"""Running a module ahead of a CUDA graph's capture, so that the capture compiles nothing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Loss = Callable[[Any], Tensor]


def warmup(
    module: Callable[..., Any],
    *args: Any,
    training: bool | None = None,
    loss: Loss | None = None,
    modules: Iterable[nn.Module] = (),
    iterations: int = 3,
) -> None:
    """Runs ``module(*args)``, and its backward, as a CUDA graph's capture will, and undoes it.

    Triton compiles a kernel, cuDNN picks an algorithm and torch.compile compiles a graph at the
    first call with sizes, strides and dtypes they have not met. A capture allows none of it.
    Afterwards ``torch.cuda.graph`` and ``torch.cuda.make_graphed_callables`` find all of it done,
    for inputs in the sizes, strides, dtypes and alignment of ``args``, under the autocast and the
    backend in force. Tensors on a GPU are computed with on a side stream that the current stream
    waits for.

    As they were before, also after an error, are the parameters, buffers, gradients and training
    mode of every module, the gradients of ``args``, and the random states of the CPU and of the
    devices in use. An optimizer's own state is not kept: leave ``step()`` out.

    Args:
        module: a module, compiled or not, a method of one, or any callable.
        *args: what it is called with.
        training: True for ``train()``, forward and backward; False for ``eval()`` and forward
            alone; None for the modes as they are, with a backward where a result requires a
            gradient.
        loss: maps the result to the scalar whose backward is run. None takes the gradient of
            every result to be ones in its layout, as most losses leave it; that of a plain
            ``.sum()`` or ``.mean()`` has strides of 0 and needs to be given.
        modules: further modules, which a callable uses.
        iterations: how many times to run; more than one for torch.compile's own graphs.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``iterations`` is below 1, ``loss`` returns no scalar, or a backward is asked
            for and no result requires a gradient.
        RuntimeError: a capture has begun.
    """
    owners = _checked(module, training, loss, modules, iterations)
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    devices = _gpus([*tensors, *(t for m in owners for t in _state(m))])
    with (
        _kept(owners, tensors),
        torch.random.fork_rng(devices),
        _side_streams(devices),
        _gradients(training),
    ):
        for owner in owners:
            if training is not None:
                owner.train(training)
        for _ in range(iterations):
            _backward(module(*args), loss, training)


def _checked(
    module: Callable[..., Any],
    training: bool | None,
    loss: Loss | None,
    modules: Iterable[nn.Module],
    iterations: int,
) -> list[nn.Module]:
    """Returns the modules whose state is to be kept."""
    if not callable(module):
        raise TypeError(f"module: expected a module or a callable, got {type(module).__name__}")
    if training is not None and not isinstance(training, bool):
        raise TypeError(f"training: expected True, False or None, got {training!r}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a callable or None, got {type(loss).__name__}")
    if loss is not None and training is False:
        raise ValueError("loss: only for a backward pass, got training=False, which runs none")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    owners = list(modules)
    for i, owner in enumerate(owners):
        if not isinstance(owner, nn.Module):
            raise TypeError(f"modules[{i}]: expected a module, got {type(owner).__name__}")
    # A bound method knows its module.
    first = getattr(module, "__self__", module)
    return [first, *owners] if isinstance(first, nn.Module) else owners


def _state(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _gpus(tensors: Iterable[Tensor]) -> list[torch.device]:
    devices = {x.device: None for x in tensors if x.is_cuda}
    if devices and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup: expected a call before the capture, got one inside of it")
    return list(devices)


@contextmanager
def _kept(owners: list[nn.Module], args: list[Tensor]) -> Iterator[None]:
    """Puts modes, parameters, buffers and gradients back: the same tensors, the same values."""
    inner = [m for owner in owners for m in owner.modules()]
    modes = [(m, m.training) for m in inner]
    tables: list[dict[str, Any]] = [own for m in inner for own in (m._parameters, m._buffers)]
    slots = [(own, dict(own)) for own in tables]
    leaves = [x for x in args if x.is_leaf and x.requires_grad]
    leaves += [p for owner in owners for p in owner.parameters()]
    gradients = [(x, x.grad) for x in leaves]
    written = {id(x): x for own in tables for x in own.values() if x is not None}
    written.update({id(x): x for _, x in gradients if x is not None})
    values = [(x, x.detach().clone()) for x in written.values() if _is_writable(x)]
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for own, held in slots:
            own.clear()
            own.update(held)
        for x, gradient in gradients:
            x.grad = gradient
        for x, value in values:
            # Through .data, whose version counter is its own: a graph that still waits for its
            # backward finds the tensors that it saved unchanged.
            x.data.copy_(value)


def _is_writable(x: Tensor) -> bool:
    """Tells whether an operator can write in place: not where elements share their memory."""
    return all(n == 1 or x.stride(d) for d, n in enumerate(x.shape))


@contextmanager
def _side_streams(devices: list[torch.device]) -> Iterator[None]:
    """Lets work on each device run on a stream of its own, between what is before and after."""
    # torch leaves the constructor untyped.
    streams = [torch.cuda.Stream(device) for device in devices]  # type: ignore[no-untyped-call]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    try:
        with ExitStack() as stack:
            # Entering a stream makes its device the current one.
            current = torch.cuda.device(torch.cuda.current_device()) if devices else nullcontext()
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(current)
            yield
    finally:
        for stream in streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


def _gradients(training: bool | None) -> AbstractContextManager[Any]:
    if training is None:
        return nullcontext()
    return _enabled() if training else torch.no_grad()


@contextmanager
def _enabled() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _backward(result: Any, loss: Loss | None, training: bool | None) -> None:
    if loss is not None:
        result = loss(result)
        if not isinstance(result, Tensor) or result.numel() != 1:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"loss: expected a scalar tensor, got {got}")
    outs = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    if outs:
        torch.autograd.backward(outs, [torch.ones_like(x) for x in outs])
    elif training or loss is not None:
        raise ValueError(
            "module: expected a result that requires a gradient, got none; where the callable runs "
            "its backward itself, leave out training and loss"
        )
