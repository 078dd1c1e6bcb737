"""Which implementation carries out a stage: Triton kernels or plain PyTorch."""

import importlib.util
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "triton", "reference"]

ENVIRONMENT_VARIABLE = "SKNET_TRITON_BACKEND"
# Of the operators.
NAMESPACE = "sknet_triton"

_NAMES: tuple[str, ...] = get_args(Backend)

_Function = TypeVar("_Function", bound=Callable[..., object])

_process: Backend | None = None
# As read once: every read of the environment takes as long as a small operator.
_environment: Backend | None = None
_block: ContextVar[Backend | None] = ContextVar("sknet_triton_backend", default=None)
# The block inside of code under torch.compile, which cannot set a ContextVar.
_traced: Backend | None = None
_this = sys.modules[__name__]


def __getattr__(name: str) -> Backend | None:
    # torch.compile cannot read a ContextVar before torch 2.14. It can read an attribute of a
    # module, and its guard reads it again before every call, in the caller's thread and context.
    if name == "_in_block":
        return _block.get()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def set_backend(name: Backend) -> None:
    """Chooses the implementation of every stage for the whole process, outside of blocks.

    Args:
        name: as in `use_backend`, whose blocks go before it.

    Raises:
        ValueError: ``name`` is not one of the three.
    """
    global _process
    _process = _checked(name, "name")


class use_backend:  # noqa: N801 - used as a function, as torch.no_grad is
    """Chooses the implementation of every stage for a block, in its thread and context.

    ``with use_backend("reference"):`` goes before `set_backend` and is seen nowhere else; the
    context is that of ``contextvars``.

    Args:
        name: ``"auto"`` takes Triton for tensors on a GPU and PyTorch for all others, and for all
            in an export to ONNX, in torch.func's transforms, in forward-mode differentiation and
            for DTensors; ``"triton"`` insists on the kernels; ``"reference"`` takes plain PyTorch
            everywhere, which torch.compile fuses and every exporter understands.

    Raises:
        ValueError: ``name`` is not one of the three.
    """

    def __init__(self, name: Backend) -> None:
        self._name = _checked(name, "name")
        self._outer: list[Backend | None] = []

    def __enter__(self) -> None:
        self._outer.append(_exchanged(self._name))

    def __exit__(self, *_: object) -> None:
        _exchanged(self._outer.pop())


def _exchanged(name: Backend | None) -> Backend | None:
    """Makes ``name`` the block's choice; returns the one before."""
    global _traced
    if torch.compiler.is_dynamo_compiling():
        before, _traced = _traced, name
    else:
        before = _block.get()
        _block.set(name)
    return before


def current_backend() -> Backend:
    """Returns the backend in force: the block's, else the process's, else the environment's.

    Where none is set it is ``"auto"``. The environment is read once, when it is first asked.

    Raises:
        ValueError: ``SKNET_TRITON_BACKEND`` holds an unknown name.
    """
    block = _this._in_block if torch.compiler.is_dynamo_compiling() else _block.get()
    return _traced or block or _process or _from_environment()


def takes_triton(tensor: Tensor) -> bool:
    """Tells whether a stage on ``tensor`` is to run on the Triton kernels.

    Raises:
        ValueError: the backend is ``"triton"`` and ``tensor`` is on a device without kernels.
        ImportError: the backend is ``"triton"`` and triton is not installed.
        RuntimeError: the backend is ``"triton"`` in an export to ONNX, which has no such operators,
            in a transform that they have no rule for, or for a DTensor.
    """
    backend = current_backend()
    if backend == "reference":
        return False
    if backend == "auto":
        if not tensor.is_cuda or not _triton_installed():
            return False
        return not (
            in_transform() or _exporting_to_onnx() or isinstance(tensor, _distributed_type())
        )
    if not _triton_installed():
        raise ImportError("backend: 'triton' needs the package triton, which is not installed")
    if not has_kernels(tensor):
        raise ValueError(
            f"backend: 'triton' needs tensors on a GPU (or TRITON_INTERPRET=1), "
            f"got a tensor on {tensor.device}"
        )
    if _exporting_to_onnx():
        raise RuntimeError(
            "backend: 'triton' has no operators in ONNX; export under use_backend('auto') or "
            "use_backend('reference')"
        )
    if in_transform():
        raise RuntimeError(
            "backend: 'triton' has no rule for torch.func's transforms (grad, jvp, vmap, ...) and "
            "forward-mode derivatives; use_backend('auto') and use_backend('reference') have"
        )
    if isinstance(tensor, _distributed_type()):
        raise RuntimeError(
            "backend: 'triton' has no sharding rule for DTensors; use_backend('auto') and "
            "use_backend('reference') take PyTorch's operators, which have"
        )
    return True


def in_transform() -> bool:
    """Tells whether torch.func or forward-mode differentiation is at work.

    Their rules are per operator of PyTorch: a custom operator would be refused or, in forward mode,
    silently give tangents of zero.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_forward_mode(name: str) -> None:
    """Refuses an operator where PyTorch, having no rule for it, would give tangents of zero.

    `sknet_triton.functional` does not come here in forward mode; who calls an operator does.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} has no forward-mode derivative; "
            "the functions of sknet_triton.functional under use_backend('reference') have"
        )


def needs_plain_backward(dout: Tensor) -> bool:
    """Tells whether a backward is to be made of PyTorch's operators.

    It is where a graph of the backward is asked for, and where ``dout`` is a batch of gradients
    (``is_grads_batched``, vectorised Jacobians, vmap), for which a custom operator has no rule.
    """
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dout)


def has_kernels(tensor: Tensor) -> bool:
    """Tells whether a Triton kernel can read ``tensor``: on a GPU, or under the interpreter."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and _interpreting())


def is_symbolic(value: object) -> bool:
    """Tells whether ``value`` is, or a list or tuple of it holds, what torch.fx traces with."""
    if isinstance(value, (list, tuple)):
        return any(map(is_symbolic, value))
    return isinstance(value, torch.fx.Proxy)


def interpreting() -> bool:
    """Tells whether the environment has Triton interpret its kernels, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _checked(name: str, source: str) -> Backend:
    if name not in _NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(_NAMES)}, got {name!r}")
    return name  # type: ignore[return-value]  # membership in _NAMES is what the Literal says


def _constant_in_a_graph(function: _Function) -> _Function:
    """Marks ``function`` as torch.compiler.assume_constant_result does.

    That decorator imports torch._dynamo, and with it Inductor and triton: a second at import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read by Dynamo alone
    return function


# Dynamo need not trace the environment or the import system; both are fixed while a graph lives.
@_constant_in_a_graph
def _from_environment() -> Backend:
    global _environment
    if _environment is None:
        named = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        _environment = _checked(named, ENVIRONMENT_VARIABLE)
    return _environment


@_constant_in_a_graph
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@_constant_in_a_graph
def _exporting_to_onnx() -> bool:
    # Whoever exports has imported it.
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


@_constant_in_a_graph
def _interpreting() -> bool:
    return interpreting()


@_constant_in_a_graph
def _distributed_type() -> Any:
    # Whoever made a DTensor has imported it.
    tensor = sys.modules.get("torch.distributed.tensor")
    return () if tensor is None else tensor.DTensor
