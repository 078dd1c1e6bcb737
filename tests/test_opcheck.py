"""torch.library.opcheck of every operator, with the kernels and without.

It compares schema, fake tensors and autograd with what the operator does, also under AOTAutograd
with sizes that are not constants.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from sknet_triton import ops
from sknet_triton.reference.sk_fuse_select import Settings
from tests.helpers import Case
from tests.test_ops import OPERATOR_CASES, tensors

# The same operators on a machine without kernels, where they take PyTorch's formulas.
KERNELS = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])


@pytest.fixture
def device(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not kernels:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
def test_the_stages(case: Case, grad: bool, device: torch.device) -> None:
    xs, logits = tensors(case, device, grad)
    opcheck(ops.sk_fuse, (xs, "mean"))
    opcheck(ops.sk_select, (xs, logits, "softmax"))


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
def test_the_backward_of_select(case: Case, device: torch.device) -> None:
    xs, logits = tensors(case, device, grad=False)
    opcheck(ops.sk_select_bwd, (case.tensor(device), xs, logits, "softmax"))


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_the_other_activations_and_the_sum(activation: str, device: torch.device) -> None:
    case = Case((2, 3, 4, 5), 3)
    xs, logits = tensors(case, device, grad=True)
    opcheck(ops.sk_fuse, (xs, "sum"))
    opcheck(ops.sk_select, (xs, logits, activation))
    xs, logits = tensors(case, device, grad=False)
    opcheck(ops.sk_select_bwd, (case.tensor(device), xs, logits, activation))


@KERNELS
@pytest.mark.parametrize("needed", ["branches", "logits", "one branch"])
def test_gradients_that_only_some_ask_for(needed: str, device: torch.device) -> None:
    xs, logits = tensors(Case((2, 3, 4, 5)), device, grad=False)
    for x in {"branches": xs, "logits": [logits], "one branch": xs[1:]}[needed]:
        x.requires_grad_()
    opcheck(ops.sk_select, (xs, logits, "softmax"))


@dataclass(frozen=True)
class SectionCase:
    """Arguments of sk_fuse_select."""

    case: Case
    training: bool
    biases: bool = True

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{self.case}-{mode}{'' if self.biases else '-no_bias'}"

    def parameters(self, device: torch.device) -> list[Tensor | None]:
        C, M, d = self.case.shape[1], self.case.M, 4
        dtype = torch.float64 if self.case.dtype == torch.float64 else torch.float32

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, dtype=dtype) + 0.5

        stats = None if self.training else random(M, C)
        fc1_stats = None if self.training else random(d)
        return [
            *(random(M, C), random(M, C), stats, stats),
            *(random(d, C), random(d) if self.biases else None),
            *(random(d), random(d), fc1_stats, fc1_stats),
            *(random(M * C, d), random(M * C) if self.biases else None),
        ]

    def settings(self) -> Settings:
        return Settings(1e-5, 1e-5, self.training, self.training)


SECTION_CASES = [
    SectionCase(Case((2, 3, 4, 5)), training=True),
    SectionCase(Case((2, 3, 4, 5)), training=False),
    SectionCase(Case((2, 3, 4, 5)), training=True, biases=False),
    SectionCase(Case((2, 3, 4, 5), 3, "channels_last", torch.bfloat16), training=True),
    SectionCase(Case((2, 3, 4, 5), 3, "channels_last", torch.float16), training=False),
    SectionCase(Case((2, 3, 4, 5), 1, "sliced"), training=True),
    SectionCase(Case((2, 3, 4, 5), 2, "cropped", torch.float64), training=True),
    SectionCase(Case((2, 3, 4, 5), 2, "transposed"), training=False),
    SectionCase(Case((3, 2, 7)), training=True),
    SectionCase(Case((2, 2, 2, 2, 3), layout="channels_last"), training=True),
]


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("section", SECTION_CASES, ids=str)
def test_the_section(section: SectionCase, grad: bool, device: torch.device) -> None:
    xs, _ = tensors(section.case, device, grad)
    parameters = section.parameters(device)
    for i, parameter in enumerate(parameters):
        statistics = i in (2, 3, 8, 9)
        if parameter is not None and not statistics:
            parameter.requires_grad_(grad)
    opcheck(ops.sk_fuse_select, (xs, *parameters, *section.settings()))


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("section", SECTION_CASES, ids=str)
def test_the_backward_of_the_section(section: SectionCase, device: torch.device) -> None:
    xs, _ = tensors(section.case, device, grad=False)
    parameters, settings = section.parameters(device), section.settings()
    arguments: tuple[Any, ...] = (xs, *parameters, *settings)
    small = list(ops.sk_fuse_select(*arguments)[1:])
    dout = section.case.tensor(device, seed=9)
    opcheck(ops.sk_fuse_select_bwd, (dout, xs, parameters, small, *settings))
