"""What a forward does besides returning a tensor, found while it runs.

Looked at are the functions that it calls outside of torch and the standard library: their code for
what writes or opens a context, their calls for what reaches outside, and the containers that they
can name for what they leave in them. What a module keeps on itself, `check` compares.
"""

import dis
import functools
import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

from torch import nn

_Result = TypeVar("_Result")

# The names of opcodes differ between the versions of Python that there are.
_OPCODES = {
    "SETUP_WITH": "opens a context",
    "BEFORE_WITH": "opens a context",
    "STORE_ATTR": "writes the attribute {}",
    "DELETE_ATTR": "deletes the attribute {}",
    "STORE_GLOBAL": "writes the global {}",
    "DELETE_GLOBAL": "deletes the global {}",
}
_STANDARD = (
    *("abc", "builtins", "collections", "copy", "dataclasses", "enum", "functools", "itertools"),
    *("math", "numbers", "operator", "types", "typing"),
    *("_collections", "_collections_abc", "_functools", "_operator"),
)
_TORCH = (
    *("torch", "torch.functional", "torch.library", "torch.nn", "torch.overrides", "torch._C"),
    *("torch.autograd.function", "torch.fx.traceback", "torch.utils._device", "torch._tensor"),
    *("torch._jit_internal", "torch._library", "torch._ops", "torch._refs"),
)
_BUILTINS = ("breakpoint", "delattr", "eval", "exec", "input", "open", "print", "setattr")
_CONTAINERS = (list, dict, set, deque)


def watched(call: Callable[[], _Result]) -> tuple[_Result, frozenset[str]]:
    """Calls ``call``; returns its result and what it does besides, in words."""
    watch = _Watch()
    before, collects = sys.getprofile(), gc.isenabled()
    # A collection in between runs finalizers and callbacks of others, as if ``call`` called them.
    gc.disable()
    sys.setprofile(watch)
    try:
        result = call()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return result, frozenset(watch.found())


class _Watch:
    """Sees the calls of one thread, as ``sys.setprofile`` reports them."""

    def __init__(self) -> None:
        self._codes: set[CodeType] = set()
        self._calls: set[str] = set()
        self._held: dict[int, tuple[str, Any, Any]] = {}

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "call" and frame.f_back is not None:
            self._enter(frame, frame.f_back)
        elif event == "c_call" and frame.f_code in self._codes:
            name = _reaching_out(function)
            if name is not None:
                self._calls.add(f"{_place(frame.f_code)} calls {name}")

    def _enter(self, frame: FrameType, caller: FrameType) -> None:
        module, name = _module(frame), frame.f_code.co_name
        if _is_own(module):
            # What torch and the standard library call is theirs, a module's forward apart.
            ours = caller.f_code in self._codes or _calls_forward(caller)
            if ours and frame.f_code not in self._codes:
                self._codes.add(frame.f_code)
                for path, container in _nameable(frame):
                    self._held.setdefault(id(container), (path, container, container.copy()))
        elif caller.f_code in self._codes and not _harmless(module, name):
            self._calls.add(f"{_place(caller.f_code)} calls {module}.{name}")

    def found(self) -> Iterator[str]:
        yield from self._calls
        for code in self._codes:
            yield from _in_code(code)
        for name, container, before in self._held.values():
            if not _same(container, before):
                yield f"changes {name}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_own(module: str) -> bool:
    """Tells whether a module is not torch's, ours or the standard library's."""
    root = module.partition(".")[0]
    return root not in ("torch", "sknet_triton") and root not in sys.stdlib_module_names


def _calls_forward(frame: FrameType) -> bool:
    calls = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)
    return frame.f_code in calls or _module(frame).startswith("sknet_triton.")


def _harmless(module: str, name: str) -> bool:
    if name.startswith(("set_", "_set_", "use_")):
        return False
    if name.startswith("is_") or module.partition(".")[0] in ("sknet_triton", *_STANDARD):
        return True
    below = tuple(f"{known}." for known in _TORCH if known != "torch")
    return module in _TORCH or module.startswith(below)


def _reaching_out(function: Any) -> str | None:
    """Returns the name of a built-in function that does more than compute; None for others."""
    name, holder = function.__name__, getattr(function, "__self__", None)
    module = getattr(function, "__module__", None)
    if module is None:  # a method, of an instance or of a type
        module = (holder if isinstance(holder, type) else type(holder)).__module__
    if module == "builtins":
        return str(name) if name in _BUILTINS else None
    return None if _harmless(module, name) else f"{module}.{name}"


@functools.cache
def _in_code(code: CodeType) -> tuple[str, ...]:
    found = []
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in _OPCODES:
            found.append(_OPCODES[name].format(value))
        elif name == "LOAD_SPECIAL" and "__enter__" in instruction.argrepr:
            found.append("opens a context")
        elif name == "STORE_DEREF" and value in code.co_freevars:
            found.append(f"writes the variable {value}")
        elif name in ("LOAD_GLOBAL", "LOAD_NAME") and value == "print":
            found.append("calls print")
    return tuple(f"{_place(code)} {what}" for what in found)


def _place(code: CodeType) -> str:
    return str(getattr(code, "co_qualname", code.co_name))


def _nameable(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Yields the containers that a function finds by name, and those in the objects it finds."""
    free = frame.f_code.co_freevars
    values = {name: frame.f_globals.get(name) for name in frame.f_code.co_names}
    values.update((name, frame.f_locals.get(name)) for name in free)
    for name, value in values.items():
        if isinstance(value, _CONTAINERS):
            yield name, value
        elif hasattr(value, "__dict__") and _is_own(type(value).__module__):
            for key, held in list(vars(value).items()):
                if isinstance(held, _CONTAINERS):
                    yield f"{name}.{key}", held


def _same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(container.get(key, before) is value for key, value in before.items())
    if isinstance(container, set):
        return bool(container == before)
    return all(a is b for a, b in zip(container, before, strict=True))
