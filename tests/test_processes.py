"""Children of a parent that has run kernels: the backend, shared parameters, training in them."""

import copy
import os
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from sknet_triton import SKConv, functional, use_backend
from sknet_triton.backend import ENVIRONMENT_VARIABLE, Backend, current_backend
from tests.helpers import assert_same, images, small_conv
from tests.processes import fill_fresh_memory_with_nan

pytestmark = pytest.mark.slow

# Workers compute on the CPU, where the kernels run in the interpreter only.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS: tuple[Backend, ...] = ("reference", "triton") if INTERPRETED else ("reference",)
METHODS = [method for method in ("fork", "spawn") if method in mp.get_all_start_methods()]
CPU, RATE = torch.device("cpu"), 0.1

in_every_way = pytest.mark.parametrize(
    ("method", "backend"), [(method, backend) for method in METHODS for backend in BACKENDS]
)


def computed(sk: SKConv, x: Tensor) -> dict[str, Tensor]:
    """Runs both stages as functions, and a layer."""
    branches = [x, x.flip(0)]
    pooled = functional.sk_fuse(branches)
    out = functional.sk_select(branches, torch.stack([pooled, -pooled], 1))
    return {"pooled": pooled, "out": out, "layer": sk(x).detach()}


def child(_: int, sk: SKConv, folder: str, train: bool) -> None:
    torch.set_num_threads(1)
    fill_fresh_memory_with_nan()
    seen: dict[str, Any] = {
        "kernels before": "sknet_kernels.sk_fuse" in sys.modules,
        "backend": current_backend(),
        "shared": all(t.is_shared() for t in sk.state_dict().values()),
        "computed": computed(sk.eval(), images(2, device=CPU)),
    }
    if train:
        train_step(sk)
    torch.save(seen, Path(folder) / "seen.pt")


def train_step(sk: SKConv) -> None:
    torch.autograd.backward(sk.train()(images(2, seed=2, device=CPU)).square().sum())
    with torch.no_grad():
        for p in sk.parameters():
            p.sub_(cast(Tensor, p.grad), alpha=RATE)


@in_every_way
def test_a_child_computes_with_parameters_in_shared_memory_and_trains_them(
    method: str, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sk = small_conv(device=CPU).share_memory()
    twin = copy.deepcopy(sk)
    # A forked child may not run a backward once its parent has run one on a GPU.
    train = method == "spawn"
    if method == "spawn":  # a forked child inherits the block, a spawned one the environment
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    with use_backend(backend):
        computed(twin.eval(), images(2, device=CPU))
        cast(Any, mp).start_processes(
            child, (sk, str(tmp_path), train), nprocs=1, start_method=method
        )
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["shared"]
    assert seen["backend"] == backend
    with use_backend("reference"):
        assert_same(
            seen["computed"], computed(small_conv(device=CPU).eval(), images(2, device=CPU))
        )
    # A spawned child has imported the package afresh, and with it no kernel.
    assert seen["kernels before"] == (method == "fork" and "sknet_kernels.sk_fuse" in sys.modules)
    before = {name: t.clone() for name, t in twin.state_dict().items()}
    if train:
        with use_backend("reference"):
            train_step(twin)
        assert not torch.equal(twin.fc2.weight, before["fc2.weight"])
    assert_same(dict(sk.state_dict()), dict(twin.state_dict()))
