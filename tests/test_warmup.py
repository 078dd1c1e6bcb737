"""warmup: it runs what a capture would, and leaves no trace."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sknet_triton import SKConv, SKNet, StageSpec, functional, warmup
from tests.plain_sknet import scramble

TINY = (StageSpec(32, 1, 2),)


class Noisy(nn.Module):
    """Does to itself whatever a module may do in a call."""

    seen: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.sk = SKConv(8, 8, G=4)
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("seen", None)
        self.register_buffer("shared", torch.ones(1).expand(3))
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        self.replaced = torch.rand(2)
        self.seen = torch.ones(3)
        with torch.no_grad():
            self.sk.fc2.weight.mul_(2)
            self.sk.branches[0].get_parameter("bn.bias").data.add_(1)
        if fail:
            raise KeyError("inside")
        return torch.nn.functional.dropout(self.sk(x), 0.5)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Returns what must be the same afterwards: identities, bits, modes, random state."""
    seen: dict[str, Any] = {"rng": torch.get_rng_state().tolist()}
    for name, inner in module.named_modules():
        seen[f"mode {name}"] = inner.training
    tensors: dict[str, Tensor | None] = dict(module.named_parameters())
    for name, inner in module.named_modules():
        tensors.update({f"{name}.{key}": b for key, b in inner._buffers.items()})
    for name, tensor in tensors.items():
        seen[name] = None if tensor is None else (id(tensor), tensor.tolist())
        gradient = None if tensor is None else tensor.grad
        seen[f"grad {name}"] = None if gradient is None else (id(gradient), gradient.tolist())
    return seen


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 8, 5, 4)))


@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_nothing_of_the_module_changes(training: bool | None, mode: str) -> None:
    module = Noisy().train(mode != "eval")
    if mode == "mixed":
        module.sk.branches[1].eval()
    module.sk.fc2.weight.grad = torch.randn_like(module.sk.fc2.weight)
    x = images()
    before = snapshot(module)
    warmup(module, x, training=training)
    assert snapshot(module) == before
    # It did run, as asked.
    expected = (module.training, True) if training is None else (training, training)
    assert module.calls == [expected] * 3


def test_an_error_inside_restores_as_well_and_is_not_swallowed() -> None:
    module, x = Noisy(), images()
    before = snapshot(module)
    with pytest.raises(KeyError, match="inside"):
        warmup(module, x, True, training=False)
    assert snapshot(module) == before


def test_the_gradients_of_the_inputs_are_kept() -> None:
    fresh, used = images().requires_grad_(), images().requires_grad_()
    used.grad = torch.ones_like(used)
    warmup(lambda x, y: x * y, fresh, used)
    assert fresh.grad is None
    assert used.grad.tolist() == torch.ones_like(used).tolist()


def test_a_graph_that_waits_for_its_backward_still_has_it() -> None:
    module = scramble(SKConv(8, 8, G=4)).eval()
    loss = module(images()).sum()
    warmup(module, images(), training=True)
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("training", [None, True])
def test_the_backward_runs_with_a_gradient_in_the_layout_of_the_result(
    training: bool | None,
) -> None:
    module = SKConv(8, 8, G=4)
    strides: list[tuple[int, ...]] = []

    def watched(x: Tensor) -> Tensor:
        out: Tensor = module(x)
        out.register_hook(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            lambda gradient: strides.append(gradient.stride())
        )
        return out

    x = images().to(memory_format=torch.channels_last)
    warmup(watched, x, training=training, modules=[module], iterations=1)
    warmup(watched, x, training=training, modules=[module], iterations=1, loss=torch.sum)
    assert strides == [x.stride(), (0, 0, 0, 0)]


@pytest.mark.parametrize("enabled", [torch.no_grad, torch.inference_mode])
def test_training_asks_for_gradients_whatever_surrounds_it(enabled: Callable[[], Any]) -> None:
    module, x = Noisy(), images()
    with enabled():
        warmup(module, x, training=True, iterations=1)
        assert not torch.is_grad_enabled()
    assert module.calls == [(True, True)]


def test_without_a_gradient_nothing_but_the_forward_runs() -> None:
    module = Noisy()
    with torch.no_grad():
        warmup(module, images(), iterations=1)
    assert module.calls == [(True, False)]


def test_a_method_knows_its_module_and_a_callable_is_told() -> None:
    model = SKNet(TINY, num_classes=5)
    x = images(2, 3, 32, 32)
    before = snapshot(model)
    warmup(model.forward_features, x, iterations=1)
    assert snapshot(model) == before
    warmup(lambda x: model(x).square(), x, modules=[model], iterations=1)
    assert snapshot(model) == before


def test_a_training_step_that_runs_its_own_backward() -> None:
    model = scramble(SKNet(TINY, num_classes=5))
    target = torch.tensor([1, 4])

    def step(x: Tensor) -> Tensor:
        loss = torch.nn.functional.cross_entropy(model(x), target)
        torch.autograd.backward(loss)
        return loss.detach()

    x = images(2, 3, 32, 32)
    before = snapshot(model)
    warmup(step, x, modules=[model])
    assert snapshot(model) == before


def test_functions_and_nested_arguments() -> None:
    branches = [images().requires_grad_() for _ in range(2)]
    calls = []

    def counted(xs: list[Tensor], logits: Tensor) -> Tensor:
        calls.append(len(xs))
        return functional.sk_select(xs, logits)

    warmup(counted, branches, torch.randn(4, 2, 8), iterations=2)
    assert calls == [2, 2]
    assert all(x.grad is None for x in branches)


def test_a_compiled_module_meets_no_new_graph_afterwards() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    module = SKConv(8, 8, G=4)
    compiled = torch.compile(module, backend=counter)
    x = images()
    before = snapshot(module)
    warmup(compiled, x, training=True)
    assert snapshot(module) == before
    assert counter.frame_count == 1
    compiled(x)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def run(module: Any = None, *args: Any, **options: Any) -> None:
    warmup(SKConv(8, 8, G=4) if module is None else module, *(args or (images(),)), **options)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "module: expected a module or a callable, got int", functools.partial(run, 3)),
        (
            TypeError,
            "training: expected True, False or None, got 1",
            functools.partial(run, training=1),
        ),
        (TypeError, "loss: expected a callable or None, got str", functools.partial(run, loss="")),
        (
            TypeError,
            "modules[1]: expected a module, got Tensor",
            functools.partial(run, modules=[nn.ReLU(), torch.ones(1)]),
        ),
        (
            ValueError,
            "iterations: expected at least 1, got 0",
            functools.partial(run, iterations=0),
        ),
        (
            ValueError,
            "loss: only for a backward pass, got training=False, which runs none",
            functools.partial(run, training=False, loss=torch.sum),
        ),
        (
            ValueError,
            "loss: expected a scalar tensor, got (4, 8, 5, 4)",
            functools.partial(run, loss=torch.relu),
        ),
        (ValueError, "loss: expected a scalar tensor, got str", functools.partial(run, loss=str)),
        (
            ValueError,
            "module: expected a result that requires a gradient, got none; where the callable runs "
            "its backward itself, leave out training and loss",
            functools.partial(run, torch.relu, training=True),
        ),
    ],
)
def test_wrong_arguments_are_named(
    error: type[Exception], message: str, call: Callable[[], None]
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
