"""torch.library.opcheck of every operator, with the kernels and without.

It compares schema, fake tensors and autograd with what the operator does, also under AOTAutograd
with sizes that are not constants.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from sknet_triton import functional, fused, ops
from tests.helpers import Case, Recorded
from tests.test_ops import OPERATOR_CASES, tensors

# The same operators on a machine without kernels, where they take PyTorch's formulas.
KERNEL_IDS = {True: "kernels", False: "no kernels"}
KERNELS = pytest.mark.parametrize("kernels", KERNEL_IDS, ids=KERNEL_IDS.get)


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


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("needed", ["branches", "logits", "one branch"])
def test_gradients_that_only_some_ask_for(needed: str, device: torch.device) -> None:
    xs, logits = tensors(Case((2, 3, 4, 5)), device, grad=False)
    for x in {"branches": xs, "logits": [logits], "one branch": xs[1:]}[needed]:
        x.requires_grad_()
    opcheck(ops.sk_select, (xs, logits, "softmax"))


@dataclass(frozen=True)
class SectionCase:
    """Arguments of `functional.sk_fuse_select`."""

    case: Case
    training: bool = True
    biases: bool = True
    affine: bool = True

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        without = ("" if self.biases else "-no_bias") + ("" if self.affine else "-no_affine")
        return f"{self.case}-{mode}{without}"

    def run(self, device: torch.device, grad: bool) -> Tensor:
        C, M, d = self.case.shape[1], self.case.M, 4
        dtype = torch.float64 if self.case.dtype == torch.float64 else torch.float32

        def random(*shape: int) -> Tensor:
            return (torch.rand(shape, device=device, dtype=dtype) + 0.5).requires_grad_(grad)

        def norm(n: int) -> functional.BatchNormArgs:
            weight, bias = (random(n) if self.affine else None for _ in range(2))
            mean, var = (None if self.training else random(n).detach() for _ in range(2))
            return functional.BatchNormArgs(weight, bias, mean, var, batch_stats=self.training)

        xs, _ = tensors(self.case, device, grad)
        fc1, fc2 = random(d, C), random(M * C, d)
        biases = [random(n) if self.biases else None for n in (d, M * C)]
        return functional.sk_fuse_select(
            xs, [norm(C) for _ in xs], fc1, norm(d), fc2, fc1_bias=biases[0], fc2_bias=biases[1]
        ).out


SECTION_CASES = [
    SectionCase(Case((2, 3, 4, 5))),
    SectionCase(Case((2, 3, 4, 5)), training=False, biases=False),
    SectionCase(Case((2, 3, 4, 5)), biases=False, affine=False),
    SectionCase(Case((2, 3, 4, 5), 3, "channels_last", torch.bfloat16)),
    SectionCase(Case((2, 3, 4, 5), 3, "channels_last", torch.float16), training=False),
    SectionCase(Case((2, 3, 4, 5), 1, "sliced")),
    SectionCase(Case((2, 3, 4, 5), 2, "cropped", torch.float64)),
    SectionCase(Case((2, 3, 4, 5), 2, "transposed"), training=False),
    SectionCase(Case((3, 2, 7))),
    SectionCase(Case((2, 2, 2, 2, 3), layout="channels_last")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "section"),
    [(True, section) for section in SECTION_CASES]
    + [(False, section) for section in SECTION_CASES[:5]],
    ids=lambda value: str(value) if isinstance(value, SectionCase) else KERNEL_IDS[value],
)
def test_every_step_of_the_section(
    section: SectionCase, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without kernels the operators run in programs that were made where there were some.
    monkeypatch.setattr(fused, "way_of", lambda x: "kernels")
    with Recorded() as recorded:
        out = section.run(device, grad=True)
        torch.autograd.backward(out, section.case.tensor(device, seed=9))
    steps = {"sk_hidden", "sk_logits", "sk_out", "sk_hidden_bwd", "sk_channels_bwd", "sk_dx"}
    assert set(recorded.calls) == steps | ({"sk_moments"} if section.training else set())
    for operator, args in recorded.calls.values():
        opcheck(operator, args)
