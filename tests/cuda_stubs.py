"""What the harness asks of CUDA, answered on a CPU: streams, graphs and memory counters.

A stub stands at the boundary alone. What is recorded in a graph runs again at each replay, on the
tensors that were recorded, as on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    def __init__(self, graph: "Graph") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        """Runs every recorded operator again and puts its results where they were."""
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tensors(out), tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Stream:
    """Stands for `torch.cuda.Stream`."""

    def wait_stream(self, other: "Stream") -> None:
        """There is one order on a CPU."""


@contextmanager
def captured(graph: Graph) -> Iterator[None]:
    with _Recorder(graph):
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts CUDA graphs and streams that work on CPU tensors in the place of CUDA's."""
    stubs: dict[str, Callable[..., Any]] = {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "graph": captured,
        "stream": lambda stream: nullcontext(),
        "current_stream": Stream,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
