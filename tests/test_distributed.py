"""DistributedDataParallel and FSDP2 over two gloo processes, against one process.

The oracle is one process that calls the modules one by one. Where batch norms take statistics, a
process has those of its own share of the batch, and the oracle is both shares one after the other.
All cases run in one pair of processes.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sknet_triton as skt
from perf.peers import rebuilt
from sknet_triton import SKConv, SKUnit, use_backend
from sknet_triton.acceleration.swap import Accelerated
from sknet_triton.backend import Backend
from tests.helpers import (
    BACKENDS,
    DEVICE,
    Seen,
    assert_same,
    images,
    is_plain,
    small_network,
    state_of,
)
from tests.plain_sknet import largest_error, scramble
from tests.processes import WORLD, in_two_processes, needs_gloo, share

pytestmark = [pytest.mark.slow, needs_gloo]

CPU = torch.device("cpu")
SHARES = (2, 3)  # images of each process
RATE = 0.05

ONE, OTHER = BACKENDS[:1], BACKENDS[1:]
# FSDP2 over gloo takes CPU tensors, and those the kernels take in the interpreter only.
FSDP_BACKENDS: tuple[Backend, ...] = ONE if torch.cuda.is_available() else BACKENDS

Model = Callable[[Tensor], Tensor]


# --- models and steps ---------------------------------------------------------------------------


def finished(*layers: nn.Module) -> nn.Module:
    pooled = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return scramble(pooled).double()


def units() -> nn.Module:
    """Two units: an `sk_fuse_select`, and one that calls fuse and select apart."""
    first = SKUnit(4, 4, 6, G=2, d=3)
    return finished(first, SKUnit(6, 2, 6, G=2, d=3, fc_norm="none"), nn.Conv2d(6, 3, 1))


def layer() -> nn.Module:
    """No batch norm outside of the SKConv: torch's SyncBatchNorm takes no CPU tensors."""
    return finished(SKConv(4, 4, G=2, d=3))


def peer() -> nn.Module:
    return finished(rebuilt.SelectiveKernel(4, 4), nn.Conv2d(4, 3, 1))


def checkpointed_network() -> nn.Module:
    net = small_network(units=2)
    net.set_grad_checkpointing()
    return net


def built(build: Callable[[], nn.Module], device: torch.device, training: bool) -> nn.Module:
    torch.manual_seed(0)
    return build().to(device).train(training)


def batches(device: torch.device = CPU, steps: int = 2) -> list[Tensor]:
    return [images(sum(SHARES), (6, 5), seed, device) for seed in range(steps)]


def loss(out: Tensor) -> Tensor:
    """A sum over images, so that shares of any size add up."""
    weight = torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype, device=out.device)
    return (out.square() * weight.view(out.shape[1:])).sum()


def descend(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=RATE)


def alone(model: nn.Module, xs: list[Tensor]) -> list[Seen]:
    """One process takes a step a joint batch; the gradients are means over processes."""
    for x in xs:
        model.zero_grad()
        torch.autograd.backward(loss(model(x)) / WORLD)
        descend(model)
    return [state_of(model)] * WORLD


def alone_by_shares(model: nn.Module, xs: list[Tensor], broadcast: bool) -> list[Seen]:
    """One process plays both, where each has statistics of its own share.

    With ``broadcast`` the second begins every step with the buffers of the first.
    """
    replicas = [model, copy.deepcopy(model)]
    for x in xs:
        if broadcast:
            for buffer, first in zip(replicas[1].buffers(), model.buffers(), strict=True):
                buffer.copy_(first)
        for rank, replica in enumerate(replicas):
            replica.zero_grad()
            torch.autograd.backward(loss(replica(share(x, SHARES, rank))))
        for pair in zip(*(r.parameters() for r in replicas), strict=True):
            mean = torch.stack([cast(Tensor, p.grad) for p in pair]).mean(0)
            for p in pair:
                p.grad = mean.clone()
        for replica in replicas:
            descend(replica)
    return [state_of(replica) for replica in replicas]


# --- DistributedDataParallel --------------------------------------------------------------------


def accelerated(model: Any) -> Any:
    assert skt.accelerate(model).paths("accelerated")
    return model


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


def partly_frozen(model: Any) -> Any:
    model[0].sk.fc1.requires_grad_(False)
    model[0].sk.branches[1].bn.bias.requires_grad_(False)
    return model


def synced(model: Any) -> Any:
    # Afterwards, because DistributedDataParallel refuses torch's SyncBatchNorm on a CPU.
    return cast(Any, nn.SyncBatchNorm).convert_sync_batchnorm(model)


@dataclass(frozen=True)
class Parallel:
    """A use of DistributedDataParallel with ``options``.

    Attributes:
        build: makes the model; ``before`` is done to it, ``after`` to DistributedDataParallel.
        training: whether batch norms take statistics.
        accumulate: whether a step is one micro batch an image, all but the last under ``no_sync``.
        joint: whether the oracle sees the joint batch at once.
        backends: which are asked; an option of DistributedDataParallel alone needs no second one,
            and the kernels are asked where statistics, graphs or gradients are their own.
    """

    options: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] = units
    before: Callable[[Any], Any] = lambda model: model
    after: Callable[[Any], Any] = lambda model: model
    training: bool = False
    accumulate: bool = False
    joint: bool = True
    backends: tuple[Backend, ...] = BACKENDS


SMALL: dict[str, Any] = {"bucket_cap_mb": 1e-4}
STATIC: dict[str, Any] = {"static_graph": True}
VIEWS: dict[str, Any] = {"gradient_as_bucket_view": True}

PARALLEL = {
    "plain": Parallel(),
    "static graph": Parallel(STATIC, backends=ONE),
    "bucket views": Parallel(VIEWS, backends=ONE),
    "small buckets": Parallel(SMALL, backends=ONE),
    "unused parameters looked for": Parallel({"find_unused_parameters": True}, backends=ONE),
    "accumulated": Parallel(accumulate=True, backends=ONE),
    "accumulated in bucket views": Parallel(VIEWS, accumulate=True, backends=ONE),
    "partly frozen": Parallel(before=partly_frozen, backends=OTHER),
    "statistics of shares": Parallel(training=True, joint=False),
    "synced statistics": Parallel(build=layer, after=synced, training=True),
    "checkpointed": Parallel(build=checkpointed_network),
    "checkpointed static graph": Parallel(STATIC, checkpointed_network, backends=ONE),
    "compiled": Parallel(SMALL, layer, after=compiled, training=True, joint=False),
    "compiled before": Parallel(SMALL, layer, compiled, backends=ONE),
    "accelerated": Parallel(build=peer, before=accelerated, backends=ONE),
    "accelerated afterwards": Parallel(build=peer, after=accelerated),
    "accelerated, statistics": Parallel(
        build=peer, after=accelerated, training=True, joint=False, backends=OTHER
    ),
}


def run_parallel(case: Parallel, backend: Backend, rank: int) -> Seen:
    model = built(case.build, DEVICE, case.training)
    parallel = DistributedDataParallel(case.before(model), **case.options)
    run: Model = case.after(parallel)
    with use_backend(backend):
        for x in batches(DEVICE):
            parallel.zero_grad()
            micro = torch.split(share(x, SHARES, rank), 1 if case.accumulate else SHARES[rank])
            for i, part in enumerate(micro):
                with nullcontext() if i == len(micro) - 1 else parallel.no_sync():
                    torch.autograd.backward(loss(run(part)))
            descend(parallel)
    return state_of(model)


# --- FSDP2 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharded:
    """Where `fully_shard` is called; what has no attribute here is as in `Parallel`.

    Attributes:
        paths: the modules, outermost last; a tuple of paths is one group.
        plain: whether the first SKConv is still an `sk_fuse_select`.
    """

    paths: tuple[str | tuple[str, ...], ...] = ("",)
    plain: bool = True
    build: Callable[[], nn.Module] = units
    before: Callable[[Any], Any] = lambda model: model
    training: bool = False
    backends: tuple[Backend, ...] = FSDP_BACKENDS


def compiled_in_place(model: Any) -> Any:
    torch._dynamo.reset()
    model[0].compile(backend="aot_eager")
    return model


SHARDED = {
    "root": Sharded(),
    "units": Sharded(("0", "1", ""), backends=ONE),
    "SKConv": Sharded(("0.sk", "1.sk", "")),
    "convolution": Sharded(("0.sk.branches.0.conv", "0.sk.branches.1.conv", "")),
    "branch": Sharded(("0.sk.branches.0", ""), False, backends=ONE),
    "norm": Sharded(("0.sk.branches.1.bn", ""), False),
    "activation": Sharded(("0.sk.branches.1.act", ""), False, backends=ONE),
    "fc1": Sharded(("0.sk.fc1", "1.sk.fc1", ""), False, backends=ONE),
    "fc1's convolution": Sharded(("0.sk.fc1.conv", ""), False, backends=ONE),
    "fc1's norm": Sharded(("0.sk.fc1.bn", ""), False, backends=ONE),
    "fc2": Sharded(("0.sk.fc2", "1.sk.fc2", ""), False, training=True),
    "fc1 and fc2 in a group": Sharded((("0.sk.fc1", "0.sk.fc2"), ""), False, backends=ONE),
    "units, statistics of shares": Sharded(("0", "1", ""), training=True),
    "checkpointed": Sharded(("stages.0.0", "stages.0.1", ""), build=checkpointed_network),
    "compiled": Sharded(
        ("0", ""), build=layer, before=compiled_in_place, backends=FSDP_BACKENDS[-1:]
    ),
    "accelerated": Sharded(("0", ""), build=peer, before=accelerated, backends=ONE),
    "accelerated, norm": Sharded(("0.paths.0.bn", ""), build=peer, before=accelerated),
    "accelerated, attention": Sharded(
        ("0.attn.fc_select", ""), build=peer, before=accelerated, backends=ONE
    ),
}


def sharded(model: nn.Module, paths: tuple[str | tuple[str, ...], ...], **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (WORLD,))
    for path in paths:
        group = [model.get_submodule(p) for p in ((path,) if isinstance(path, str) else path)]
        fully_shard(cast(Any, group[0] if len(group) == 1 else group), mesh=mesh, **options)
    return model


def whole_state(model: nn.Module) -> Seen:
    """As `state_of`, with every shard gathered."""
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    grads = {
        f"grad {n}": cast(Any, p.grad).full_tensor()
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    return grads | {name: cast(Tensor, t).clone() for name, t in gathered.items()}


def run_sharded(case: Sharded, backend: Backend, rank: int) -> dict[str, Any]:
    model = sharded(case.before(built(case.build, CPU, case.training)), case.paths)
    plain = case.build is peer or is_plain(
        next(m for m in model.modules() if isinstance(m, SKConv))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with use_backend(backend):
        for x in batches(steps=1):
            torch.autograd.backward(loss(model(share(x, SHARES, rank))))
            optimizer.step()
    return {"plain": plain, "state": whole_state(model)}


def accelerated_late() -> list[str]:
    """Returns what `accelerate` says of the modules of a sharded model."""
    model = sharded(built(peer, CPU, False), ("",))
    report = skt.accelerate(model)
    assert not any(isinstance(m, Accelerated) for m in model.modules())
    return [str(row) for row in report]


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FLOAT32_OUT = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
UNTOUCHED = MixedPrecisionPolicy(cast_forward_inputs=False)


# The policy of the whole, whether the norms stay in float32 by one of their own, and V's dtype.
MIXED = {
    "bf16": (BF16, False, torch.bfloat16),
    "bf16, output in float32": (FLOAT32_OUT, False, torch.float32),
    "bf16, norms in float32": (BF16, True, torch.bfloat16),
}


def run_mixed(name: str, backend: Backend, rank: int) -> Seen:
    policy, float32_norms, _ = MIXED[name]
    model = built(units, CPU, True).float()
    if float32_norms:
        norms = [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        sharded(model, tuple(norms), mp_policy=UNTOUCHED)
    else:  # on a CPU a batch norm's statistics have the dtype of its weight
        for buffer in model.buffers():
            buffer.data = buffer.data.bfloat16() if buffer.is_floating_point() else buffer.data
    sharded(model, ("0", "1"), mp_policy=BF16)
    sharded(model, ("",), mp_policy=policy)
    with use_backend(backend):
        out = model(share(batches()[0], SHARES, rank).float())
    torch.autograd.backward(loss(out.float()))
    return {"out": out.detach()} | whole_state(model)


# --- what the processes do ----------------------------------------------------------------------


def work(rank: int) -> dict[str, Any]:
    # A model here would fit whole into the first bucket, which torch makes of a megabyte.
    cast(Any, dist)._DEFAULT_FIRST_BUCKET_BYTES = 1
    seen: dict[str, Any] = {"late": accelerated_late()}
    for name, parallel in PARALLEL.items():
        for backend in parallel.backends:
            seen[f"DDP {name} {backend}"] = run_parallel(parallel, backend, rank)
    for name, case in SHARDED.items():
        for backend in case.backends:
            seen[f"FSDP {name} {backend}"] = run_sharded(case, backend, rank)
    for name in MIXED:
        for backend in FSDP_BACKENDS:
            seen[f"mixed {name} {backend}"] = run_mixed(name, backend, rank)
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes(work, tmp_path_factory.mktemp("ranks"))


# --- what is asked of them ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend"), [(name, b) for name, case in PARALLEL.items() for b in case.backends]
)
def test_data_parallel_equals_one_process(
    name: str, backend: Backend, ranks: list[dict[str, Any]]
) -> None:
    case = PARALLEL[name]
    model = built(case.build, DEVICE, case.training)
    if case.before is partly_frozen:
        partly_frozen(model)
    xs = batches(DEVICE)
    expected = alone(model, xs) if case.joint else alone_by_shares(model, xs, broadcast=True)
    for seen, wanted in zip(ranks, expected, strict=True):
        assert_same(seen[f"DDP {name} {backend}"], wanted)


@pytest.mark.parametrize(
    ("name", "backend"), [(name, b) for name, case in SHARDED.items() for b in case.backends]
)
def test_shards_equal_one_process(name: str, backend: Backend, ranks: list[dict[str, Any]]) -> None:
    case = SHARDED[name]
    model = built(case.build, CPU, case.training)
    xs = batches(steps=1)
    expected = alone_by_shares(model, xs, broadcast=False) if case.training else alone(model, xs)
    for each, wanted in zip(ranks, expected, strict=True):
        seen = each[f"FSDP {name} {backend}"]
        assert_same(seen["state"], wanted)
        # The parameters of a child that is sharded by itself are gathered by a hook of its own,
        # before it is called.
        assert seen["plain"] == case.plain


# What is rounded to bf16 on the way through both units: the input, seven convolutions and their
# weights, six norms, two sums, one average; two selections, which the interpreter cuts off.
ROUNDINGS = 1 + 2 * 7 + 6 + 2 + 1 + 2 * 2
HALF_EPS = torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("backend", FSDP_BACKENDS)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_precision_gives_the_dtypes_of_the_modules(
    name: str, backend: Backend, ranks: list[dict[str, Any]]
) -> None:
    for rank, seen in enumerate(ranks):
        exact = built(units, CPU, True)(share(batches()[0], SHARES, rank)).detach()
        actual, modules = seen[f"mixed {name} {backend}"], seen[f"mixed {name} reference"]
        assert {n: t.dtype for n, t in actual.items()} == {n: t.dtype for n, t in modules.items()}
        assert actual["out"].dtype == MIXED[name][2]
        assert actual["grad 0.sk.fc2.weight"].dtype == torch.float32
        assert largest_error(actual["out"], exact) < ROUNDINGS * HALF_EPS


def test_a_sharded_model_is_left_by_accelerate_with_the_reason(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert len(seen["late"]) == 1
        assert "accelerate the model before" in seen["late"][0]
