"""The operators as PyTorch sees them: schema, fake tensors, autograd, compile."""

import pytest
import torch
from torch import Tensor

from sknet_triton import functional, reference, use_backend
from tests.helpers import Case

OPERATOR_CASES = [
    Case((2, 3, 4, 5), 1),
    Case((2, 3, 4, 5), 3),
    Case((2, 3, 4, 5), 2, "channels_last"),
    Case((2, 3, 4, 5), 3, "channels_last", torch.bfloat16),
    Case((2, 3, 4, 5), 1, "sliced", torch.float16),
    Case((2, 3, 4, 5), 2, "transposed"),
    Case((2, 3, 4, 5), 3, "cropped", torch.float64),
    Case((2, 3, 7)),
    Case((2, 3, 2, 2, 3), layout="channels_last"),
    Case((0, 3, 2, 2)),
]


def tensors(case: Case, device: torch.device, grad: bool) -> tuple[list[Tensor], Tensor]:
    # The layout is part of the case: a leaf keeps it only as a detached view.
    xs = [x.detach().requires_grad_(grad) for x in case.branches(device)]
    return xs, case.logits(device).requires_grad_(grad)


def section(xs: list[Tensor], logits: Tensor) -> Tensor:
    pooled = functional.sk_fuse(xs)
    return functional.sk_select(xs, logits + pooled[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_section_equals_eager(layout: str, device: torch.device) -> None:
    case = Case((2, 4, 5, 3), M=2, layout=layout)
    xs, logits = tensors(case, device, grad=True)
    with use_backend("triton"):
        compiled = torch.compile(section, fullgraph=True)
        out = compiled(xs, logits)
        grads = torch.autograd.grad(out.square().sum(), [*xs, logits])
        expected = section(xs, logits)
        exact = torch.autograd.grad(expected.square().sum(), [*xs, logits])
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    for grad, reference_grad in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad, reference_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtypes_alone(dtype: torch.dtype, device: torch.device) -> None:
    case = Case((2, 4, 5, 3), M=2, dtype=dtype)
    xs = case.branches(device)
    logits = torch.randn(2, 2, 4, device=device)
    for backend in ("triton", "reference"):
        with use_backend(backend), torch.autocast(device.type, dtype):
            assert functional.sk_fuse(xs).dtype == dtype
            assert functional.sk_select(xs, logits).dtype == dtype


def test_reference_backward_formulas_are_what_autograd_finds() -> None:
    case = Case((2, 3, 4, 2), M=3, dtype=torch.float64)
    xs, logits = tensors(case, torch.device("cpu"), grad=True)
    dout = case.tensor(torch.device("cpu"), seed=9)
    out = reference.sk_select(xs, logits)
    expected = torch.autograd.grad(out, [*xs, logits], dout)
    dxs, dlogits = reference.sk_select_bwd(dout, xs, logits)
    for grad, exact in zip([*dxs, dlogits], expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-12)
