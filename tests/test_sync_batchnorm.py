"""SyncBatchNorm in SKConv over two processes, against one process with the joined batch.

The oracle is made of nn.BatchNorm2d modules called one by one. All cases run in one pair of
processes, because starting a pair takes longer than the cases do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sknet_triton import SKConv, use_backend
from sknet_triton.backend import Backend
from tests.helpers import (
    BACKENDS,
    DEVICE,
    FLOAT64,
    Seen,
    assert_same,
    averaged,
    is_plain,
    laid_out,
    one_by_one,
    outcome,
    weighed,
    weights,
)
from tests.plain_sknet import for_norms, scramble, without_affine, without_tracking
from tests.processes import WORLD, in_two_processes, needs_gloo, share

# torch leaves it untyped. It works in place on all but a lone norm.
convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm

pytestmark = [pytest.mark.slow, needs_gloo]

PLAIN = BACKENDS[:1]


@dataclass(frozen=True)
class Case:
    """What the two processes do: how many images each has, and what is done to the norms.

    ``change`` comes before ``sync``, which makes norms that span a group. Where ``backends`` is
    one, the sums that cross processes are those of another case.
    """

    images: tuple[int, int] = (2, 3)
    change: Callable[[SKConv], Any] = lambda sk: None
    sync: Callable[[SKConv, Any], Any] = convert
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"
    compiled: bool = False
    own_group: bool = False
    backends: tuple[Backend, ...] = BACKENDS

    def module(self) -> SKConv:
        torch.manual_seed(1)
        sk = scramble(SKConv(3, 4, G=1, d=5, **FLOAT64, **self.options))
        self.change(sk)
        return sk

    def joined(self) -> tuple[Tensor, Tensor]:
        """Returns the whole batch, its second image far from the rest, and a gradient."""
        torch.manual_seed(2)
        x = torch.randn(sum(self.images), 3, 5, 4, dtype=torch.float64)
        x[1] = 3 * x[1] + 2
        x = laid_out(x.to(DEVICE), self.layout)
        return x, torch.randn_like(self.module().eval()(x).detach())


def sync_branches(sk: SKConv, group: Any) -> None:
    convert(sk.branches, group)


def sync_fc1(sk: SKConv, group: Any) -> None:
    convert(sk.fc1, group)


CASES = {
    "unequal": Case(),
    "one image on a rank": Case((1, 3)),
    "one image on every rank": Case((1, 1), backends=PLAIN),
    "no image on a rank": Case((0, 3)),
    "equal": Case((2, 2), backends=PLAIN),
    "M3 stride 2 channels_last": Case(options={"M": 3, "stride": 2}, layout="channels_last"),
    "momentum None": Case(change=for_norms(lambda bn: setattr(bn, "momentum", None))),
    "no affine": Case(change=for_norms(without_affine)),
    "no tracking": Case(change=for_norms(without_tracking), backends=PLAIN),
    "frozen branches": Case((1, 3), lambda sk: sk.branches.eval()),
    "frozen fc1": Case((1, 3), lambda sk: sk.fc1.eval()),
    "eval": Case((1, 3), lambda sk: sk.eval(), backends=PLAIN),
    "compiled": Case((1, 3), compiled=True),
    "a group of its own": Case(own_group=True, backends=PLAIN),
    # A frozen norm agrees with any group.
    "branches beside frozen fc1": Case(
        change=lambda sk: sk.fc1.eval(), sync=sync_branches, own_group=True, backends=PLAIN
    ),
    "fc1 beside frozen branches": Case(
        change=lambda sk: sk.branches.eval(), sync=sync_fc1, own_group=True, backends=PLAIN
    ),
    "branches in eval": Case(
        change=lambda sk: sk.eval(), sync=sync_branches, own_group=True, backends=PLAIN
    ),
}
# What makes norms that disagree.
DISAGREEING: dict[str, Callable[[SKConv, Any], Any]] = {
    "branches": sync_branches,
    "fc1": sync_fc1,
    "two groups": lambda sk, group: (convert(sk.branches, group), convert(sk.fc1)),
    "one branch": lambda sk, group: convert(sk.branches[0], group),
}


def two_steps(sk: SKConv, x: Tensor, dout: Tensor, compiled: bool = False) -> Seen:
    run = torch.compile(sk, fullgraph=True, backend="aot_eager") if compiled else sk
    outcome(run, sk, x, dout)
    return outcome(run, sk, x, dout)


def modules_one_by_one(sk: SKConv, x: Tensor, dout: Tensor) -> Seen:
    with use_backend("reference"):
        return two_steps(one_by_one(sk), x, dout)


# --- what the processes do ----------------------------------------------------------------------


def worker(rank: int) -> dict[str, Any]:
    together = dist.new_group(list(range(WORLD)))
    groups_of_one = [dist.new_group([r]) for r in range(WORLD)]
    seen: dict[str, Any] = {
        f"{name} {backend}": run_case(case, backend, rank, together if case.own_group else None)
        for name, case in CASES.items()
        for backend in case.backends
    }
    for backend in BACKENDS:
        seen[f"alone {backend}"] = run_case(CASES["unequal"], backend, rank, groups_of_one[rank])
    seen["uneven"] = run_uneven(rank)
    seen["errors"] = {name: run_disagreeing(name, rank, together) for name in DISAGREEING}
    return seen


def run_case(case: Case, backend: Backend, rank: int, group: Any) -> Seen:
    sk = case.module()
    case.sync(sk, group)
    assert is_plain(sk)
    x, dout = (share(t, case.images, rank) for t in case.joined())
    with use_backend(backend):
        return two_steps(sk, x, dout, case.compiled)


def run_disagreeing(name: str, rank: int, group: Any) -> str:
    """Returns the error of the modules: on a GPU, where they are right, there is none."""
    case = CASES["unequal"]
    sk = case.module()
    DISAGREEING[name](sk, group)
    assert not is_plain(sk)
    x, dout = (share(t, case.images, rank) for t in case.joined())
    try:
        with use_backend("reference"):
            two_steps(sk, x, dout)
    except ValueError as error:
        return str(error)
    return ""


# --- processes that see other resolutions -------------------------------------------------------

SHAPES = ((2, 3, 4, 5), (3, 3, 7, 6))


def drawn() -> tuple[SKConv, list[Tensor], list[Tensor]]:
    """Returns a layer, the input of each process and the gradient that arrives there."""
    torch.manual_seed(3)
    sk = scramble(SKConv(3, 4, G=1, d=5, **FLOAT64))
    xs = [torch.randn(shape, **FLOAT64) for shape in SHAPES]
    return sk, xs, [torch.randn(len(x), 4, *x.shape[2:], **FLOAT64) for x in xs]


def activated(branch: Any, maps: list[Tensor]) -> list[Tensor]:
    """Normalises maps of several sizes by their joint statistics, as one image of all values."""
    rows = torch.cat([m.transpose(0, 1).flatten(1) for m in maps], 1)
    u = branch.bn(rows[None, ..., None]).relu()[0, ..., 0]
    parts = torch.split(u, [m.numel() // m.shape[1] for m in maps], 1)
    return [
        part.view(m.transpose(0, 1).shape).transpose(0, 1)
        for part, m in zip(parts, maps, strict=True)
    ]


def joint(sk: SKConv, xs: list[Tensor]) -> list[Tensor]:
    """Runs one layer on the inputs of all processes, which may differ in size."""
    branches = [activated(b, [cast(Any, b).conv(x) for x in xs]) for b in sk.branches]
    of_processes = list(zip(*branches, strict=True))
    attn = weights(sk.logits(torch.cat([averaged(maps) for maps in of_processes])))
    shares = torch.split(attn, [len(x) for x in xs])
    return [weighed(maps, own) for maps, own in zip(of_processes, shares, strict=True)]


def run_uneven(rank: int) -> dict[Backend, Seen]:
    seen: dict[Backend, Seen] = {}
    for backend in BACKENDS:
        sk, xs, douts = drawn()
        convert(sk)
        with use_backend(backend):
            seen[backend] = outcome(sk, sk, xs[rank], douts[rank])
    return seen


# --- what is asked of them ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes(worker, tmp_path_factory.mktemp("ranks"))


def assert_joined(seen: list[Seen], expected: Seen) -> None:
    for own in seen:  # every process keeps the statistics of the joined batch
        whole = dict(own)
        for key in own:
            if key in ("out", "dx"):
                whole[key] = torch.cat([share[key] for share in seen])
            elif key.startswith("grad "):
                whole[key] = torch.stack([share[key] for share in seen]).sum(0)
        assert_same(whole, expected)


@pytest.mark.parametrize(
    ("name", "backend"), [(name, b) for name, case in CASES.items() for b in case.backends]
)
def test_two_processes_equal_one_with_the_joined_batch(
    name: str, backend: Backend, ranks: list[dict[str, Any]]
) -> None:
    case = CASES[name]
    expected = modules_one_by_one(case.module(), *case.joined())
    assert_joined([seen[f"{name} {backend}"] for seen in ranks], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_groups_of_one_every_process_is_alone(
    backend: Backend, ranks: list[dict[str, Any]]
) -> None:
    case = CASES["unequal"]
    for rank, seen in enumerate(ranks):
        x, dout = (share(t, case.images, rank) for t in case.joined())
        expected = modules_one_by_one(case.module(), x, dout)
        assert_joined([seen[f"alone {backend}"]], expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch's SyncBatchNorm takes GPU tensors")
@pytest.mark.parametrize("name", DISAGREEING)
def test_norms_that_disagree_are_called(name: str, ranks: list[dict[str, Any]]) -> None:
    message = "SyncBatchNorm expected input tensor to be on GPU"
    assert all(message in process["errors"][name] for process in ranks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_counted_rather_than_images(
    backend: Backend, ranks: list[dict[str, Any]]
) -> None:
    sk, xs, douts = drawn()
    leaves = [x.requires_grad_() for x in xs]
    outs = joint(sk, leaves)
    torch.autograd.backward(outs, douts)
    buffers = {name: t for name, t in sk.named_buffers() if "running" in name}
    seen = [process["uneven"][backend] for process in ranks]
    for rank in range(WORLD):
        dx = cast(Tensor, leaves[rank].grad)
        expected = {"out": outs[rank].detach(), "dx": dx, **buffers}
        assert_same({name: seen[rank][name] for name in expected}, expected)
    grads = {f"grad {name}": cast(Tensor, p.grad) for name, p in sk.named_parameters()}
    assert_same({name: seen[0][name] + seen[1][name] for name in grads}, grads)


# --- SyncBatchNorm in a single process ----------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["unequal", "momentum None", "frozen fc1", "eval"])
def test_without_a_process_group_it_is_batch_norm(name: str, backend: Backend) -> None:
    case = CASES[name]
    sk = case.module()
    expected = modules_one_by_one(sk, *case.joined())
    with use_backend(backend):
        assert_joined([two_steps(convert(sk), *case.joined())], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_image_in_a_single_process_is_refused(backend: Backend) -> None:
    sk = convert(CASES["unequal"].module())
    x = CASES["unequal"].joined()[0][:1]
    with use_backend(backend), pytest.raises(ValueError, match="a batch of at least 2"):
        sk(x)
