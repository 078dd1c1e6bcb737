"""Which implementation carries out a stage: Triton kernels or plain PyTorch."""

import importlib.util
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "triton", "reference"]

ENVIRONMENT_VARIABLE = "SKNET_TRITON_BACKEND"

_NAMES: tuple[str, ...] = get_args(Backend)
_chosen: Backend | None = None

_Function = TypeVar("_Function", bound=Callable[..., object])


class use_backend:  # noqa: N801 - used as a function, as torch.no_grad is
    """Chooses the implementation of every stage, as a setter or as a context manager.

    ``use_backend("reference")`` holds from that line on; ``with use_backend("reference"):``
    holds inside the block and restores what was set before. The choice is global to the process.

    Args:
        name: ``"auto"`` takes Triton for tensors on a GPU and PyTorch for all others, and for all
            in an export to ONNX, in torch.func's transforms and in forward-mode differentiation;
            ``"triton"`` insists on the kernels; ``"reference"`` takes plain PyTorch everywhere,
            which torch.compile fuses and every exporter understands.

    Raises:
        ValueError: ``name`` is not one of the three.
    """

    def __init__(self, name: Backend) -> None:
        global _chosen
        self._name = _checked(name, "name")
        self._previous = _chosen
        _chosen = self._name

    def __enter__(self) -> None:
        global _chosen
        _chosen = self._name

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._previous


def current_backend() -> Backend:
    """Returns the backend in force: the one set, else the environment's, else ``"auto"``.

    Raises:
        ValueError: ``SKNET_TRITON_BACKEND`` holds an unknown name.
    """
    return _chosen if _chosen is not None else _from_environment()


def takes_triton(tensor: Tensor) -> bool:
    """Tells whether a stage on ``tensor`` is to run on the Triton kernels.

    Raises:
        ValueError: the backend is ``"triton"`` and ``tensor`` is on a device without kernels.
        ImportError: the backend is ``"triton"`` and triton is not installed.
        RuntimeError: the backend is ``"triton"`` in an export to ONNX, which has no such operators,
            or in a transform that they have no rule for.
    """
    backend = current_backend()
    if backend == "reference":
        return False
    if backend == "auto":
        plain = in_transform() or _exporting_to_onnx()
        return tensor.is_cuda and _triton_installed() and not plain
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
    return True


def in_transform() -> bool:
    """Tells whether torch.func or forward-mode differentiation is at work.

    Their rules are per operator of PyTorch: a custom operator would be refused or, in forward mode,
    silently give tangents of zero.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_kernels(tensor: Tensor) -> bool:
    """Tells whether a Triton kernel can read ``tensor``: on a GPU, or under the interpreter."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and _interpreting())


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
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


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
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
