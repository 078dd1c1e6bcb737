"""The operators as PyTorch sees them: schema, fake tensors, autograd, compile.

torch.library.opcheck compares what an operator claims with what it does, also under AOTAutograd
with sizes that are not constants.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from sknet_triton import Backend, functional, fused, ops, use_backend
from sknet_triton.reference import accumulation_dtype
from tests.helpers import BACKENDS, DEVICE, Case, Recorded, beside_branches, trained

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


def fuse_select(xs: list[Tensor], logits: Tensor) -> Tensor:
    pooled = functional.sk_fuse(xs)
    return functional.sk_select(xs, logits + pooled[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_fuse_select_equals_eager(layout: str) -> None:
    xs, logits = tensors(Case((2, 4, 5, 3), M=2, layout=layout), DEVICE, grad=True)
    with use_backend("triton"):
        compiled = torch.compile(fuse_select, fullgraph=True)
        out = compiled(xs, logits)
        grads = torch.autograd.grad(out.square().sum(), [*xs, logits])
        expected = fuse_select(xs, logits)
        exact = torch.autograd.grad(expected.square().sum(), [*xs, logits])
    assert out.stride() == expected.stride()
    torch.testing.assert_close((out, *grads), (expected, *exact))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtypes_alone(dtype: torch.dtype, backend: Backend) -> None:
    xs, logits = Case((2, 4, 5, 3), dtype=dtype).branches(), torch.randn(2, 2, 4, device=DEVICE)
    with use_backend(backend), torch.autocast(DEVICE.type, dtype):
        assert functional.sk_fuse(xs).dtype == dtype
        assert functional.sk_select(xs, logits).dtype == dtype


# The same operators on a machine without kernels, where they take PyTorch's formulas.
KERNEL_IDS = {True: "kernels", False: "no kernels"}
KERNELS = pytest.mark.parametrize("kernels", KERNEL_IDS, ids=KERNEL_IDS.get)


@pytest.fixture
def place(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where operators are checked: where kernels run, or on a CPU without them."""
    if kernels:
        return DEVICE
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return torch.device("cpu")


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def check(operator: Any, args: tuple[Any, ...], traced: bool) -> None:
    """`opcheck`, which takes ten times as long where it traces with sizes that are not constants.

    What it traces has no kernel in it: it is the same with kernels and without.
    """
    opcheck(operator, args, test_utils=(*CHECKS, "test_aot_dispatch_dynamic") if traced else CHECKS)


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize(
    ("case", "reduction", "activation"),
    [
        *((case, "mean", "softmax") for case in OPERATOR_CASES),
        *((Case((2, 3, 4, 5), 3), "sum", activation) for activation in ("sigmoid", "none")),
    ],
    ids=str,
)
def test_the_stages(
    case: Case, reduction: str, activation: str, kernels: bool, place: torch.device
) -> None:
    for grad in (False, True):
        xs, logits = tensors(case, place, grad)
        check(ops.sk_fuse, (xs, reduction), kernels)
        check(ops.sk_select, (xs, logits, activation), kernels)
    xs, logits = tensors(case, place, grad=False)
    check(ops.sk_select_bwd, (case.tensor(device=place), xs, logits, activation), kernels)


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("needed", ["branches", "logits", "one branch"])
def test_gradients_that_only_some_ask_for(needed: str, place: torch.device) -> None:
    xs, logits = tensors(Case((2, 3, 4, 5)), place, grad=False)
    for x in {"branches": xs, "logits": [logits], "one branch": xs[1:]}[needed]:
        x.requires_grad_()
    opcheck(ops.sk_select, (xs, logits, "softmax"))


EVAL: dict[str, Any] = {"batch_stats": False}
# Branches, what is other than usual beside them, and whether the operators are traced, too.
FUSE_SELECT_CASES: list[tuple[Case, dict[str, Any], bool]] = [
    (Case((2, 3, 4, 5)), {}, True),
    (Case((2, 3, 4, 5)), {**EVAL, "biases": False}, True),
    (Case((2, 3, 4, 5)), {"biases": False, "affine": False}, False),
    (Case((2, 3, 4, 5), 3, "channels_last", torch.bfloat16), {}, True),
    (Case((2, 3, 4, 5), 3, "channels_last", torch.float16), EVAL, False),
    (Case((2, 3, 4, 5), 1, "sliced"), {}, False),
    (Case((2, 3, 4, 5), 2, "cropped", torch.float64), {}, True),
    (Case((2, 3, 4, 5), 2, "transposed"), EVAL, False),
    (Case((3, 2, 7)), {}, False),
    (Case((2, 2, 2, 2, 3), layout="channels_last"), {}, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "case", "options", "traced"),
    [
        *((True, *row) for row in FUSE_SELECT_CASES),
        *((False, *row) for row in FUSE_SELECT_CASES[:5]),
    ],
    ids=str,
)
def test_every_step_of_fuse_select(
    case: Case,
    options: dict[str, Any],
    traced: bool,
    kernels: bool,
    place: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without kernels the operators run in programs that were made where there were some.
    monkeypatch.setattr(fused, "way_of", lambda x: "kernels")
    xs, _ = tensors(case, place, grad=True)
    arguments = beside_branches(
        case.M,
        case.shape[1],
        dtype=accumulation_dtype(case.dtype),
        draw=partial(torch.randn, dtype=torch.float64, device=place),
        **options,
    )
    trained(arguments)
    with Recorded() as recorded:
        out = functional.sk_fuse_select(xs, **arguments).out
        torch.autograd.backward(out, case.tensor(9, place))
    steps = {"sk_hidden", "sk_logits", "sk_out", "sk_hidden_bwd", "sk_channels_bwd", "sk_dx"}
    assert set(recorded.calls) == steps | (set() if "batch_stats" in options else {"sk_moments"})
    for operator, args in recorded.calls.values():
        check(operator, args, kernels and traced)
