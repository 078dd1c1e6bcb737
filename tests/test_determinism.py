"""The same bits over calls and over processes, also where a row is split among programs."""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sknet_kernels.config import FUSE, SELECT_BWD, DeviceFacts, Problem
from sknet_triton import Backend, SKConv, functional, use_backend
from tests.helpers import BACKENDS, ROOT, laid_out, source_environment
from tests.plain_sknet import scramble

KERNELS = ROOT / "kernels" / "sknet_kernels"


@dataclass(frozen=True)
class Subject:
    """A function of one tensor that has gradients, and the tensor's shape."""

    build: Callable[[torch.device], Callable[[Tensor], Tensor]]
    shape: tuple[int, ...]
    layout: str = "contiguous"


def fuse(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.sk_fuse([x, x.square()])


def select(device: torch.device) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        logits = torch.stack([x.mean((2, 3)), x.amax((2, 3))], 1)
        return functional.sk_select([x, x.square()], logits)

    return call


def conv(device: torch.device) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = scramble(SKConv(4, 4, G=2, d=3)).to(device)
    return module


SUBJECTS = {
    "sk_fuse": Subject(fuse, (1, 2, 40, 40)),
    "sk_fuse channels_last": Subject(fuse, (1, 2, 40, 40), "channels_last"),
    "sk_select": Subject(select, (1, 2, 40, 40)),
    "sk_select channels_last": Subject(select, (1, 2, 40, 40), "channels_last"),
    "SKConv": Subject(conv, (2, 4, 24, 24)),
    "SKConv channels_last": Subject(conv, (2, 4, 24, 24), "channels_last"),
}


def results(name: str, backend: Backend, device: torch.device) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    function = subject.build(device)
    x = laid_out(torch.randn(subject.shape, device=device), subject.layout).requires_grad_()
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    with use_backend(backend):
        out = function(x)
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
@pytest.mark.parametrize("name", SUBJECTS)
def test_calls_give_the_same_bits_under_deterministic_algorithms(
    name: str, backend: Backend, device: torch.device
) -> None:
    first = results(name, backend, device)
    assert all(x.isfinite().all() for x in first)
    for x, again in zip(first, results(name, backend, device), strict=True):
        assert torch.equal(x, again)


@pytest.mark.slow
def test_processes_give_the_same_bits(device: torch.device) -> None:
    names = ["sk_select", "SKConv channels_last"]
    program = (
        "from tests import conftest, test_determinism as t; import torch\n"
        f"for name in {names}:\n"
        "    for backend in t.BACKENDS:\n"
        f"        print(t.digest(t.results(name, backend, torch.device('{device.type}'))))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=source_environment(PYTHONHASHSEED="1"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    here = [digest(results(name, backend, device)) for name in names for backend in BACKENDS]
    assert printed == here
    assert len(set(here)) == len(here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_that_no_kernel_has_written_is_nan(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.empty(64, dtype=dtype, device=device)
    for fresh in (x, torch.empty_like(x), x.new_empty(3, 5)):
        assert fresh.isnan().all()


def test_the_kernels_use_no_atomics() -> None:
    sources = sorted(KERNELS.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        assert "atomic" not in source.read_text(), source.name


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_the_rows_here_are_split(channels_last: bool, device: torch.device) -> None:
    B, C, height, width = SUBJECTS["sk_select"].shape
    problem = Problem(B, C, height * width, 2, 4, channels_last, align=4)
    facts = DeviceFacts.of(device)
    for kernel in (FUSE, SELECT_BWD):
        assert kernel.heuristic(problem, facts).splits > 1
