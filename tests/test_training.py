"""A training loop under torch.compile: the parameters of eager PyTorch, and no new graphs."""

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sknet_triton import Backend, SKConv, SKNet, StageSpec, use_backend
from tests.helpers import needs_compiler
from tests.plain_sknet import largest_error, scramble

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo", "on_the_device")]

# float64: a few steps of the same formulas in another order. See test_layers.py.
EXACT = 1e-8

STEPS = 4


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)


class Tiny(nn.Module):
    """A classifier small enough for Triton's interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.sk, self.head = SKConv(3, 4, G=1, d=3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.sk(x).mean((2, 3)))
        return out


def batches(side: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [
        (torch.randn(4, 3, side, side, dtype=torch.float64), torch.randint(5, (4,)))
        for _ in range(STEPS)
    ]


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda step: step,
) -> list[Tensor]:
    """Returns the loss of every step."""

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(module(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    call = wrap(step)
    return [call(images, labels) for images, labels in data]


def assert_same_training(
    module: nn.Module, eager: nn.Module, losses: list[Tensor], expected: list[Tensor]
) -> None:
    for got, want in zip(losses, expected, strict=True):
        assert largest_error(got, want) < EXACT
    state = eager.state_dict()
    for name, value in module.state_dict().items():
        assert largest_error(value, state[name].double()) < EXACT, name


def test_a_whole_step_with_its_optimizer_compiles_once() -> None:
    eager = scramble(SKNet((StageSpec(32, 1, 2),), num_classes=5)).double()
    module = copy.deepcopy(eager)
    data, counter = batches(32), CompileCounterWithBackend("aot_eager")
    expected = train(eager, sgd(eager), data)
    graphs: list[int] = []

    def wrap(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled = torch.compile(step, backend=counter)

        def counted(*args: Tensor) -> Tensor:
            loss: Tensor = compiled(*args)
            graphs.append(counter.frame_count)
            return loss

        return counted

    losses = train(module, sgd(module), data, wrap)
    assert_same_training(module, eager, losses, expected)
    # The optimizer's state is made in the first step and met for the first time in the second.
    assert len(set(graphs[1:])) == 1, graphs


@needs_compiler
def test_inductor_trains_to_the_parameters_of_eager() -> None:
    eager = scramble(Tiny()).double()
    module = copy.deepcopy(eager)
    data = batches(8)
    expected = train(eager, sgd(eager), data)
    compiled = cast(nn.Module, torch.compile(module, fullgraph=True))
    assert_same_training(module, eager, train(compiled, sgd(module), data), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_autograd_gives_the_same_training(backend: Backend) -> None:
    eager = scramble(Tiny()).double()
    module = copy.deepcopy(eager)
    data = batches(4)
    with use_backend(backend):
        expected = train(eager, sgd(eager), data)
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(compiled_autograd=True):
            losses = train(
                module,
                sgd(module),
                data,
                lambda step: torch.compile(step, backend="aot_eager"),
            )
    assert_same_training(module, eager, losses, expected)
    # The backwards were captured, and one graph served most of them.
    captures = torch._dynamo.utils.counters["compiled_autograd"]["captures"]
    assert 1 <= captures < STEPS
