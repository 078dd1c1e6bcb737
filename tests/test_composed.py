"""`reference.composed`: `sk_fuse_select` out of PyTorch's operators, against modules in a row."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

from sknet_kernels.norms import Norms
from sknet_triton.reference import composed

EXACT = 1e-11  # float64 with a few hundred additions


@dataclass(frozen=True)
class Variant:
    """One way to build them."""

    M: int = 2
    space: tuple[int, ...] = (3, 4)
    affine: bool = True
    bias: bool = False
    batch_stats: bool = True
    fc1_batch_stats: bool = True


VARIANTS = [
    *(Variant(M, batch_stats=b, fc1_batch_stats=b) for M in (1, 2, 5) for b in (True, False)),
    Variant(space=(5,), affine=False),
    Variant(space=(2, 3, 2), bias=True),
    Variant(batch_stats=False),
    Variant(fc1_batch_stats=False, affine=False, bias=True),
]


class Result(NamedTuple):
    """What `composed` returns."""

    out: Tensor
    kept: Tensor | None
    fc1_kept: Tensor | None


class Modules(nn.Module):
    """`sk_fuse_select` in plain modules, and the same parameters for `composed`."""

    def __init__(self, v: Variant, B: int = 3, C: int = 4, d: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(v.space) - 1]
        self.norms = nn.ModuleList(
            norm(C, momentum=1.0, affine=v.affine).train(v.batch_stats) for _ in range(v.M)
        )
        self.fc1 = nn.Linear(C, d, bias=v.bias)
        self.fc1_norm = nn.BatchNorm1d(d, eps=1e-3, momentum=1.0).train(v.fc1_batch_stats)
        self.fc2 = nn.Linear(d, v.M * C, bias=v.bias)
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if not name.endswith("num_batches_tracked"):
                    tensor.copy_(
                        torch.rand_like(tensor) + 0.5 if "var" in name else tensor.normal_()
                    )
        self.xs = [torch.randn(B, C, *v.space) for _ in range(v.M)]

    def forward(self, *xs: Tensor) -> Tensor:
        maps = torch.stack([torch.relu(n(x)) for n, x in zip(self.norms, xs, strict=True)], 1)
        pooled = maps.sum(1).flatten(2).mean(2)
        logits = self.fc2(torch.relu(self.fc1_norm(self.fc1(pooled))))
        attn = torch.softmax(logits.view(len(pooled), len(xs), -1), 1)
        return (maps * attn.view(*attn.shape, *(1,) * (maps.dim() - 3))).sum(1)

    def composed(self, *xs: Tensor) -> Result:
        norms = arguments(*self.norms)
        fc1, fc2 = self.fc1, self.fc2
        return Result(
            *composed(
                xs, norms, fc1.weight, fc1.bias, arguments(self.fc1_norm), fc2.weight, fc2.bias
            )
        )


def arguments(*norms: Any) -> Norms:
    means, variances = (
        tuple(None if n.training else getattr(n, name) for n in norms)
        for name in ("running_mean", "running_var")
    )
    weights, biases = tuple(n.weight for n in norms), tuple(n.bias for n in norms)
    return Norms(means, variances, weights, biases, norms[0].eps)


def leaves(modules: Modules) -> list[Tensor]:
    return [x.requires_grad_() for x in modules.xs] + list(modules.parameters())


@pytest.mark.parametrize("v", VARIANTS, ids=str)
def test_it_equals_the_modules_with_every_gradient(v: Variant) -> None:
    modules = Modules(v).double()
    modules.xs = [x.double() for x in modules.xs]
    tensors = leaves(modules)
    running = [buffer.clone() for buffer in modules.buffers()]
    got = modules.composed(*modules.xs)
    assert all(torch.equal(*pair) for pair in zip(running, modules.buffers(), strict=True))
    expected = modules(*modules.xs)
    dout = torch.randn_like(expected)
    torch.testing.assert_close(got.out, expected, rtol=EXACT, atol=EXACT)
    for actual, exact in zip(
        torch.autograd.grad(got.out, tensors, dout),
        torch.autograd.grad(expected, tensors, dout),
        strict=True,
    ):
        torch.testing.assert_close(actual, exact, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("v", VARIANTS, ids=str)
def test_its_statistics_are_batch_norms_to_the_bit(v: Variant) -> None:
    modules = Modules(v)
    got = modules.composed(*modules.xs)
    modules(*modules.xs)
    assert (got.kept is None) == (not v.batch_stats)
    assert (got.fc1_kept is None) == (not v.fc1_batch_stats)
    if got.kept is not None:
        assert not got.kept.requires_grad
        for norm, mean, var in zip(modules.norms, *got.kept, strict=True):
            assert torch.equal(mean, cast(Tensor, norm.running_mean))
            assert torch.equal(var, cast(Tensor, norm.running_var))
    if got.fc1_kept is not None:
        # Its pooled mean is rounded in another order than the modules' is.
        torch.testing.assert_close(got.fc1_kept[0], modules.fc1_norm.running_mean)
        torch.testing.assert_close(got.fc1_kept[1], modules.fc1_norm.running_var)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_stats", [True, False])
def test_the_mlp_of_half_precision_is_float32(batch_stats: bool, parameters: torch.dtype) -> None:
    modules = Modules(Variant(batch_stats=batch_stats, fc1_batch_stats=batch_stats)).to(parameters)
    modules.xs = [x.bfloat16().requires_grad_() for x in modules.xs]
    got = modules.composed(*modules.xs)
    assert got.out.dtype == torch.bfloat16
    if batch_stats:
        assert all(t is not None and t.dtype == torch.float32 for t in got[1:])
    exact = copy.deepcopy(modules).double()(*(x.double() for x in modules.xs))
    torch.testing.assert_close(got.out.double(), exact, rtol=2e-2, atol=2e-2)
    torch.autograd.backward(got.out.sum())
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in modules.xs)


def test_autocast_changes_nothing() -> None:
    modules = Modules(Variant())
    expected = modules.composed(*modules.xs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = modules.composed(*modules.xs)
    assert torch.equal(got.out, expected.out)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_keeps_the_layout(layout: torch.memory_format) -> None:
    modules = Modules(Variant())
    xs = [x.contiguous(memory_format=layout) for x in modules.xs]
    assert modules.composed(*xs).out.is_contiguous(memory_format=layout)


def test_an_empty_batch_gives_an_empty_map_and_gradients_of_zero() -> None:
    modules = Modules(Variant(batch_stats=False, fc1_batch_stats=False), B=0)
    tensors = leaves(modules)
    out = modules.composed(*modules.xs).out
    assert out.shape == modules.xs[0].shape
    for gradient in torch.autograd.grad(out.sum(), tensors):
        assert not gradient.any()
