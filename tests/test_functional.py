"""The functional stages: argument checks, stacked branches, and the values on the CPU path."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sknet_triton import functional, use_backend

pytestmark = pytest.mark.usefixtures("on_the_device")


def fuse(branches: Any, **options: Any) -> Tensor:
    return functional.sk_fuse(branches, **options)


def select(branches: Any, **options: Any) -> Tensor:
    logits = torch.zeros(2, 2, 4)
    return functional.sk_select(branches, logits, **options)


STAGES = {"sk_fuse": fuse, "sk_select": select}


def maps(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def message_of(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


GOOD = maps(2, 4, 3, 3)
BAD_BRANCHES: dict[str, tuple[type[Exception], Any, dict[str, Any], str]] = {
    "none": (ValueError, [], {}, "branches: expected at least one tensor, got none"),
    "unequal-shapes": (
        ValueError,
        [GOOD, maps(2, 4, 3, 2)],
        {},
        "branches[1]: expected the shape of branches[0], (2, 4, 3, 3), got (2, 4, 3, 2)",
    ),
    "unequal-channels": (
        ValueError,
        (GOOD, GOOD, maps(2, 1, 3, 3)),
        {},
        "branches[2]: expected the shape of branches[0], (2, 4, 3, 3), got (2, 1, 3, 3)",
    ),
    "unequal-dtypes": (
        ValueError,
        [GOOD, maps(2, 4, 3, 3, dtype=torch.bfloat16)],
        {},
        "branches[1]: expected the dtype of branches[0], torch.float32, got torch.bfloat16",
    ),
    "unequal-devices": (
        ValueError,
        [GOOD, maps(2, 4, 3, 3, device="meta")],
        {},
        "branches[1]: expected the device of branches[0], cpu, got meta",
    ),
    "integers": (
        TypeError,
        [maps(2, 4, 3, 3, dtype=torch.int64)] * 2,
        {},
        "branches[0]: expected a floating dtype, got torch.int64",
    ),
    "complex": (
        TypeError,
        [maps(2, 4, 3, 3, dtype=torch.complex64)] * 2,
        {},
        "branches[0]: expected a floating dtype, got torch.complex64",
    ),
    "an-array": (
        TypeError,
        [GOOD, GOOD.numpy()],
        {},
        "branches[1]: expected a tensor, got ndarray",
    ),
    "a-generator": (
        TypeError,
        (x for x in (GOOD, GOOD)),
        {},
        "branches: expected a list or tuple of tensors, got generator",
    ),
    "no-spatial-axis": (
        ValueError,
        [maps(2, 4), maps(2, 4)],
        {},
        "branches: expected [B, C, *spatial] with 1, 2 or 3 spatial axes, got shape (2, 4)",
    ),
    "four-spatial-axes": (
        ValueError,
        [maps(2, 4, 1, 1, 1, 1)] * 2,
        {},
        "branches: expected [B, C, *spatial] with 1, 2 or 3 spatial axes, "
        "got shape (2, 4, 1, 1, 1, 1)",
    ),
    "no-position": (
        ValueError,
        [maps(2, 4, 0, 3)] * 2,
        {},
        "branches: the average needs at least one position, got shape (2, 4, 0, 3)",
    ),
    "one-tensor-without-branch_dim": (
        TypeError,
        maps(2, 2, 4, 3, 3),
        {},
        "branches: expected a sequence of tensors, or one tensor together with branch_dim, "
        "got one tensor of shape (2, 2, 4, 3, 3) and branch_dim=None",
    ),
    "branch_dim-too-large": (
        ValueError,
        maps(2, 2, 4, 3, 3),
        {"branch_dim": 5},
        "branch_dim: expected an axis of a tensor with 5 axes, got 5",
    ),
    "branch_dim-too-small": (
        ValueError,
        maps(2, 2, 4, 3, 3),
        {"branch_dim": -6},
        "branch_dim: expected an axis of a tensor with 5 axes, got -6",
    ),
    "branch_dim-of-length-0": (
        ValueError,
        maps(2, 0, 4, 3, 3),
        {"branch_dim": 1},
        "branches: expected at least one tensor, got none",
    ),
    "branch_dim-with-a-list": (
        TypeError,
        [GOOD, GOOD],
        {"branch_dim": 1},
        "branch_dim: only for one stacked tensor, got 1 with a sequence of branches",
    ),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BAD_BRANCHES)
def test_bad_branches_are_named_with_their_rule_and_value(name: str, stage: str) -> None:
    error, branches, options, message = BAD_BRANCHES[name]
    assert message_of(error, lambda: STAGES[stage](branches, **options)) == message


BAD_LOGITS: dict[str, tuple[type[Exception], Any, str]] = {
    "branches-last": (
        ValueError,
        torch.zeros(2, 4, 3),
        "logits: expected shape [B, M, C] = (2, 3, 4), got (2, 4, 3)",
    ),
    "one-branch-short": (
        ValueError,
        torch.zeros(2, 2, 4),
        "logits: expected shape [B, M, C] = (2, 3, 4), got (2, 2, 4)",
    ),
    # both would broadcast without a word
    "one-for-all-channels": (
        ValueError,
        torch.zeros(2, 3, 1),
        "logits: expected shape [B, M, C] = (2, 3, 4), got (2, 3, 1)",
    ),
    "one-for-all-images": (
        ValueError,
        torch.zeros(1, 3, 4),
        "logits: expected shape [B, M, C] = (2, 3, 4), got (1, 3, 4)",
    ),
    "flat": (
        ValueError,
        torch.zeros(2, 12),
        "logits: expected shape [B, M, C] = (2, 3, 4), got (2, 12)",
    ),
    "integers": (
        TypeError,
        torch.zeros(2, 3, 4, dtype=torch.int32),
        "logits: expected a floating dtype, got torch.int32",
    ),
    "device": (
        ValueError,
        torch.zeros(2, 3, 4, device="meta"),
        "logits: expected the device of the branches, cpu, got meta",
    ),
    "a-list": (TypeError, [0.0], "logits: expected a tensor, got list"),
}


@pytest.mark.parametrize("name", BAD_LOGITS)
def test_bad_logits_are_named_with_their_rule_and_value(name: str) -> None:
    error, logits, message = BAD_LOGITS[name]
    assert message_of(error, lambda: functional.sk_select([GOOD] * 3, logits)) == message


def test_an_unknown_activation_or_reduction_is_named() -> None:
    options: dict[str, Any] = {"activation": "none"}
    call = functools.partial(functional.sk_select, [GOOD] * 3, torch.zeros(2, 3, 4), **options)
    assert message_of(ValueError, call) == (
        "activation: expected 'softmax', 'sigmoid' or None, got 'none'"
    )
    options = {"reduction": "max"}
    assert message_of(ValueError, functools.partial(functional.sk_fuse, [GOOD], **options)) == (
        "reduction: expected 'mean' or 'sum', got 'max'"
    )


def test_more_branches_than_the_kernels_take_are_refused_on_the_triton_path_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="the triton backend is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    branches = [maps(1, 2, 3, 3)] * 9
    with use_backend("triton"):
        message = message_of(ValueError, lambda: functional.sk_fuse(branches))
    assert message == (
        "branches: the triton backend takes at most 8, got 9; "
        "use_backend('reference') takes any number"
    )
    with use_backend("reference"):
        assert torch.equal(functional.sk_fuse(branches), torch.full((1, 2), 9.0))


# Values. The kernels have their own tests; these hold the definition still on the CPU path.


def test_sk_fuse_is_the_mean_over_space_of_the_sum_over_branches() -> None:
    first = torch.arange(12.0).view(1, 2, 3, 2)
    second = torch.full((1, 2, 3, 2), 10.0)
    assert functional.sk_fuse([first, second]).tolist() == [[12.5, 18.5]]


def test_sk_select_weighs_by_the_softmax_over_the_branches() -> None:
    # Weights 3/4 and 1/4 in channel 0, 1/4 and 3/4 in channel 1, up to one rounding of log 3.
    log3 = torch.tensor(3.0, dtype=torch.float64).log()
    logits = torch.stack([torch.stack([log3, -log3]), torch.zeros(2, dtype=torch.float64)])[None]
    first = torch.full((1, 2, 2, 2), 4.0, dtype=torch.float64)
    second = torch.full((1, 2, 2, 2), 8.0, dtype=torch.float64)
    out = functional.sk_select([first, second], logits)
    expected = torch.tensor([5.0, 7.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert (out - expected).abs().max() < 1e-14


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


@pytest.mark.parametrize("others", [1, 2], ids=["M=2", "M=3"])
def test_a_second_branch_in_another_layout_does_not_change_the_layout(others: int) -> None:
    first = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    rest = [torch.randn(2, 4, 3, 5) for _ in range(others)]
    logits = torch.randn(2, 1 + others, 4)
    out = functional.sk_select([first, *rest], logits)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out = functional.sk_select([*rest, first], logits)
    assert out.is_contiguous()
