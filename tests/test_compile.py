"""torch.compile on the layers and networks: whole graphs, equal numbers, few recompilations."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from sknet_triton import SKConv, SKNet, SKUnit, StageSpec, sknet26, use_backend
from tests.helpers import EXACT_NETWORK, assert_same, needs_compiler, outcome
from tests.plain_sknet import largest_error, scramble

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "on_the_device")

# float64 throughout, so that another order of operations is all that may differ: see
# test_layers.py and, for networks, test_models.py.

SMALL = (StageSpec(32, 1, 1), StageSpec(64, 2, 2))
TINY = (StageSpec(32, 1, 2),)


def small_net() -> nn.Module:
    return scramble(SKNet(SMALL, num_classes=5)).double()


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "SKConv-M2": (lambda: scramble(SKConv(8, 8, G=4)).double(), (4, 8, 7, 6)),
    "SKConv-M3-stride2": (lambda: scramble(SKConv(8, 8, 2, 3, G=4)).double(), (4, 8, 9, 6)),
    "SKConv-sum": (lambda: scramble(SKConv(8, 8, G=4, aggregate="sum")).double(), (4, 8, 7, 6)),
    "SKConv-layer": (lambda: scramble(SKConv(8, 8, G=4, fc_norm="layer")).double(), (1, 8, 7, 6)),
    "SKNet": (small_net, (4, 3, 32, 32)),
}


@pytest.mark.parametrize(
    "name", [n if n == "SKConv-M2" else pytest.param(n, marks=pytest.mark.slow) for n in MODULES]
)
def test_a_training_step_is_one_graph_and_equals_eager(name: str) -> None:
    build, shape = MODULES[name]
    eager = build()
    module = copy.deepcopy(eager)
    x = torch.randn(shape, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, module, x), outcome(eager, eager, x), EXACT_NETWORK)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MODULES if n != "SKNet"])
def test_inference_is_one_graph_and_equals_eager(name: str) -> None:
    build, shape = MODULES[name]
    module = build().eval()
    x = torch.randn(shape, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert largest_error(compiled(x), module(x)) < EXACT_NETWORK


# How Inductor trains is in test_training.py.
@pytest.mark.slow
@needs_compiler
def test_inductor_infers_like_eager_and_keeps_channels_last() -> None:
    module = scramble(SKConv(8, 8, G=4)).double().eval()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 8, 7, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = torch.compile(module, fullgraph=True)(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert largest_error(out, module(x)) < EXACT_NETWORK


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("layout", "training"),
    [(torch.contiguous_format, False), (torch.channels_last, True)],
    ids=["nchw-eval", "channels_last-train"],
)
def test_inductor_copies_nothing_between_convolutions_and_operators(
    layout: torch.memory_format, training: bool
) -> None:
    # A unit: what reduce gives is the one tensor of the branches' size that Inductor writes itself.
    unit = SKUnit(24, 16, G=4).train(training)
    unit.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 24, 7, 6).contiguous(memory_format=layout)

    def run() -> None:
        with torch.set_grad_enabled(training):
            out = torch.compile(unit, fullgraph=True)(x)
            if training:
                torch.autograd.backward(out.sum())

    with use_backend("triton"), torch._inductor.config.patch(force_disable_caches=True):
        _, (code, *backward) = run_and_get_code(run)
    assert "torch.ops.sknet_triton.sk_out" in code
    written = "empty_strided_cpu((2, 16, 7, 6)"
    assert code.count(written) <= 1
    assert len(backward) == training
    assert not any(written in each for each in backward)


# On a GPU both record graphs and replay them; on a CPU they compile as the default does.
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_other_modes_of_inductor_train_like_eager(mode: str, device: torch.device) -> None:
    eager = scramble(SKConv(8, 8, G=4)).double().to(device)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(4):  # recorded in the second call, replayed from the third
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it so
        x = torch.randn(4, 8, 7, 6, dtype=torch.float64, device=device)
        assert_same(outcome(compiled, module, x), outcome(eager, eager, x), EXACT_NETWORK)


@pytest.mark.slow
def test_sknet26_is_one_graph_and_equals_eager() -> None:
    module = scramble(sknet26(num_classes=10)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert largest_error(compiled(x), module(x)) < EXACT_NETWORK


# Only the training graphs pass through AOTAutograd, whose guards on sizes count too; it takes long.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamic", "training", "backend"),
    [(True, False, "eager"), (None, True, "aot_eager")],
    ids=["dynamic-eval", "automatic-train"],
)
def test_other_batches_and_resolutions_recompile_at_most_once(
    dynamic: bool | None, training: bool, backend: str
) -> None:
    module = scramble(SKNet(TINY, num_classes=5)).double().train(training)
    eager = copy.deepcopy(module)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    # All are 0 or 3 modulo 4: torch 2.11 guards its max_pool2d against other sizes.
    for shape in ((4, 3, 32, 32), (6, 3, 64, 64), (3, 3, 64, 64), (5, 3, 96, 80), (2, 3, 47, 36)):
        x = torch.randn(shape, dtype=torch.float64)
        actual, expected = compiled(x), eager(x)
        assert largest_error(actual.detach(), expected.detach()) < EXACT_NETWORK, shape
        if training:
            torch.autograd.backward(actual.sum())
        graphs.append(counter.frame_count)
    # Differences, because with dynamic=True the first compilation asks its backend twice: Dynamo
    # starts over once it has found the batch norms' eps to be constant.
    assert graphs[-1] - graphs[0] <= 1, graphs


def test_the_backend_is_chosen_at_compilation_and_a_change_recompiles() -> None:
    module = scramble(SKConv(8, 8, G=4)).double().eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(4, 8, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        compiled(x)
        compiled(x)
        assert counter.frame_count == 1
        with use_backend("reference"):
            assert largest_error(compiled(x), expected) < EXACT_NETWORK
        assert counter.frame_count == 2
        compiled(x)
        assert counter.frame_count == 2


@pytest.mark.slow
def test_the_error_for_batch_1_in_training_reaches_the_caller() -> None:
    module = SKConv(8, 8, G=4)
    compiled = torch.compile(module, backend="eager")
    with pytest.raises(ValueError, match=r"batch of at least 2.*got 1"):
        compiled(torch.randn(1, 8, 7, 6))


@pytest.mark.slow
def test_autocast_compiles_to_one_graph() -> None:
    module = scramble(SKConv(8, 8, G=4)).eval()
    x = torch.randn(4, 8, 7, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(x), module(x)
    assert actual.dtype == torch.bfloat16
    # A graph may keep a value in float32 that eager rounds: two half-eps.
    assert largest_error(actual, expected.double()) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.slow
def test_checkpointing_compiles_to_one_graph() -> None:
    eager = scramble(SKNet(TINY, num_classes=5)).double()
    eager.set_grad_checkpointing()
    module = copy.deepcopy(eager)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    actual, expected = outcome(compiled, module, x), outcome(eager, eager, x)
    # A compiled graph may update the running statistics once where eager recomputation does twice.
    for seen in (actual, expected):
        for name in [name for name in seen if "running" in name or "tracked" in name]:
            del seen[name]
    assert_same(actual, expected, EXACT_NETWORK)
