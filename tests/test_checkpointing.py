"""Training in less memory: recomputed activations.

Recomputing a batch norm moves its running statistics a second time, in PyTorch as here: the oracle
of the statistics is the modules called one by one under the same checkpointing.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from sknet_triton import SKNet, SKUnit, use_backend
from sknet_triton.backend import Backend
from tests.helpers import (
    BACKENDS,
    DEVICE,
    FLOAT64,
    Seen,
    assert_same,
    counted_launches,
    images,
    outcome,
    small_conv,
    small_network,
    state_of,
    without_buffers,
)
from tests.plain_sknet import scramble

Run = Callable[[Tensor], Any]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SKConv": small_conv,
    "SKConv layer": partial(small_conv, fc_norm="layer"),
    "SKUnit": lambda: scramble(SKUnit(4, 4, G=2, d=3, **FLOAT64), seed=3),
}
KINDS: dict[str, Callable[[nn.Module], Run]] = {
    "reentrant": lambda m: partial(checkpoint, m, use_reentrant=True),
    "not reentrant": lambda m: partial(checkpoint, m, use_reentrant=False),
    "wrapped": lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
}


def step(
    module: nn.Module, kind: str | None = None, backend: Backend = "reference", **options: Any
) -> Seen:
    """Returns the outcome of one step, with everything recomputed where a kind says so."""
    size = (16, 12) if isinstance(module, SKNet) else (5, 4)
    x = images(3, size).to(next(module.parameters()).dtype)
    with use_backend(backend):
        return outcome(KINDS[kind](module) if kind else module, module, x, **options)


def buffers(seen: Seen) -> Seen:
    return {name: t for name, t in seen.items() if name not in without_buffers(seen)}


# --- whole layers -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        *(("SKConv", kind) for kind in KINDS),
        ("SKConv layer", "not reentrant"),
        ("SKUnit", "not reentrant"),
    ],
)
def test_recomputation_changes_no_bit_of_output_and_gradients(
    layer: str, kind: str, backend: Backend
) -> None:
    build = LAYERS[layer]
    torch.manual_seed(3)
    kept = build()
    module, plain = copy.deepcopy(kept), copy.deepcopy(kept)
    with set_checkpoint_early_stop(False):
        expected, seen = step(kept, backend=backend), step(module, kind, backend)
        moved = step(plain, kind)
    assert_same(without_buffers(seen), without_buffers(expected), bound=0)
    assert_same(buffers(seen), buffers(moved))
    assert all(t == 2 for name, t in moved.items() if "tracked" in name)


def test_statistics_move_once_where_recomputation_stops_inside_of_sk_fuse_select() -> None:
    # Early stop ends recomputation at the last tensor that was saved. On Triton an SKConv at the
    # end of a region saves it before PyTorch moves the statistics, in float64, which is once, as
    # without checkpointing; modules called one by one have moved theirs twice by then.
    expected = step(small_conv(), backend="triton")
    assert_same(step(small_conv(), "not reentrant", "triton"), expected, bound=0)
    assert step(small_conv(), "not reentrant")["fc1.bn.num_batches_tracked"] == 2


def test_kernels_move_statistics_as_often_as_the_modules() -> None:
    moved, seen = (
        step(small_conv(dtype=torch.float32), "not reentrant", backend) for backend in BACKENDS
    )
    assert moved["fc1.bn.num_batches_tracked"] == 2
    for name, exact in buffers(moved).items():
        torch.testing.assert_close(seen[name], exact, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_evaluation_nothing_moves(backend: Backend) -> None:
    expected = step(small_conv().eval(), backend=backend)
    assert_same(step(small_conv().eval(), "not reentrant", backend), expected, bound=0)
    assert_same(buffers(expected), dict(small_conv().named_buffers()), bound=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_is_under_the_autocast_of_the_forward(kind: str, backend: Backend) -> None:
    autocast = torch.autocast(DEVICE.type, torch.bfloat16)
    expected, seen = (
        step(small_conv(dtype=torch.float32), each, backend, forward=autocast)
        for each in (None, kind)
    )
    assert expected["out"].dtype == torch.bfloat16
    assert_same(without_buffers(seen), without_buffers(expected), bound=0)


# --- parts of a layer ---------------------------------------------------------------------------

CHILDREN = ("branches.0", "branches.1.bn", "fc1", "fc1.bn", "fc2")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", CHILDREN)
def test_a_wrapped_child_is_called(path: str, backend: Backend) -> None:
    module, plain = small_conv(), small_conv()
    for each in (module, plain):
        child = each.get_submodule(path)
        apply_activation_checkpointing(each, check_fn=lambda m, child=child: m is child)
    seen = step(module, backend=backend)
    assert_same(without_buffers(renamed(seen)), without_buffers(step(small_conv())))
    assert_same(buffers(seen), buffers(step(plain)))


def renamed(seen: Seen) -> Seen:
    return {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in seen.items()}


STEPS = ("sk_fuse", "sk_select", "sk_moments", "sk_hidden", "sk_logits", "sk_out")
OURS = [getattr(torch.ops.sknet_triton, name).default for name in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_selective_checkpointing_keeps_what_the_kernels_computed(layer: str) -> None:
    kept = LAYERS[layer]()
    chosen, plain = copy.deepcopy(kept), copy.deepcopy(kept)
    contexts = partial(create_selective_checkpoint_contexts, OURS)
    select = partial(checkpoint, chosen, use_reentrant=False, context_fn=contexts)
    with counted_launches() as once:
        expected = step(kept, backend="triton")
    with counted_launches() as launched, use_backend("triton"):
        seen = outcome(select, chosen, images(3))
    assert launched == once
    with counted_launches() as launched:
        step(plain, "not reentrant", "triton")
    assert launched.total() > once.total()
    assert_same(without_buffers(seen), without_buffers(expected), bound=0)


# --- the network --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_network_recomputes_its_units_as_checkpoint_does(backend: Backend) -> None:
    kept, module, plain = (small_network(units=2) for _ in range(3))
    module.set_grad_checkpointing()
    for stage in plain.stages:
        apply_activation_checkpointing(stage, check_fn=lambda m: isinstance(m, SKUnit))
    expected, seen = step(kept, backend=backend), step(module, backend=backend)
    assert_same(without_buffers(seen), without_buffers(expected), bound=0)
    assert_same(seen, renamed(step(plain)))
    assert seen["stem.bn.num_batches_tracked"] == 1
    assert seen["stages.0.1.sk.fc1.bn.num_batches_tracked"] == 2


# --- two graphs at a time -----------------------------------------------------------------------


def test_two_forwards_may_wait_for_one_backward() -> None:
    # The second forward moves the running statistics; the first one's backward needs none of them.
    seen: list[Seen] = []
    for backend in BACKENDS:
        module = small_conv()
        with use_backend(backend):
            out = module(images(3)) * module(images(3, seed=2))
            torch.autograd.backward(out.sum())
        seen.append(state_of(module))
    expected, actual = seen
    assert_same(actual, expected)
