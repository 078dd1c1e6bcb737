"""Worker processes: data loaders, children of a parent that has run kernels, shared parameters."""

import contextvars
import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sknet_triton import SKConv, functional, set_backend, use_backend
from sknet_triton import backend as backend_module
from sknet_triton.backend import ENVIRONMENT_VARIABLE, Backend, current_backend
from tests.helpers import assert_same
from tests.plain_sknet import scramble
from tests.processes import fill_fresh_memory_with_nan

pytestmark = pytest.mark.slow

# Workers compute on the CPU, where the kernels run in the interpreter only.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS: tuple[Backend, ...] = ("reference", "triton") if INTERPRETED else ("reference",)
METHODS = [method for method in ("fork", "spawn") if method in mp.get_all_start_methods()]
NAMES: tuple[str, ...] = get_args(Backend)
RATE = 0.1

in_every_way = pytest.mark.parametrize(
    ("method", "backend"), [(method, backend) for method in METHODS for backend in BACKENDS]
)


def layer() -> SKConv:
    torch.manual_seed(3)
    return scramble(SKConv(4, 4, G=2, d=3)).double()


def images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 5, 4, dtype=torch.float64, generator=generator)


def computed(sk: SKConv, x: Tensor) -> dict[str, Tensor]:
    """Runs both stages as functions, and a layer."""
    branches = [x, x.flip(0)]
    pooled = functional.sk_fuse(branches)
    out = functional.sk_select(branches, torch.stack([pooled, -pooled], 1))
    return {"pooled": pooled, "out": out, "layer": sk(x).detach()}


def expected(seed: int) -> dict[str, Tensor]:
    with use_backend("reference"):
        return computed(layer().eval(), images(seed))


@contextmanager
def chosen(backend: Backend, method: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chooses for a child: a forked one inherits the choice, a spawned one the environment."""
    if method == "spawn":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    with use_backend(backend):
        yield


# --- data loaders -------------------------------------------------------------------------------


class Transformed(Dataset[dict[str, Tensor]]):
    """What an SKConv and the stages make of images, in which process and on which backend."""

    def __init__(self) -> None:
        self.sk = layer().eval()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        made_by = torch.tensor([os.getpid(), NAMES.index(current_backend())])
        return computed(self.sk, images(index)) | {"by": made_by}


@pytest.mark.parametrize(
    ("method", "backend"), [(METHODS[0], BACKENDS[0]), *((m, BACKENDS[-1]) for m in METHODS)]
)
def test_the_workers_of_a_data_loader_compute_what_their_parent_does(
    method: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Transformed()
    with chosen(backend, method, monkeypatch):
        own = [data[i] for i in range(len(data))]  # the parent has run kernels before it forks
        loader = DataLoader(
            data, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120
        )
        seen = list(loader)
    assert len(seen) == len(data)
    for i, made in enumerate(seen):
        process, name = made.pop("by").tolist()
        assert process != os.getpid()
        assert NAMES[name] == backend
        assert all(torch.equal(made[key], own[i][key]) for key in ("pooled", "out", "layer"))
        assert_same(made, expected(i))


# --- children and shared parameters -------------------------------------------------------------


def child(_: int, sk: SKConv, folder: str, train: bool) -> None:
    torch.set_num_threads(1)
    fill_fresh_memory_with_nan()
    seen: dict[str, Any] = {
        "kernels before": "sknet_kernels.sk_fuse" in sys.modules,
        "backend": current_backend(),
        "shared": all(t.is_shared() for t in sk.state_dict().values()),
        "computed": computed(sk.eval(), images(0)),
    }
    if train:
        train_step(sk)
    torch.save(seen, Path(folder) / "seen.pt")


def train_step(sk: SKConv) -> None:
    torch.autograd.backward(sk.train()(images(1)).square().sum())
    with torch.no_grad():
        for p in sk.parameters():
            p.sub_(cast(Tensor, p.grad), alpha=RATE)


@in_every_way
def test_a_child_computes_with_parameters_in_shared_memory_and_trains_them(
    method: str, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sk = layer().share_memory()
    twin = copy.deepcopy(sk)
    # A forked child may not run a backward once its parent has run one on a GPU.
    train = method == "spawn"
    with chosen(backend, method, monkeypatch):
        computed(twin.eval(), images(0))
        cast(Any, mp).start_processes(
            child, (sk, str(tmp_path), train), nprocs=1, start_method=method
        )
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["shared"]
    assert seen["backend"] == backend
    assert_same(seen["computed"], expected(0))
    # A spawned child has imported the package afresh, and with it no kernel.
    assert seen["kernels before"] == (method == "fork" and "sknet_kernels.sk_fuse" in sys.modules)
    before = {name: t.clone() for name, t in twin.state_dict().items()}
    if train:
        with use_backend("reference"):
            train_step(twin)
        assert not torch.equal(twin.fc2.weight, before["fc2.weight"])
    assert_same(dict(sk.state_dict()), dict(twin.state_dict()))


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
def test_a_choice_made_in_a_forked_child_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "_process", None)
    set_backend("triton")
    with use_backend("auto"):
        cast(Any, mp).start_processes(choose, (str(tmp_path),), nprocs=1, start_method="fork")
        assert current_backend() == "auto"
    assert current_backend() == "triton"
    # The block went along, and stays before what the child's process is set to.
    assert (tmp_path / "chosen").read_text() == "auto reference"


def choose(_: int, folder: str) -> None:
    set_backend("reference")
    inside = current_backend()
    outside = contextvars.Context().run(current_backend)
    (Path(folder) / "chosen").write_text(f"{inside} {outside}")
