"""Triton's interpreter without what it does again at every device function."""

import functools
import inspect
import threading
from importlib.util import find_spec
from types import FunctionType
from typing import Any


class _Launching(threading.local):
    """What a thread's launch has patched."""

    patched: frozenset[str] = frozenset()


def patch_the_language_once_a_launch() -> None:
    """Leaves out of a launch what Triton's interpreter does again at every device function.

    It puts its own functions into `triton.language`, hundreds of names, at each call, though those
    of the launch stand until the launch ends. With small tiles that takes longer than the kernel.
    """
    if find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    thread = _Launching()

    @functools.cache
    def languages(fn: FunctionType) -> frozenset[str]:
        modules = filter(inspect.ismodule, fn.__globals__.values())
        return frozenset(m.__name__ for m in modules if m in (language, language.core))

    def patch_once(fn: FunctionType) -> Any:
        if languages(fn) <= thread.patched:
            return interpreter._LangPatchScope()  # of no change
        thread.patched |= languages(fn)
        return patch(fn)

    def run_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        outer, thread.patched = thread.patched, frozenset()
        try:
            run(self, *args, **kwargs)
        finally:
            thread.patched = outer

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_launch
