"""The rows of the families: what stands before, what after, and that both are checked."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import sknet_triton as skt
from perf.peers import baseline, families, rebuilt
from perf.peers.families import FAMILIES, Family
from perf.rows.schema import Case
from perf.static.bytes import saved
from perf.sweep import contest, workloads
from perf.sweep.presets import PRESETS, jobs
from perf.sweep.providers import PROVIDERS, arriving_gradient
from perf.sweep.workloads import make_case
from sknet_triton.acceleration import families as known
from sknet_triton.acceleration.swap import Accelerated
from tests import sweeps
from tests.sweeps import CONDITIONS, CPU, Patch

PAIR = (PROVIDERS["plain-eager"], PROVIDERS["ours-pytorch-eager"])

# A radix of 1 is the same module with one branch, where there is nothing to select.
WITHOUT_A_ROW = {"ResNeSt split attention, radix 1"}

pytestmark = pytest.mark.usefixtures("one_thread")

every_family = pytest.mark.parametrize("name", FAMILIES)


def small(name: str, mode: str, **axes: object) -> Case:
    return sweeps.small(name, mode, **{"resolution": 28, **axes})


def accelerated_within(module: nn.Module) -> list[str]:
    found = [m for m in module.modules() if isinstance(m, Accelerated)]
    return [m._skt_family.name for m in found]


def test_every_family_that_accelerate_knows_is_measured() -> None:
    built = [families.accelerated(small(name, "infer")) for name in FAMILIES]
    kinds = {kind for module in built for kind in accelerated_within(module)}
    assert kinds == {family.name for family in known()} - WITHOUT_A_ROW
    assert {job.case.workload for job in jobs(PRESETS["family"].grids, 0)} == set(FAMILIES)


@every_family
def test_before_is_the_module_itself_and_after_the_same_module_accelerated(name: str) -> None:
    case = small(name, "train")
    before, after = (workloads.parameters(case, source, 0) for source in ("plain", "ours"))
    assert (accelerated_within(before), len(accelerated_within(after))) == ([], 1)
    state = after.state_dict()
    assert before.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())


@pytest.mark.parametrize(("mode", "layout"), [("train", "nchw"), ("infer", "channels_last")])
@every_family
def test_both_pass_the_gate_and_are_timed(name: str, mode: str, layout: str) -> None:
    case = small(name, mode, layout=layout)
    for result in contest.measure_case(case, PAIR, CONDITIONS).values():
        assert (result.status, result.reason) == ("ok", "")
        assert result.ms_p50
        if mode == "infer":
            assert (result.saved_mb, result.saved_own_mb) == (None, None)
            continue
        # A bound near one would let any gradient pass.
        assert cast(float, result.grad_err_bound) < 0.2
        assert cast(float, result.saved_own_mb) <= cast(float, result.saved_mb)


class Wrong(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.module = families.accelerated(case)

    def forward(self, *branches: Tensor) -> Tensor:
        out: Tensor = self.module(*reversed(branches))
        return out


def test_what_accelerate_computes_wrongly_is_unverified(monkeypatch: Patch) -> None:
    def before(ours: nn.Module) -> nn.Module:
        return families.original(ours.get_submodule("module"))

    wrong = replace(workloads.WORKLOADS["mirnet_skff"], ours=Wrong, plain=before)
    monkeypatch.setitem(workloads.WORKLOADS, "mirnet_skff", wrong)
    plain, ours = contest.measure_case(small("mirnet_skff", "infer"), PAIR, CONDITIONS).values()
    assert (plain.status, ours.status, ours.ms_p50) == ("ok", "unverified", None)


def test_a_module_that_accelerate_leaves_is_an_error(monkeypatch: Patch) -> None:
    class Other(rebuilt.SKConv):
        def attention(self, wide: Tensor) -> Tensor:
            return super().attention(wide.sigmoid())

    monkeypatch.setitem(FAMILIES, "port_sk_conv", Family(lambda case: Other(case.C, case.C), C=128))
    results = contest.measure_case(small("port_sk_conv", "infer"), PAIR, CONDITIONS)
    assert {result.status for result in results.values()} == {"error"}
    assert "expected one accelerated module, got: 1 left" in results["ours-pytorch-eager"].reason


@pytest.mark.parametrize(
    ("name", "resolution", "sizes"),
    [
        ("mirnet_skff", 130, (3, 0, 64, 130, 130)),
        ("vision_permutator", 224, (3, 0, 192, 32, 32)),
        ("timm_selective_kernel", 225, (2, 0, 128, 57, 57)),
    ],
)
def test_families_have_their_own_maps_and_branches(
    name: str, resolution: int, sizes: tuple[int, ...]
) -> None:
    case = make_case(name, "infer", M=7, stage=3, resolution=resolution)
    assert (case.M, case.stage, case.C, case.H, case.W) == sizes


def test_channels_first_and_last_are_the_same_numbers_for_every_family() -> None:
    for name in FAMILIES:
        outs = []
        for layout in ("nchw", "channels_last"):
            case = small(name, "infer", layout=layout)
            module = workloads.place_module(workloads.parameters(case, "ours", 0), case, CPU)
            xs = workloads.inputs(case, 0, CPU)
            format_ = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            assert all(x.is_contiguous(memory_format=format_) for x in xs)
            assert {x.shape for x in xs} == {(4, case.C, case.H, case.W)}
            with skt.use_backend("reference"), torch.no_grad():
                outs.append(module(*xs))
            assert outs[-1].shape == (4, case.C, case.H, case.W)
        # Of the order of one; roundings of float32 through two norms and 1,152 products.
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)


def test_maps_go_in_and_out_as_they_are_called() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(families.OnChannelsLast(nn.Flatten(2, 2))(x), x)
    assert torch.equal(families.OnList(baseline.Function(lambda maps: maps.pop()))(x, -x), -x)


@pytest.mark.parametrize(("mode", "passes"), [("infer", 7), ("train", 15), ("bwd", 8)])
def test_fusion_of_given_maps_has_the_passes_of_the_mathematics(mode: str, passes: int) -> None:
    case = small("mirnet_skff", mode)
    assert workloads.bytes_needed(case) == passes * 4 * 64 * 28 * 28 * 4
    assert workloads.bytes_needed(small("timm_selective_kernel", mode)) is None


def test_the_backward_pass_of_a_family_is_measured_alone() -> None:
    results = contest.measure_case(small("dehazeformer_sk_fusion", "bwd"), PAIR, CONDITIONS)
    assert {result.status for result in results.values()} == {"ok"}


def test_one_image_trains_where_there_is_no_batch_norm() -> None:
    assert workloads.unsupported(small("mirnet_skff", "train", batch=1), CPU) is None
    reason = workloads.unsupported(small("timm_selective_kernel", "train", batch=1), CPU)
    assert reason == "training needs a batch of at least 2, for the batch norm of fc1"


def test_a_side_that_vision_permutator_cannot_have_is_unsupported() -> None:
    case = small("vision_permutator", "infer", resolution=35)
    assert "into 5" in str(workloads.unsupported(case, CPU))
    assert workloads.unsupported(small("vision_permutator", "infer"), CPU) is None


def test_what_is_kept_is_counted_with_the_inputs_and_without() -> None:
    side = 512  # 1 MiB of float32 in a square
    x = torch.randn(2, side, side, requires_grad=True)
    module = nn.Sequential(nn.Linear(side, side), nn.Sigmoid())
    counted = saved(lambda: module(x[0]), module, [x])
    # The linear layer keeps its weight and half of x, whose storage is whole; the sigmoid its out.
    assert (counted.mb, counted.own_mb) == (3.0, 1.0)


def test_gradients_arrive_in_the_layout_of_the_case() -> None:
    out = torch.zeros(2, 3, 4, 5)
    first, last = (
        arriving_gradient(out, small("sk_conv", "train", layout=layout), 0)
        for layout in ("nchw", "channels_last")
    )
    assert first.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, last)
