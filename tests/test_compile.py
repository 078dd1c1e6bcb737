"""torch.compile on layers, networks and training loops: whole graphs, equal numbers, few of them.

How a layer takes part in what others compile is in test_module_contract.py and others.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from sknet_triton import Backend, SKConv, SKNet, SKUnit, StageSpec, use_backend
from tests.helpers import (
    BACKENDS,
    EXACT_NETWORK,
    Seen,
    assert_same,
    images,
    needs_compiler,
    outcome,
    small_conv,
    without_buffers,
)
from tests.plain_sknet import largest_error, scramble

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "on_the_device")

TINY = (StageSpec(32, 1, 2),)
SMALL = (StageSpec(32, 1, 1), StageSpec(64, 2, 2))


def network(stages: tuple[StageSpec, ...] = TINY) -> SKNet:
    return scramble(SKNet(stages, num_classes=5)).double()


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "SKConv-M2": (small_conv, (4, 4, 7, 6)),
    "SKConv-M3-stride2": (lambda: small_conv(stride=2, M=3), (4, 4, 9, 6)),
    "SKConv-sum": (lambda: small_conv(aggregate="sum"), (4, 4, 7, 6)),
    "SKConv-layer": (lambda: small_conv(fc_norm="layer"), (1, 4, 7, 6)),
    "SKNet": (lambda: network(SMALL), (4, 3, 32, 32)),
}


@pytest.mark.parametrize(
    "name", [n if n == "SKConv-M2" else pytest.param(n, marks=pytest.mark.slow) for n in MODULES]
)
def test_a_step_and_inference_are_one_graph_each_and_equal_eager(name: str) -> None:
    build, shape = MODULES[name]
    eager, x = build(), drawn(*shape)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, module, x), outcome(eager, eager, x), EXACT_NETWORK)
    module.eval()
    with torch.no_grad():
        assert largest_error(compiled(x), eager.eval()(x)) < EXACT_NETWORK


@pytest.mark.slow
@needs_compiler
def test_inductor_infers_like_eager_and_keeps_channels_last() -> None:
    module = small_conv().eval()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = images().contiguous(memory_format=torch.channels_last)
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
def test_other_modes_of_inductor_train_like_eager(mode: str) -> None:
    eager = small_conv()
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(4):  # recorded in the second call, replayed from the third
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it so
        x = images()
        assert_same(outcome(compiled, module, x), outcome(eager, eager, x), EXACT_NETWORK)


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
    module = network().train(training)
    eager = copy.deepcopy(module)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    # All are 0 or 3 modulo 4: torch 2.11 guards its max_pool2d against other sizes.
    for shape in ((4, 3, 32, 32), (6, 3, 64, 64), (3, 3, 64, 64), (5, 3, 96, 80), (2, 3, 47, 36)):
        x = drawn(*shape)
        actual, expected = compiled(x), eager(x)
        assert largest_error(actual.detach(), expected.detach()) < EXACT_NETWORK, shape
        if training:
            torch.autograd.backward(actual.sum())
        graphs.append(counter.frame_count)
    # Differences, because with dynamic=True the first compilation asks its backend twice: Dynamo
    # starts over once it has found the batch norms' eps to be constant.
    assert graphs[-1] - graphs[0] <= 1, graphs


def test_the_backend_is_chosen_at_compilation_and_a_change_recompiles() -> None:
    module, x = small_conv().eval(), images()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
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
    compiled = torch.compile(small_conv(), backend="eager")
    with pytest.raises(ValueError, match=r"batch of at least 2.*got 1"):
        compiled(images(1))


@pytest.mark.slow
def test_checkpointing_compiles_to_one_graph() -> None:
    eager, x = network(), drawn(4, 3, 32, 32)
    eager.set_grad_checkpointing()
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    actual, expected = outcome(compiled, module, x), outcome(eager, eager, x)
    # A compiled graph may update the running statistics once where eager recomputation does twice.
    assert_same(without_buffers(actual), without_buffers(expected), EXACT_NETWORK)


# --- training loops -----------------------------------------------------------------------------

# float64: a few steps of the same formulas in another order.
EXACT_LOOP = 1e-8
STEPS = 4


def classifier() -> nn.Module:
    """Returns one small enough for Triton's interpreter."""
    sk = SKConv(3, 4, G=1, d=3)
    pooled = nn.Sequential(sk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return scramble(pooled).double()


Step = Callable[..., Tensor]


def trained(module: nn.Module, side: int, wrap: Callable[[Step], Step] = lambda step: step) -> Seen:
    """Trains on images of this size; returns the loss of every step, and the state after all."""
    torch.manual_seed(1)
    data = [(drawn(4, 3, side, side), torch.randint(5, (4,))) for _ in range(STEPS)]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(module(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    call = wrap(step)
    losses = {f"loss {i}": call(*batch) for i, batch in enumerate(data)}
    return losses | dict(module.state_dict())


@pytest.mark.slow
def test_a_whole_step_with_its_optimizer_compiles_once() -> None:
    eager, counter = network(), CompileCounterWithBackend("aot_eager")
    module, graphs = copy.deepcopy(eager), list[int]()

    def wrap(step: Step) -> Step:
        compiled = torch.compile(step, backend=counter)

        def counted(*args: Tensor) -> Tensor:
            loss: Tensor = compiled(*args)
            graphs.append(counter.frame_count)
            return loss

        return counted

    assert_same(trained(module, 32, wrap), trained(eager, 32), EXACT_LOOP)
    # The optimizer's state is made in the first step and met for the first time in the second.
    assert len(set(graphs[1:])) == 1, graphs


@pytest.mark.slow
@needs_compiler
def test_inductor_trains_to_the_parameters_of_eager() -> None:
    eager = classifier()
    module = copy.deepcopy(eager)
    module.compile(fullgraph=True)
    assert_same(trained(module, 8), trained(eager, 8), EXACT_LOOP)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_autograd_gives_the_same_training(backend: Backend) -> None:
    eager = classifier()
    module = copy.deepcopy(eager)
    with use_backend(backend):
        expected = trained(eager, 4)
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(compiled_autograd=True):
            seen = trained(module, 4, lambda step: torch.compile(step, backend="aot_eager"))
    assert_same(seen, expected, EXACT_LOOP)
    # The backwards were captured, and one graph served most of them.
    captures = torch._dynamo.utils.counters["compiled_autograd"]["captures"]
    assert 1 <= captures < STEPS
