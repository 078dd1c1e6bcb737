"""Derivatives beyond the first, forward mode, vmap and torch.func: right, or refused by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from sknet_triton import Backend, backend, functional, fused, ops, use_backend
from sknet_triton.functional import BatchNormArgs
from tests.helpers import (
    BACKENDS,
    DEVICE,
    assert_close,
    beside_branches,
    images,
    one_by_one,
    small_conv,
)

pytestmark = pytest.mark.usefixtures("on_the_device")

SHAPE = (2, 3, 2, 2)

# torch leaves them untyped.
make_dual, unpack_dual = cast(Any, forward_ad.make_dual), cast(Any, forward_ad.unpack_dual)

Stage = Callable[..., Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def fuse_select(batch_stats: bool) -> Stage:
    """sk_fuse_select of two branches, their norms' weights and fc2's weight."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE)

    arguments = beside_branches(2, 3, d=4, batch_stats=batch_stats, draw=draw)

    def stage(x0: Tensor, x1: Tensor, gamma: Tensor, fc2: Tensor) -> Tensor:
        norms = [replace(n, weight=g) for n, g in zip(arguments["norms"], gamma, strict=True)]
        changed = {**arguments, "norms": norms, "fc2_weight": fc2}
        return functional.sk_fuse_select([x0, x1], **changed).out

    return stage


@dataclass(frozen=True)
class Subject:
    """A stage as a function of tensors, and the shapes of those after the two branches."""

    stage: Stage
    more: tuple[tuple[int, ...], ...] = ()

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(random(*shape) for shape in (SHAPE, SHAPE, *self.more))


def select(activation: Any) -> Subject:
    def stage(a: Tensor, b: Tensor, logits: Tensor) -> Tensor:
        return functional.sk_select([a, b], logits, activation=activation)

    return Subject(stage, ((2, 2, 3),))


SUBJECTS = {
    "sk_fuse": Subject(lambda a, b: functional.sk_fuse([a, b])),
    "sk_fuse sum": Subject(lambda a, b: functional.sk_fuse([a, b], reduction="sum")),
    "sk_select": select("softmax"),
    "sk_select sigmoid": select("sigmoid"),
    "sk_select weights": select(None),
    "sk_fuse_select eval": Subject(fuse_select(False), ((2, 3), (6, 4))),
    "sk_fuse_select train": Subject(fuse_select(True), ((2, 3), (6, 4))),
}
every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
both = pytest.mark.parametrize("backend", BACKENDS)


def tangents_of(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(x) for x in inputs)


def directional(stage: Stage, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The derivative of ``stage`` along ``tangents``, by reverse mode alone."""
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    out = stage(*leaves)
    # Twice backwards: the gradient is linear in dout, and its derivative by dout is the tangent.
    dout = torch.zeros_like(out, requires_grad=True)
    grads = torch.autograd.grad(out, leaves, dout, create_graph=True)
    along = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    return torch.autograd.grad(cast(Tensor, along), dout)[0]


# --- the second derivative ----------------------------------------------------------------------


@pytest.mark.slow
@both
@every_subject
def test_first_and_second_derivatives_agree_with_finite_differences(
    subject: Subject, backend: Backend
) -> None:
    inputs = tuple(x.requires_grad_() for x in subject.inputs())
    # The interpreter is slow: along one random direction instead of every unit vector.
    with use_backend(backend):
        assert gradcheck(subject.stage, inputs, fast_mode=True)
        assert gradgradcheck(subject.stage, inputs, fast_mode=True)


@both
@every_subject
def test_a_batch_of_gradients_is_one_gradient_after_the_other(
    subject: Subject, backend: Backend
) -> None:
    inputs = tuple(x.requires_grad_() for x in subject.inputs())
    with use_backend(backend):
        out = subject.stage(*inputs)
        douts = torch.randn(3, *out.shape, dtype=torch.float64)
        actual = torch.autograd.grad(out, inputs, douts, retain_graph=True, is_grads_batched=True)
        singly = [torch.autograd.grad(out, inputs, dout, retain_graph=True) for dout in douts]
    assert_close(actual, [torch.stack(grads) for grads in zip(*singly, strict=True)])


@both
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_gradient_penalty_through_skconv(backend: Backend, training: bool) -> None:
    sk = small_conv().train(training)
    found = []
    for module, chosen in ((sk, backend), (one_by_one(sk), "reference")):
        x = images(3).requires_grad_()
        with use_backend(chosen):
            (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
            penalty = (dx.norm() - 1).square()
            found.append([dx, *torch.autograd.grad(penalty, [x, *module.parameters()])])
    actual, expected = found
    assert_close(actual, expected)


def test_statistics_over_a_group_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "sum_over", lambda group, x: x)
    xs = [random(*SHAPE).requires_grad_()] * 2
    norm = BatchNormArgs(None, None, process_group=cast(Any, 0))
    out = functional.sk_fuse_select(xs, [norm] * 2, random(2, 3), norm, random(6, 2)).out
    with pytest.raises(RuntimeError, match=r"sk_fuse_select: statistics over a process group"):
        torch.autograd.grad(out.sum(), xs[0], create_graph=True)


# --- forward mode and torch.func ----------------------------------------------------------------


@every_subject
def test_forward_mode_is_reverse_mode(subject: Subject) -> None:
    inputs = subject.inputs()
    tangents = tangents_of(inputs)
    expected = directional(subject.stage, inputs, tangents)
    with forward_ad.dual_level():
        duals = [make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        along = unpack_dual(subject.stage(*duals)).tangent
    assert along is not None
    assert_close([along, jvp(subject.stage, inputs, tangents)[1]], [expected] * 2)


@every_subject
def test_torch_func_differentiates(subject: Subject) -> None:
    inputs = subject.inputs()
    every = tuple(range(len(inputs)))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(subject.stage(*leaves).square().sum(), leaves)
    assert_close(grad(lambda *xs: subject.stage(*xs).square().sum(), every)(*inputs), expected)
    assert_close(jacrev(subject.stage, every)(*inputs), jacfwd(subject.stage, every)(*inputs))
    # Symmetric: the second derivatives of a function of one tensor.
    h = hessian(lambda x: subject.stage(x, *inputs[1:]).square().sum())(inputs[0])
    flat = h.reshape(inputs[0].numel(), -1)
    assert flat.abs().max() > 0.01
    assert_close([flat], [flat.T])


@every_subject
def test_vmap_is_a_loop(subject: Subject) -> None:
    runs = [subject.inputs() for _ in range(3)]
    stacked = [torch.stack(each, 1) for each in zip(*runs, strict=True)]
    assert_close(vmap(subject.stage, in_dims=1)(*stacked), [subject.stage(*xs) for xs in runs])


def test_an_ensemble_of_skconv_by_vmap_and_its_gradients_by_sample() -> None:
    modules = [small_conv().eval() for _ in range(3)]
    for module in modules:
        nn.init.normal_(module.fc2.weight)
    x = images(2)
    parameters, buffers = stack_module_state(modules)

    def call(p: Any, b: Any, batch: Tensor) -> Tensor:
        return cast(Tensor, functional_call(modules[0], (p, b), (batch,)))

    out = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    assert_close(out, [module(x) for module in modules])
    own = dict(modules[1].named_parameters()), dict(modules[1].named_buffers())
    by_sample = vmap(
        grad(lambda p, image: call(p, own[1], image[None]).square().sum()), in_dims=(None, 0)
    )(own[0], x)
    total = torch.autograd.grad(modules[1](x).square().sum(), list(own[0].values()))
    assert_close([gradients.sum(0) for gradients in by_sample.values()], total)


@pytest.mark.parametrize("subject", [SUBJECTS[n] for n in ("sk_select", "sk_fuse_select train")])
def test_torch_func_compiles(subject: Subject) -> None:
    inputs = subject.inputs()

    def first(*xs: Tensor) -> Tensor:
        return cast(Tensor, grad(lambda *ys: subject.stage(*ys).square().sum())(*xs))

    torch._dynamo.reset()
    compiled = torch.compile(first, backend="aot_eager", fullgraph=True)
    assert_close([compiled(*inputs)], [first(*inputs)])


# --- what the kernels have no rule for ----------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Stage, Sequence[Tensor]], object]] = {
    "grad": lambda f, xs: grad(lambda *ys: f(*ys).sum())(*xs),
    "jvp": lambda f, xs: jvp(f, tuple(xs), tangents_of(xs)),
    "vmap": lambda f, xs: vmap(f)(*(x[None] for x in xs)),
    "dual numbers": lambda f, xs: dual(f, xs),
}


def dual(f: Stage, xs: Sequence[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return f(*(make_dual(x, torch.ones_like(x)) for x in xs))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["sk_fuse", "sk_select", "sk_fuse_select train"])
def test_the_triton_backend_refuses_by_name(name: str, transform: str) -> None:
    subject = SUBJECTS[name]
    message = "backend: 'triton' has no rule for torch.func's transforms"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        TRANSFORMS[transform](subject.stage, subject.inputs())


def test_auto_leaves_the_kernels_out_of_a_transform_alone() -> None:
    pytest.importorskip("triton", reason="the triton backend is not installed")

    choices, on_a_gpu = [], cast(Tensor, SimpleNamespace(is_cuda=True))

    def asks(x: Tensor) -> Tensor:
        choices.append(backend.takes_triton(on_a_gpu))
        return x * 2

    x = random(2, 2)
    with use_backend("auto"):
        asks(x)
        for transform in TRANSFORMS.values():
            transform(asks, [x])
        asks(x)
    assert choices == [True, False, False, False, False, True]


@pytest.mark.parametrize("operator", ["sk_fuse", "sk_select", "sk_select_bwd"])
def test_an_operator_called_by_itself_refuses_forward_mode(operator: str) -> None:
    xs, z = [random(*SHAPE) for _ in range(2)], random(2, 2, 3)
    arguments: dict[str, tuple[Any, ...]] = {
        "sk_fuse": (xs, "mean"),
        "sk_select": (xs, z, "softmax"),
        "sk_select_bwd": (xs[0], xs, z, "softmax"),
    }
    message = f"sknet_triton::{operator} has no forward-mode derivative"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        getattr(ops, operator)(*arguments[operator])


def test_a_gradient_taken_inside_forward_mode_is_refused_and_not_zero() -> None:
    leaf = random(*SHAPE).requires_grad_()
    with use_backend("triton"):
        out = functional.sk_select([leaf, leaf], random(2, 2, 3))
    with forward_ad.dual_level():
        dout = make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="sk_select_bwd has no forward-mode"):
            torch.autograd.grad(out, leaf, dout)
