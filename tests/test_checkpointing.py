"""Training in less memory: recomputed activations.

Recomputing a batch norm moves its running statistics a second time, in PyTorch as here: the oracle
of the statistics is the modules called one by one under the same checkpointing.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

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

from sknet_triton import SKConv, SKNet, SKUnit, StageSpec, use_backend
from sknet_triton.backend import Backend
from tests.helpers import BACKENDS, DEVICE, Seen, assert_same, counted_launches, outcome
from tests.plain_sknet import scramble

Run = Callable[[Tensor], Any]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SKConv": lambda: SKConv(4, 4, G=2, d=3),
    "SKConv layer": lambda: SKConv(4, 4, G=2, d=3, fc_norm="layer"),
    "SKUnit": lambda: SKUnit(4, 4, G=2, d=3),
}
KINDS: dict[str, Callable[[nn.Module], Run]] = {
    "reentrant": lambda m: partial(checkpoint, m, use_reentrant=True),
    "not reentrant": lambda m: partial(checkpoint, m, use_reentrant=False),
    "wrapped": lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
}


def build(layer: str) -> nn.Module:
    torch.manual_seed(3)
    return scramble(LAYERS[layer]()).double().to(DEVICE)


def network() -> SKNet:
    torch.manual_seed(3)
    stage = StageSpec(4, 2, 1, d=3)
    net = SKNet((stage,), num_classes=3, in_chans=4, unit_options={"G": 2})
    return scramble(net).double().to(DEVICE)


def batch(images: int = 3, size: tuple[int, int] = (5, 4), seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 4, *size, dtype=torch.float64, generator=generator).to(DEVICE)


def values(seen: Seen) -> Seen:
    return {name: t for name, t in seen.items() if name in ("out", "dx") or "grad" in name}


def buffers(seen: Seen) -> Seen:
    return {name: t for name, t in seen.items() if name not in values(seen)}


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
    kept, module, plain = (build(layer) for _ in range(3))
    with set_checkpoint_early_stop(False):
        with use_backend(backend):
            expected = outcome(kept, kept, batch())
            seen = outcome(KINDS[kind](module), module, batch())
        with use_backend("reference"):
            moved = outcome(KINDS[kind](plain), plain, batch())
    assert_same(values(seen), values(expected), bound=0)
    assert_same(buffers(seen), buffers(moved))
    assert all(t == 2 for name, t in moved.items() if "tracked" in name)


def test_statistics_move_once_where_recomputation_stops_inside_of_sk_fuse_select() -> None:
    # Early stop ends recomputation at the last tensor that was saved. On Triton an SKConv at the
    # end of a region saves it before PyTorch moves the statistics, in float64, which is once, as
    # without checkpointing; modules called one by one have moved theirs twice by then.
    kept, module, plain = (build("SKConv") for _ in range(3))
    with use_backend("triton"):
        expected = outcome(kept, kept, batch())
        assert_same(outcome(KINDS["not reentrant"](module), module, batch()), expected, bound=0)
    with use_backend("reference"):
        moved = outcome(KINDS["not reentrant"](plain), plain, batch())
    assert moved["fc1.bn.num_batches_tracked"] == 2


def test_kernels_move_statistics_as_often_as_the_modules() -> None:
    module, plain = (build("SKConv").float() for _ in range(2))
    with use_backend("triton"):
        seen = outcome(KINDS["not reentrant"](module), module, batch().float())
    with use_backend("reference"):
        moved = outcome(KINDS["not reentrant"](plain), plain, batch().float())
    assert moved["fc1.bn.num_batches_tracked"] == 2
    for name, exact in buffers(moved).items():
        torch.testing.assert_close(seen[name], exact, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_evaluation_nothing_moves(backend: Backend) -> None:
    kept, module = build("SKConv").eval(), build("SKConv").eval()
    with use_backend(backend):
        expected = outcome(kept, kept, batch())
        assert_same(outcome(KINDS["not reentrant"](module), module, batch()), expected, bound=0)
    assert_same(buffers(expected), dict(build("SKConv").named_buffers()), bound=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_is_under_the_autocast_of_the_forward(kind: str, backend: Backend) -> None:
    kept, module = build("SKConv").float(), build("SKConv").float()
    x = batch().float()
    autocast = partial(torch.autocast, DEVICE.type, torch.bfloat16)
    with use_backend(backend):
        expected = outcome(kept, kept, x, forward=autocast())
        seen = outcome(KINDS[kind](module), module, x, forward=autocast())
    assert expected["out"].dtype == torch.bfloat16
    assert_same(values(seen), values(expected), bound=0)


# --- parts of a layer ---------------------------------------------------------------------------

CHILDREN = ("branches.0", "branches.1.bn", "fc1", "fc1.bn", "fc2")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", CHILDREN)
def test_a_wrapped_child_is_called(path: str, backend: Backend) -> None:
    kept, module, plain = (build("SKConv") for _ in range(3))
    for each in (module, plain):
        child = each.get_submodule(path)
        apply_activation_checkpointing(each, check_fn=lambda m, child=child: m is child)
    with use_backend("reference"):
        expected = outcome(kept, kept, batch())
        moved = outcome(plain, plain, batch())
    with use_backend(backend):
        seen = outcome(module, module, batch())
    assert_same(values(renamed(seen)), values(expected))
    assert_same(buffers(seen), buffers(moved))


def renamed(seen: Seen) -> Seen:
    return {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in seen.items()}


@pytest.fixture
def launched() -> Iterator[Counter[str]]:
    """Counts the launches of every kernel."""
    with counted_launches() as counts:
        yield counts


STEPS = ("sk_fuse", "sk_select", "sk_moments", "sk_hidden", "sk_logits", "sk_out")
OURS = [getattr(torch.ops.sknet_triton, name).default for name in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_selective_checkpointing_keeps_what_the_kernels_computed(
    layer: str, launched: Counter[str]
) -> None:
    kept, chosen, plain = (build(layer) for _ in range(3))
    contexts = partial(create_selective_checkpoint_contexts, OURS)
    select = partial(checkpoint, chosen, use_reentrant=False, context_fn=contexts)
    with use_backend("triton"):
        expected = outcome(kept, kept, batch())
        once = launched.copy()
        launched.clear()
        seen = outcome(select, chosen, batch())
        assert launched == once
        launched.clear()
        outcome(KINDS["not reentrant"](plain), plain, batch())
        assert launched.total() > once.total()
    assert_same(values(seen), values(expected), bound=0)


@pytest.mark.slow
def test_selective_checkpointing_of_convolutions_recomputes_the_kernels(
    launched: Counter[str],
) -> None:
    kept, chosen = build("SKConv"), build("SKConv")
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    select = partial(checkpoint, chosen, use_reentrant=False, context_fn=contexts)
    with use_backend("triton"):
        expected = outcome(kept, kept, batch())
        forward = launched["_sk_moments_kernel"]
        assert_same(values(outcome(select, chosen, batch())), values(expected), bound=0)
    assert forward == 1
    assert launched["_sk_moments_kernel"] == 3


# --- the network --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_network_recomputes_its_units_as_checkpoint_does(backend: Backend) -> None:
    kept, module = network(), network()
    module.set_grad_checkpointing()
    plain = network()
    for stage in plain.stages:
        apply_activation_checkpointing(stage, check_fn=lambda m: isinstance(m, SKUnit))
    x = batch(size=(16, 12))
    with use_backend("reference"):
        moved = outcome(plain, plain, x)
    with use_backend(backend):
        expected = outcome(kept, kept, x)
        seen = outcome(module, module, x)
    assert_same(values(seen), values(expected), bound=0)
    assert_same(seen, renamed(moved))
    assert seen["stem.bn.num_batches_tracked"] == 1
    assert seen["stages.0.1.sk.fc1.bn.num_batches_tracked"] == 2


# --- two graphs at a time -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forwards_may_wait_for_one_backward(backend: Backend) -> None:
    # The second forward moves the running statistics; the first one's backward needs none of them.
    module, plain = build("SKConv"), build("SKConv")
    for each, name in ((plain, "reference"), (module, backend)):
        with use_backend(cast(Backend, name)):
            out = each(batch()) * each(batch(seed=2))
            torch.autograd.backward(out.sum())
    expected = {name: cast(Tensor, p.grad) for name, p in plain.named_parameters()}
    assert_same({name: cast(Tensor, p.grad) for name, p in module.named_parameters()}, expected)
    assert_same(dict(module.named_buffers()), dict(plain.named_buffers()))
