"""The functional stages: argument checks and stacked branches."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sknet_triton import functional, use_backend
from tests.helpers import message_of

pytestmark = pytest.mark.usefixtures("on_the_device")


GOOD = torch.ones(2, 4, 3, 3)
STAGES: dict[str, Callable[..., Tensor]] = {
    "sk_fuse": functional.sk_fuse,
    "sk_select": functools.partial(functional.sk_select, logits=torch.zeros(2, 2, 4)),
}


def maps(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


# Branches, as keyword arguments where branch_dim stands beside them, and what is said of them.
BAD_VALUES: tuple[tuple[Any, str], ...] = (
    ([], "branches: expected at least one tensor, got none"),
    (
        [GOOD, maps(2, 4, 3, 2)],
        "branches[1]: expected the shape of branches[0], (2, 4, 3, 3), got (2, 4, 3, 2)",
    ),
    (
        (GOOD, GOOD, maps(2, 1, 3, 3)),
        "branches[2]: expected the shape of branches[0], (2, 4, 3, 3), got (2, 1, 3, 3)",
    ),
    (
        [GOOD, GOOD.bfloat16()],
        "branches[1]: expected the dtype of branches[0], torch.float32, got torch.bfloat16",
    ),
    ([GOOD, GOOD.to("meta")], "branches[1]: expected the device of branches[0], cpu, got meta"),
    *(
        (
            [maps(*shape)] * 2,
            f"branches: expected [B, C, *spatial] with 1, 2 or 3 spatial axes, got shape {shape}",
        )
        for shape in ((2, 4), (2, 4, 1, 1, 1, 1))
    ),
    (
        [maps(2, 4, 0, 3)] * 2,
        "branches: the average needs at least one position, got shape (2, 4, 0, 3)",
    ),
    *(
        (
            {"branches": maps(2, 2, 4, 3, 3), "branch_dim": dim},
            f"branch_dim: expected an axis of a tensor with 5 axes, got {dim}",
        )
        for dim in (5, -6)
    ),
    (
        {"branches": maps(2, 0, 4, 3, 3), "branch_dim": 1},
        "branches: expected at least one tensor, got none",
    ),
)
BAD_TYPES: tuple[tuple[Any, str], ...] = (
    ([GOOD.long()] * 2, "branches[0]: expected a floating dtype, got torch.int64"),
    ([GOOD.to(torch.complex64)] * 2, "branches[0]: expected a floating dtype, got torch.complex64"),
    ([GOOD, GOOD.numpy()], "branches[1]: expected a tensor, got ndarray"),
    ((x for x in (GOOD, GOOD)), "branches: expected a list or tuple of tensors, got generator"),
    (
        maps(2, 2, 4, 3, 3),
        "branches: expected a sequence of tensors, or one tensor together with branch_dim, "
        "got one tensor of shape (2, 2, 4, 3, 3) and branch_dim=None",
    ),
    (
        {"branches": [GOOD, GOOD], "branch_dim": 1},
        "branch_dim: only for one stacked tensor, got 1 with a sequence of branches",
    ),
)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("error", "branches", "message"),
    [*((ValueError, *row) for row in BAD_VALUES), *((TypeError, *row) for row in BAD_TYPES)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_branches_are_named_with_their_rule_and_value(
    error: type[Exception], branches: Any, message: str, stage: str
) -> None:
    arguments = branches if isinstance(branches, dict) else {"branches": branches}
    assert message_of(error, lambda: STAGES[stage](**arguments)) == message


# What is other than in a right call of a stage, and what is said of it.
BAD_OPTIONS: tuple[tuple[str, dict[str, Any], str], ...] = (
    *(
        (
            "sk_select",
            {"logits": torch.zeros(shape)},  # the third and the fourth would broadcast
            f"logits: expected shape [B, M, C] = (2, 3, 4), got {shape}",
        )
        for shape in ((2, 4, 3), (2, 2, 4), (2, 3, 1), (1, 3, 4), (2, 12))
    ),
    (
        "sk_select",
        {"logits": torch.zeros(2, 3, 4, device="meta")},
        "logits: expected the device of the branches, cpu, got meta",
    ),
    (
        "sk_select",
        {"logits": torch.zeros(2, 3, 4, dtype=torch.int32)},
        "logits: expected a floating dtype, got torch.int32",
    ),
    ("sk_select", {"logits": [0.0]}, "logits: expected a tensor, got list"),
    (
        "sk_select",
        {"logits": torch.zeros(2, 3, 4), "activation": "none"},
        "activation: expected 'softmax', 'sigmoid' or None, got 'none'",
    ),
    ("sk_fuse", {"reduction": "none"}, "reduction: expected 'mean' or 'sum', got 'none'"),
)


@pytest.mark.parametrize(
    ("stage", "options", "message"), BAD_OPTIONS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_options_are_named_with_their_rule_and_value(
    stage: str, options: dict[str, Any], message: str
) -> None:
    error = TypeError if "dtype" in message or "a tensor" in message else ValueError
    assert message_of(error, lambda: STAGES[stage]([GOOD] * 3, **options)) == message


def test_more_branches_than_the_kernels_take_are_refused_on_the_triton_path_only() -> None:
    branches = [torch.ones(1, 2, 3, 3)] * 9
    with use_backend("triton"):
        message = message_of(ValueError, lambda: functional.sk_fuse(branches))
    assert message == (
        "branches: the triton backend takes at most 8, got 9; "
        "use_backend('reference') takes any number"
    )
    with use_backend("reference"):
        assert torch.equal(functional.sk_fuse(branches), torch.full((1, 2), 9.0))


@pytest.mark.parametrize("spatial", [(5,), (3, 2), (2, 3, 2)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, "last"], ids=lambda a: f"branch_dim={a}")
def test_a_stacked_tensor_equals_the_list(axis: int | str, spatial: tuple[int, ...]) -> None:
    branches = [torch.randn(2, 4, *spatial, dtype=torch.float64) for _ in range(3)]
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    dim = 2 + len(spatial) if axis == "last" else int(axis)
    stacked = torch.stack(branches, dim=dim)
    # Other strides, another order of summation: a few eps of sums of at most 36 terms.
    difference = functional.sk_fuse(stacked, branch_dim=dim) - functional.sk_fuse(branches)
    assert difference.abs().max() < 1e-14
    assert torch.equal(
        functional.sk_select(stacked, logits, branch_dim=dim),
        functional.sk_select(branches, logits),
    )


def test_a_stacked_tensor_gets_its_gradient() -> None:
    stacked = torch.randn(2, 3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(functional.sk_fuse(stacked, branch_dim=1).sum())
    assert stacked.grad is not None
    assert torch.equal(stacked.grad, torch.full_like(stacked, 1 / 6))
