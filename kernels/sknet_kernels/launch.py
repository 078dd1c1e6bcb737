"""A kernel launch as data: it can be run, remembered, or compiled for another machine."""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

# A kernel's pointer argument: a tensor, None for one that is absent, or a tuple of such arguments,
# with one a branch for example.
Pointer: TypeAlias = "Tensor | tuple[Any, ...] | None"

# What a key was found to need. Sizes that never come back would pile up: past the limit all are
# forgotten.
_PLANS: dict[Any, dict[Any, Any]] = {}
_MOST_PLANS = 4096


class _Local(threading.local):
    plan: dict[Any, Any] | None = None


_LOCAL = _Local()


class planned:  # noqa: N801 - used as torch.no_grad is
    """A computation of several launches that are remembered under one key, on one device.

    Inside, `launch` and `remembered` take from the plan of ``key`` what they found before. ``key``
    therefore settles all that they depend on: shapes, strides, dtypes and alignment of the tensors
    that come from outside (see `signature`), and options. Each ``build`` is launched once at most.
    """

    def __init__(self, key: Any, device: torch.device) -> None:
        if len(_PLANS) >= _MOST_PLANS:
            _PLANS.clear()
        self._plan = _PLANS.setdefault((key, device), {})
        self._context = current(device)

    def __enter__(self) -> None:
        self._outer, _LOCAL.plan = _LOCAL.plan, self._plan
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        _LOCAL.plan = self._outer
        self._context.__exit__(*error)


def remembered(key: Any, find: Callable[[], _T]) -> _T:
    """Returns ``find()``, once for all in the same plan."""
    plan = _LOCAL.plan
    if plan is None:
        return find()
    found: _T | None = plan.get(key)
    if found is None:
        found = plan[key] = find()
    return found


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
        maxnreg: registers that a thread may take; None leaves them to the compiler.
    """

    kernel: Any
    programs: int
    pointers: Mapping[str, Pointer]
    scalars: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Returns what the compiler is told beside the constants; loops say their own stages."""
        options = {"num_warps": self.num_warps, "num_stages": 1}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}

    @property
    def arguments(self) -> dict[str, Any]:
        """Returns all but the constants."""
        return {**self.pointers, **self.scalars}

    def run(self) -> Any:
        """Runs the kernel on the current device; returns it as compiled, None if interpreted."""
        return self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


def launch(build: Callable[..., Launch], *pointers: Pointer, **options: Any) -> None:
    """Runs ``build(*pointers, **options)`` on the device of the first tensor.

    Args:
        build: returns a `Launch` whose pointers are ``pointers``, in this order. What it returns
            depends on their shapes, strides, dtypes, alignment and device and on the options.
        pointers: as the kernel takes them. The first is a tensor.
        options: whatever else ``build`` takes, hashable.
    """
    plan = _LOCAL.plan
    if plan is None:
        key = (build, tuple(map(signature, pointers)), tuple(options.values()))
        with planned(key, pointers[0].device):  # type: ignore[union-attr]  # a tensor
            launch(build, *pointers, **options)
        return
    runner = plan.get(build)
    if runner is None:
        first = build(*pointers, **options)
        plan[build] = _nothing if first.programs == 0 else _compiled(first)
    else:
        runner(*pointers)


def signature(x: Pointer) -> Any:
    """Returns what a compiled kernel depends on of a pointer argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape, x.stride(), x.data_ptr() % 16
    return x and tuple(map(signature, x))


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which ``device`` is the one that launches go to."""
    if device.type == "cpu":  # Triton's interpreter
        return _NO_CONTEXT
    module = torch.get_device_module(device)
    if device.index == module.current_device():
        return _NO_CONTEXT
    context: AbstractContextManager[Any] = module.device(device)
    return context


_NO_CONTEXT = nullcontext()


def _nothing(*_: Pointer) -> None:
    """Stands for a launch without programs."""


def _compiled(first: Launch) -> Callable[..., Any]:
    """Runs ``first`` and returns a function of its pointers that runs it again."""
    rest = (*first.scalars.values(), *first.constants.values())
    grid = (first.programs, 1, 1)
    compiled = first.run()
    if compiled is None:  # the interpreter
        interpreted = first.kernel[grid]
        return lambda *pointers: interpreted(*pointers, *rest)
    import triton

    hooked = compiled[grid]
    hooks, driver = triton.knobs.runtime, triton.runtime.driver.active
    device, stream = driver.get_current_device(), driver.get_current_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def again(*pointers: Pointer) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler's
            hooked(*pointers, *rest)
        else:
            run(*grid, stream(device), function, metadata, None, None, None, *pointers, *rest)

    return again
