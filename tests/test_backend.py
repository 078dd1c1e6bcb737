"""The choice of the implementation: setter, context manager, environment."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sknet_triton import Backend, backend, functional, set_backend, use_backend
from tests.helpers import assert_close, message_of
from tests.processes import needs_gloo

# The choice of the backend asks for nothing else.
ON_A_GPU = cast(Tensor, SimpleNamespace(is_cuda=True))
BRANCHES = [torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)]


@pytest.fixture(autouse=True)
def _from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_process", None)
    monkeypatch.setattr(backend, "_environment", None)
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)


def test_the_setter_holds_until_the_next_and_blocks_go_before_it() -> None:
    current = backend.current_backend
    assert current() == "auto"
    with use_backend("reference"):
        with use_backend("triton"):
            with use_backend("auto"):
                assert current() == "auto"
            assert current() == "triton"
        assert current() == "reference"
    assert current() == "auto"
    set_backend("reference")
    assert current() == "reference"
    set_backend("triton")
    block = use_backend("reference")
    for _ in range(2):  # an object sets its backend each time it is entered
        assert current() == "triton"
        with block:
            assert current() == "reference"
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert current() == "triton"


def in_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def seen_elsewhere() -> str:
    seen: list[str] = []
    in_a_thread(lambda: seen.append(backend.current_backend()))
    return seen[0]


def test_a_block_is_its_threads_own_and_a_setter_the_processes() -> None:
    with use_backend("reference"):
        assert seen_elsewhere() == "auto"
        in_a_thread(lambda: set_backend("triton"))
        assert backend.current_backend() == "reference"
    assert backend.current_backend() == seen_elsewhere() == "triton"


def test_a_block_is_its_contexts_own() -> None:
    async def inside(name: Backend) -> str:
        with use_backend(name):
            await asyncio.sleep(0)
            return backend.current_backend()

    async def both() -> list[str]:
        return list(await asyncio.gather(inside("reference"), inside("triton")))

    assert asyncio.run(both()) == ["reference", "triton"]
    contextvars.copy_context().run(use_backend("triton").__enter__)
    assert backend.current_backend() == "auto"


def test_compiled_code_follows_the_block_the_setter_and_the_thread(fresh_dynamo: None) -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def shifted(x: Tensor) -> Tensor:
        return x + {"auto": 1, "reference": 2, "triton": 3}[backend.current_backend()]

    def value() -> float:
        return shifted(torch.zeros(1)).item()

    assert value() == 1
    with use_backend("reference"):
        assert value() == 2
        other: list[float] = []
        in_a_thread(lambda: other.append(value()))
        assert other == [1]
    assert value() == 1
    assert counter.frame_count == 2
    set_backend("triton")
    assert value() == 3


def test_a_block_inside_of_compiled_code(fresh_dynamo: None) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def shifted(x: Tensor) -> Tensor:
        with use_backend("reference"), use_backend("triton"):
            x = x + 10 * (backend.current_backend() == "triton")
        return x + (backend.current_backend() == "auto")

    assert [shifted(torch.zeros(1)).item() for _ in range(2)] == [11, 11]
    assert backend.current_backend() == seen_elsewhere() == "auto"


def test_a_setter_inside_of_compiled_code(fresh_dynamo: None) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def shifted(x: Tensor) -> Tensor:
        set_backend("triton")
        return x + (backend.current_backend() == "triton")

    assert [shifted(torch.zeros(1)).item() for _ in range(2)] == [1, 1]
    assert backend.current_backend() == seen_elsewhere() == "triton"


@pytest.mark.parametrize("choose", [use_backend, set_backend])
@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_an_unknown_name_is_refused_and_changes_nothing(
    name: str | None, choose: Callable[[Any], object]
) -> None:
    set_backend("reference")
    message = message_of(ValueError, lambda: choose(name))
    assert message == f"name: expected one of auto, triton, reference, got {name!r}"
    assert backend.current_backend() == "reference"


def test_the_environment_is_the_default_and_the_setter_overrules_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert backend.current_backend() == "reference"
    with use_backend("auto"):
        assert backend.current_backend() == "auto"
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE)  # it is read once
    assert backend.current_backend() == "reference"


def test_an_unknown_name_in_the_environment_is_refused_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "gpu")
    assert message_of(ValueError, lambda: functional.sk_fuse(BRANCHES)) == (
        "SKNET_TRITON_BACKEND: expected one of auto, triton, reference, got 'gpu'"
    )


def test_triton_on_a_cpu_tensor_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"):
        message = message_of(ValueError, lambda: functional.sk_fuse(BRANCHES))
    assert message == (
        "backend: 'triton' needs tensors on a GPU (or TRITON_INTERPRET=1), got a tensor on cpu"
    )


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "On", "yes", "y", "0", "t", "2", "", None])
def test_the_interpreter_counts_as_triton_counts_it(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backend.interpreting() == backend.has_kernels(BRANCHES[0]) == knobs.runtime.interpret


@pytest.mark.parametrize(
    ("name", "on_a_gpu", "taken"),
    [
        ("auto", False, False),
        ("reference", False, False),
        ("auto", True, True),
        ("triton", True, True),
        ("reference", True, False),
    ],
)
def test_gpu_tensors_take_triton_unless_told_otherwise(
    name: Backend, on_a_gpu: bool, taken: bool
) -> None:
    with use_backend(name):
        assert backend.takes_triton(ON_A_GPU if on_a_gpu else BRANCHES[0]) is taken


@needs_gloo
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_dtensors_take_pytorch_and_are_refused_by_the_kernels(axis: int, one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def both(xs: list[Any]) -> tuple[Any, Any]:
        pooled = functional.sk_fuse(xs)
        return pooled, functional.sk_select(xs, torch.stack([pooled, -pooled], 1))

    xs = [torch.randn(2, 4, 6, 3) for _ in range(2)]
    mesh = init_device_mesh("cpu", (1,))
    sharded = [distribute_tensor(x, mesh, [Shard(axis)]) for x in xs]
    assert_close([x.full_tensor() for x in both(sharded)], both(xs))
    with use_backend("triton"), pytest.raises(RuntimeError, match="no sharding rule for DTensors"):
        functional.sk_fuse(sharded)


def test_without_triton_auto_falls_back_and_triton_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # test_packaging.py does this again where triton is really absent; here the tensor is a GPU's.
    monkeypatch.setattr(backend, "_triton_installed", lambda: False)
    with use_backend("auto"):
        assert not backend.takes_triton(ON_A_GPU)
    with use_backend("triton"), pytest.raises(ImportError, match="needs the package triton"):
        backend.takes_triton(ON_A_GPU)
