"""The same bits over calls and over processes, also where a row is split among programs."""

import hashlib
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
from torch import Tensor

from sknet_kernels.config import FUSE, SELECT_BWD, DeviceFacts, Problem
from sknet_triton import Backend, SKConv, functional, use_backend
from tests.helpers import BACKENDS, DEVICE, ROOT, laid_out, run_python, small_conv

KERNELS = ROOT / "kernels" / "sknet_kernels"


Function = Callable[[Tensor], Tensor]


def fuse(x: Tensor) -> Tensor:
    return functional.sk_fuse([x, x.square()])


def select(x: Tensor) -> Tensor:
    logits = torch.stack([x.mean((2, 3)), x.amax((2, 3))], 1)
    return functional.sk_select([x, x.square()], logits)


# A function or what makes a module, and the shape of its one argument.
SUBJECTS: dict[str, tuple[Function | type[SKConv], tuple[int, ...]]] = {
    "sk_fuse": (fuse, (1, 2, 40, 40)),
    "sk_select": (select, (1, 2, 40, 40)),
    "SKConv": (SKConv, (2, 4, 24, 24)),
}
LAYOUTS = ("contiguous", "channels_last")


def results(name: str, layout: str, backend: Backend) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    function, shape = SUBJECTS[name]
    module = small_conv(dtype=torch.float32)
    x = laid_out(torch.randn(shape, device=DEVICE), layout).requires_grad_()
    parameters = list(module.parameters()) if function is SKConv else []
    with use_backend(backend):
        out = module(x) if function is SKConv else cast(Function, function)(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *parameters])]


def digest(tensors: list[Tensor]) -> str:
    state = hashlib.sha256()
    for x in tensors:
        state.update(x.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


@pytest.fixture
def _deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_calls_give_the_same_bits_under_deterministic_algorithms(
    name: str, layout: str, backend: Backend
) -> None:
    first = results(name, layout, backend)
    assert all(x.isfinite().all() for x in first)
    assert all(map(torch.equal, first, results(name, layout, backend)))


@pytest.mark.slow
def test_processes_give_the_same_bits() -> None:
    drawn = [
        (*subject, backend)
        for subject in (("sk_select", "contiguous"), ("SKConv", "channels_last"))
        for backend in BACKENDS
    ]
    program = (
        "from tests import conftest, test_determinism as t\n"
        f"for subject in {drawn}: print(t.digest(t.results(*subject)))"
    )
    printed = run_python("-c", program, PYTHONHASHSEED="1").split()
    here = [digest(results(*subject)) for subject in drawn]
    assert printed == here
    assert len(set(here)) == len(here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_that_no_kernel_has_written_is_nan(dtype: torch.dtype) -> None:
    x = torch.empty(64, dtype=dtype, device=DEVICE)
    for fresh in (x, torch.empty_like(x), x.new_empty(3, 5)):
        assert fresh.isnan().all()


def test_the_kernels_use_no_atomics() -> None:
    sources = sorted(KERNELS.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        assert "atomic" not in source.read_text(), source.name


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_the_rows_here_are_split(channels_last: bool) -> None:
    B, C, height, width = SUBJECTS["sk_select"][1]
    problem = Problem(B, C, height * width, 2, 4, channels_last, align=4)
    facts = DeviceFacts.of(DEVICE)
    for kernel in (FUSE, SELECT_BWD):
        assert kernel.heuristic(problem, facts).splits > 1
