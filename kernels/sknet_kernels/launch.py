"""A kernel launch as data: it can be run, remembered, or compiled for another machine."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A kernel's pointer argument: a tensor, None for one that is absent, or a tuple with one a branch.
Pointer: TypeAlias = "Tensor | tuple[Tensor | None, ...] | None"

# Remembered launches. Sizes that never come back would pile up: past the limit all are forgotten.
_REMEMBERED: dict[tuple[Any, ...], Callable[..., Any]] = {}
_MOST_REMEMBERED = 4096


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel; the three mappings are the kernel's parameters, in its order.

    Attributes:
        kernel: the ``triton.jit`` function.
        programs: number of programs; the grid has one axis, whose limit is 2**31 - 1.
        pointers: tensors by name.
        scalars: sizes and strides by name.
        constants: the ``tl.constexpr`` arguments by name.
        num_warps: warps a program.
        num_stages: iterations of a main loop whose loads are under way together.
    """

    kernel: Any
    programs: int
    pointers: Mapping[str, Pointer]
    scalars: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Returns all but the constants."""
        return {**self.pointers, **self.scalars}

    def run(self) -> Any:
        """Runs the kernel on the current device; returns it as compiled, None if interpreted."""
        return self.kernel[(self.programs,)](
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def launch(build: Callable[..., Launch], *pointers: Pointer, **options: Any) -> None:
    """Runs ``build(*pointers, **options)`` on the device of the first tensor.

    What it builds may depend on shapes, strides, dtypes, alignment and device of the tensors and
    on the options, which are hashable: for those it is built and compiled once.

    Args:
        build: returns a `Launch` whose pointers are ``pointers``, in this order.
        pointers: as the kernel takes them. The first is a tensor.
        options: whatever else ``build`` takes.
    """
    device: torch.device = pointers[0].device  # type: ignore[union-attr]  # a tensor
    key = (build, device, *map(_signature, pointers), *options.values())
    remembered = _REMEMBERED.get(key)
    with _current(device):
        if remembered is not None:
            remembered(*pointers)
        else:
            _first_run(key, build(*pointers, **options))


def _first_run(key: tuple[Any, ...], first: Launch) -> None:
    if len(_REMEMBERED) >= _MOST_REMEMBERED:
        _REMEMBERED.clear()
    _REMEMBERED[key] = _nothing if first.programs == 0 else _compiled(first)


def _nothing(*_: Pointer) -> None:
    """Stands for a launch without programs."""


def _compiled(first: Launch) -> Callable[..., Any]:
    """Runs ``first`` and returns a function of its pointers that runs it again."""
    rest = (*first.scalars.values(), *first.constants.values())
    grid = (first.programs, 1, 1)
    # The interpreter returns None and takes the kernel itself.
    runner = (first.run() or first.kernel)[grid]
    return lambda *pointers: runner(*pointers, *rest)


def _signature(x: Pointer) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.shape, x.stride(), x.data_ptr() % 16
    return x and tuple(map(_signature, x))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    module = torch.get_device_module(device)
    if device.index == module.current_device():
        return nullcontext()
    context: AbstractContextManager[Any] = module.device(device)
    return context
