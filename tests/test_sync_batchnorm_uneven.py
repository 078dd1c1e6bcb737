"""SyncBatchNorm where processes see other resolutions, or one of them no image at all."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sknet_triton import SKConv, use_backend
from sknet_triton.backend import Backend
from tests.helpers import BACKENDS, Seen, assert_same, outcome
from tests.plain_sknet import scramble
from tests.processes import in_two_processes, needs_gloo

pytestmark = [pytest.mark.slow, needs_gloo]

SHAPES = {
    "other resolutions": ((2, 3, 4, 5), (3, 3, 7, 6)),
    "an empty process": ((0, 3, 4, 5), (3, 3, 4, 5)),
}


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(kind: str) -> tuple[SKConv, list[Tensor], list[Tensor]]:
    """Returns a layer, the input of each process and the gradient that arrives there."""
    torch.manual_seed(3)
    sk = cast(SKConv, scramble(SKConv(3, 4, G=1, d=5, dtype=torch.float64)).to(DEVICE))
    xs = [torch.randn(shape, dtype=torch.float64).to(DEVICE) for shape in SHAPES[kind]]
    return sk, xs, [torch.randn(len(x), 4, *x.shape[2:], dtype=x.dtype).to(DEVICE) for x in xs]


def activated(branch: Any, maps: list[Tensor]) -> list[Tensor]:
    """Normalises maps of several sizes by their joint statistics, one row a position."""
    rows = torch.cat([m.movedim(1, -1).flatten(0, -2) for m in maps])
    bn = branch.bn
    rows = F.batch_norm(
        rows, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, bn.momentum, bn.eps
    ).relu()
    parts = torch.split(rows, [m.numel() // m.shape[1] for m in maps])
    return [
        part.view(len(m), *m.shape[2:], m.shape[1]).movedim(-1, 1)
        for part, m in zip(parts, maps, strict=True)
    ]


def joint(sk: SKConv, xs: list[Tensor]) -> list[Tensor]:
    """Runs one layer on the inputs of all processes, which may differ in size."""
    branches = [activated(b, [cast(Any, b).conv(x) for x in xs]) for b in sk.branches]
    pooled = torch.cat([sum(maps).mean((2, 3)) for maps in zip(*branches, strict=True)])
    attn = torch.split(torch.softmax(sk.logits(pooled), 1), [len(x) for x in xs])
    return [
        torch.stack(
            [attn[j][:, i, :, None, None] * maps[j] for i, maps in enumerate(branches)]
        ).sum(0)
        for j in range(len(xs))
    ]


def work(rank: int) -> dict[tuple[str, str], Seen]:
    seen: dict[tuple[str, str], Seen] = {}
    for kind in SHAPES:
        for backend in BACKENDS:
            plain, xs, douts = drawn(kind)
            sk = cast(Any, nn.SyncBatchNorm).convert_sync_batchnorm(plain)
            with use_backend(backend):
                seen[kind, backend] = outcome(sk, sk, xs[rank], douts[rank])
    return seen


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Seen]]:
    return in_two_processes(work, tmp_path_factory.mktemp("uneven"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_values_are_counted_rather_than_images(
    kind: str, backend: Backend, processes: list[dict[Any, Seen]]
) -> None:
    sk, xs, douts = drawn(kind)
    leaves = [x.requires_grad_() for x in xs]
    outs = joint(sk, leaves)
    torch.autograd.backward(outs, douts)
    buffers = {name: t for name, t in sk.named_buffers() if "running" in name}
    seen = [process[kind, backend] for process in processes]
    for rank in range(2):
        dx = cast(Tensor, leaves[rank].grad)
        expected = {"out": outs[rank].detach(), "dx": dx, **buffers}
        assert_same({name: seen[rank][name] for name in expected}, expected)
    grads = {f"grad {name}": cast(Tensor, p.grad) for name, p in sk.named_parameters()}
    assert_same({name: seen[0][name] + seen[1][name] for name in grads}, grads)
