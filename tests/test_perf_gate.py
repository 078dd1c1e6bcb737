"""The gate lets what is right pass and stops what is wrong: ops, passes, networks, families."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import sknet_triton as skt
from perf.peers import baseline, families, rebuilt
from perf.peers.families import FAMILIES, Family
from perf.rows.schema import Case, Result
from perf.static.bytes import saved
from perf.sweep import contest, gate, measure, workloads
from perf.sweep.contest import BudgetSpentError
from perf.sweep.presets import PRESETS, jobs
from perf.sweep.providers import PROVIDERS, Call, Evaluation, Provider, arriving_gradient
from perf.sweep.workloads import make_case
from sknet_triton import SKConv, SKUnit, sknet26
from sknet_triton.acceleration import families as known
from sknet_triton.acceleration.swap import Accelerated
from tests.sweeps import CONDITIONS, CPU, OURS, PLAIN, Patch, measured, plant, small, take_times

Forward = Callable[..., Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")


def both(workload: str, mode: str, **axes: object) -> list[Result]:
    """Measures plain PyTorch and ours."""
    return measured(small(workload, mode, **axes), PLAIN, OURS)


def average_without_division(*branches: Tensor) -> Tensor:
    return torch.stack(branches).sum(dim=(0, 3, 4))


def swapped_branches(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return baseline.plain_select(logits, b, a)


def no_softmax(logits: Tensor, *branches: Tensor) -> Tensor:
    return (torch.stack(branches, dim=1) * logits[..., None, None]).sum(dim=1)


def last_position_forgotten(*branches: Tensor) -> Tensor:
    kept = [x.flatten(2)[..., :-1] for x in branches]
    return torch.stack(kept).sum(dim=(0, 3)) / branches[0].shape[2:].numel()


def nan_in_one_place(*branches: Tensor) -> Tensor:
    out = baseline.plain_fuse(*branches).clone()
    out[0, 0] = float("nan")
    return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("workload", "forward"),
    [
        ("sk_fuse", average_without_division),
        ("sk_fuse", last_position_forgotten),
        ("sk_fuse", nan_in_one_place),
        ("sk_select", swapped_branches),
        ("sk_select", no_softmax),
    ],
)
def test_planted_wrong_provider_is_unverified_and_never_timed(
    monkeypatch: Patch, workload: str, forward: Forward, dtype: str
) -> None:
    plant(monkeypatch, workload, forward)
    timed = take_times(monkeypatch, [1.0])
    plain, ours = both(workload, "infer", dtype=dtype)
    assert (plain.status, ours.status, ours.ms_p50) == ("ok", "unverified", None)
    assert "output off by" in ours.reason
    assert timed == [PLAIN.name]


def test_right_output_with_wrong_gradient_is_unverified(monkeypatch: Patch) -> None:
    def no_gradient_for_logits(logits: Tensor, *branches: Tensor) -> Tensor:
        out = baseline.plain_select(logits, *branches)
        return out + 1e-2 * (logits - logits.detach()).sum()

    plant(monkeypatch, "sk_select", no_gradient_for_logits)
    _, ours = both("sk_select", "train")
    assert ours.status == "unverified"
    assert "gradient off by" in ours.reason


def test_a_gradient_that_is_zero_is_measured_by_the_largest() -> None:
    exact = {"weight": torch.tensor([3.0, 4.0]), "bias": torch.tensor([1e-16])}
    rounding = {"weight": exact["weight"], "bias": torch.tensor([1e-6])}
    errors = gate.gradient_errors(rounding, exact)
    assert errors == pytest.approx({"weight": 0.0, "bias": 2e-7})
    fault = {"weight": exact["weight"], "bias": torch.tensor([0.05])}
    assert gate.gradient_errors(fault, exact)["bias"] == pytest.approx(1e-2)
    small = {"weight": torch.tensor([1e6]), "bias": torch.tensor([1e-3])}
    halved = {"weight": small["weight"], "bias": small["bias"] / 2}
    assert gate.gradient_errors(halved, small)["bias"] == pytest.approx(0.5)
    nothing = {"weight": torch.zeros(1)}
    assert gate.gradient_errors(nothing, nothing) == {"weight": 0.0}


def normalised(averages: Tensor) -> Tensor:
    return (averages - averages.mean(0)) / averages.std(0)


def test_what_magnifies_an_average_magnifies_what_a_sum_may_be_off() -> None:
    # Averages that hardly differ from image to image, normalised over the batch.
    magnified = baseline.Function(lambda x: normalised(x.mean(dim=(2, 3))))
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.01 * torch.randn(4, 16, 1, 1, generator=generator)
    x = x + 0.1 * torch.randn(4, 16, 64, 64, generator=generator)
    oracle = gate.consult(lambda case: magnified, small("sk_conv", "infer"), (x,), seed=0)
    total = torch.zeros(4, 16)
    for position in x.flatten(2).unbind(2):  # one after the other, as torch.compile may
        total += position
    verdict = oracle.judge(Evaluation(normalised(total / 64**2), {}))
    assert verdict.out_err > oracle.floor + 2 * oracle.plain_out_err
    assert verdict.passed
    forgotten = normalised(x.flatten(2)[..., 1:].mean(2))
    assert not oracle.judge(Evaluation(forgotten, {})).passed


@pytest.mark.parametrize(
    ("function", "least", "most"), [(torch.relu, 0.1, 1.0), (torch.neg, 0.0, 1e-12)]
)
def test_relus_near_zero_and_nothing_else_widen_the_bound_of_gradients(
    function: Forward, least: float, most: float
) -> None:
    x = torch.randn(4, 16, 4, 4)
    x[0] *= 1e-9
    module = baseline.Function(function)
    oracle = gate.consult(lambda case: module, small("sk_conv", "train"), (x,), seed=0)
    assert least <= oracle.condition <= most


@pytest.mark.parametrize("workload", ["sk_fuse", "sk_select", "sknet26"])
def test_what_hardly_magnifies_hardly_widens_the_bound(workload: str) -> None:
    case = small(workload, "infer")
    oracle = gate.consult(
        lambda case: workloads.place_module(workloads.parameters(case, "plain", 0), case, CPU),
        case,
        workloads.inputs(case, 0, CPU),
        seed=0,
    )
    assert oracle.magnified < 0.3 * oracle.floor


@pytest.mark.parametrize(
    ("error", "status", "calls"),
    [
        (RuntimeError("first line\nsecond line"), "error", 0),
        (torch.OutOfMemoryError("first line"), "oom", 0),
        (RuntimeError("first line"), "error", 20),  # while it is timed
    ],
)
def test_failing_provider_is_a_row_with_one_line_of_reason(
    error: Exception, status: str, calls: int, monkeypatch: Patch
) -> None:
    left = itertools.count(calls, -1)

    def fail(*branches: Tensor) -> Tensor:
        if next(left) <= 0:
            raise error
        return baseline.plain_fuse(*branches)

    plant(monkeypatch, "sk_fuse", fail)
    plain, ours = both("sk_fuse", "infer")
    assert (plain.status, ours.status) == ("ok", status)
    assert ours.reason == f"{type(error).__name__}: first line"


LAST = {"layout": "channels_last"}


@pytest.mark.parametrize(
    ("workload", "mode", "axes"),
    [
        ("sk_fuse", "train", LAST),
        ("sk_select", "train", {"dtype": "bf16"}),
        ("sk_select", "train", {"dtype": "fp16", **LAST}),
        ("sk_select", "train", {"M": 1}),
        ("sk_select", "train", {"M": 3}),
        ("sk_fuse_select", "train", {}),
        ("sk_fuse_select", "infer", {"dtype": "bf16", **LAST}),
        ("sk_conv", "train", LAST),
        ("sk_select", "bwd", {}),
        ("sk_fuse_select", "bwd", {"dtype": "bf16", **LAST}),
        ("sk_conv", "bwd", {}),
        ("sk_unit", "bwd", LAST),
        ("sk_conv", "infer", {"dtype": "autocast"}),
        ("sk_unit", "train", {}),
        ("sknet26", "infer", {}),
    ],
)
def test_reference_passes_and_is_timed(workload: str, mode: str, axes: dict[str, Any]) -> None:
    level = small(workload, mode).level
    for result in both(workload, mode, **axes):
        assert (result.status, result.reason) == ("ok", "")
        assert result.out_err is not None
        times = cast(tuple[float, ...], (result.ms_p20, result.ms_p50, result.ms_p80))
        assert 0 < times[0] <= times[1] <= times[2]
        assert (result.grad_err is None) == (mode == "infer")
        assert (result.saved_mb is None) == (mode == "infer")
        assert (result.gbps is None) == (level != "op")
        assert (result.images_per_s is None) == (level == "op")


class _BackwardOnce(torch.autograd.Function):
    """Keeps a graph of its own, which the first backward pass frees."""

    @staticmethod
    def forward(ctx: Any, *branches: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.inside = [x.detach().requires_grad_() for x in branches]
            ctx.out = torch.stack([x * x.exp() for x in ctx.inside]).sum(dim=0)
        out: Tensor = ctx.out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.autograd.grad(ctx.out, ctx.inside, dout)
        return grads


def test_provider_that_cannot_run_backward_again_is_unsupported_in_bwd(monkeypatch: Patch) -> None:
    plant(monkeypatch, "sk_fuse", lambda *branches: _BackwardOnce.apply(*branches))  # type: ignore[no-untyped-call]
    plain, ours = both("sk_fuse", "bwd")
    assert (plain.status, ours.status) == ("ok", "unsupported")
    assert "backward through the graph a second time" in ours.reason


def test_wrong_second_backward_is_unverified_in_bwd(monkeypatch: Patch) -> None:
    factors = itertools.chain([1], itertools.repeat(2))

    def hooked(*branches: Tensor) -> Tensor:
        out = baseline.plain_fuse(*branches)
        if out.requires_grad:
            out.register_hook(lambda dout: next(factors) * dout)  # type: ignore[no-untyped-call]
        return out

    plant(monkeypatch, "sk_fuse", hooked)
    assert both("sk_fuse", "bwd")[1].status == "unverified"


def test_bwd_times_the_backward_pass_alone(monkeypatch: Patch) -> None:
    forwards = itertools.count()

    def counted(logits: Tensor, *branches: Tensor) -> Tensor:
        next(forwards)
        return baseline.plain_select(logits, *branches)

    plant(monkeypatch, "sk_select", counted)
    for seconds in (0.002, 0.05):
        conditions = replace(CONDITIONS, seconds=seconds)
        contest.measure_case(small("sk_select", "bwd"), (OURS,), conditions)
    # The graph that is judged and timed, and the count of what is saved, however long.
    assert next(forwards) == 2 * 2


@pytest.mark.slow
def test_bwd_of_torch_compile_runs_again() -> None:
    (result,) = measured(small("sk_select", "bwd", batch=2), PROVIDERS["plain-compile"])
    assert (result.status, result.reason) == ("ok", "")


def test_backward_of_fuse_needs_no_bytes_and_has_no_bandwidth() -> None:
    result, _ = both("sk_fuse", "bwd")
    assert (result.status, result.bytes_needed) == ("ok", 0)
    assert (result.gbps, result.pct_copy) == (None, None)


ONE_VECTOR = "training needs a batch of at least 2, for the batch norm of fc1"


@pytest.mark.parametrize(
    ("workload", "mode", "axes", "said"),
    [
        ("sk_conv", "train", {"batch": 1}, ONE_VECTOR),
        ("sk_unit", "bwd", {"batch": 1}, ONE_VECTOR),
        ("timm_selective_kernel", "train", {"batch": 1}, ONE_VECTOR),
        ("mirnet_skff", "train", {"batch": 1}, None),
        ("sk_fuse", "infer", {"dtype": "tf32"}, "tf32 needs an NVIDIA GPU"),
        ("sk_fuse", "infer", {"dtype": "autocast"}, "autocast concerns layers"),
        ("moments", "train", {}, "a pass alone is mode infer in fp32, bf16 or fp16"),
        ("digits", "infer", {}, "the digits are trained, in fp32"),
        ("digits", "bwd", {}, "the backward pass alone is measured for ops, layers"),
        ("sknet26", "bwd", {}, "the backward pass alone is measured for ops, layers"),
        ("vision_permutator", "infer", {"resolution": 35}, "into one segment a row, not into 5"),
        ("vision_permutator", "infer", {"resolution": 28}, None),
    ],
)
def test_impossible_case_is_unsupported_with_a_reason(
    workload: str, mode: str, axes: dict[str, Any], said: str | None
) -> None:
    reason = workloads.unsupported(small(workload, mode, **axes), CPU)
    assert str(said) in str(reason)
    if said:
        (result,) = measured(small(workload, mode, **axes), PLAIN)
        assert (result.status, result.reason) == ("unsupported", reason)


@pytest.mark.parametrize(
    "module",
    [SKConv(64, 128, 2, M=3, G=8), SKUnit(64, 32, G=8), sknet26(num_classes=10)],
    ids=["conv", "unit", "net"],
)
def test_plain_baseline_computes_the_same_from_the_same_state_dict(module: nn.Module) -> None:
    module = module.double().eval()
    plain = baseline.with_plain_convs(module)
    assert plain.state_dict().keys() == module.state_dict().keys()
    assert not any(isinstance(child, SKConv) for child in plain.modules())
    channels = next(iter(module.parameters())).shape[1] * (8 if isinstance(module, SKConv) else 1)
    x = torch.randn(2, channels, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(plain(x), module(x), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_digits_are_learned() -> None:
    pytest.importorskip("sklearn")
    _, ours = both("digits", "train", batch=64)
    assert ours.status == "ok"
    assert cast(float, ours.accuracy) >= 0.97


@pytest.mark.parametrize(("mode", "passes"), [("infer", 1), ("train", 3), ("bwd", 2)])
def test_flops_are_those_of_the_published_network(mode: str, passes: int) -> None:
    case = make_case("sknet50", mode, batch=1, resolution=224)  # type: ignore[arg-type]
    module = workloads.parameters(case, "plain", seed=0).eval()
    inputs = workloads.inputs(case, 0, CPU)
    counted = measure.flops(module, inputs, case.mode)
    assert counted / 2 == pytest.approx(4.46e9 * passes, rel=0.005)


def test_quantiles_leave_a_fifth_of_the_times_on_either_side() -> None:
    assert measure.quantiles([8.0, 0.0, 2.0, 4.0, 10.0, 6.0]) == pytest.approx((2.0, 5.0, 8.0))


def test_figures_follow_from_the_median_time() -> None:
    of_op, of_layer = (both(workload, "infer")[0] for workload in ("sk_select", "sk_conv"))
    seconds = cast(float, of_op.ms_p50) / 1e3
    gbps = cast(float, of_op.bytes_needed) / seconds / 1e9
    assert of_op.gbps == pytest.approx(gbps)
    assert of_op.pct_copy == pytest.approx(100 * gbps / cast(float, of_op.copy_gbps))
    seconds = cast(float, of_layer.ms_p50) / 1e3
    assert of_layer.images_per_s == pytest.approx(small("sk_conv", "infer").B / seconds)
    tflops = cast(float, of_layer.gflops) / 1e3 / seconds
    assert of_layer.tflops_per_s == pytest.approx(tflops)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wrong", ["a", "b", "c"])
def test_one_gradient_that_is_no_number_is_the_worst(wrong: str, value: float) -> None:
    exact = Evaluation(torch.ones(2), {name: torch.ones(2).double() for name in "abc"})
    oracle = gate.Oracle(exact, 1e-6, 0.0, 0.0, dict.fromkeys("abc", 0.0), 0.0)
    assert oracle.judge(exact).passed
    grads = {**exact.grads, wrong: torch.tensor([1.0, value])}
    assert not oracle.judge(Evaluation(exact.out, grads)).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_or_a_bound_that_is_no_number_is_no_proof(value: float) -> None:
    assert gate.Verdict(0.0, 1.0, 0.0, 1.0).passed
    for output in ((value, 1.0), (0.0, value), (value, value)):
        assert not gate.Verdict(*output, None, None).passed
        assert not gate.Verdict(0.0, 1.0, *output).passed


def test_providers_that_are_ready_are_timed_when_the_budget_is_spent(monkeypatch: Patch) -> None:
    prepared = Provider.prepared

    def spent(self: Provider, call: Call) -> object:
        if self.source == "ours":
            raise BudgetSpentError
        return prepared(self, call)

    monkeypatch.setattr(Provider, "prepared", spent)
    (result,) = both("sk_fuse", "infer")
    assert result.ms_p50 is not None


# Passes


@pytest.mark.interpreter
@pytest.mark.parametrize("workload", ["moments", "fuse", "select", "sums", "dx"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_pass_is_the_kernels_launch_and_moves_what_it_counts(workload: str, layout: str) -> None:
    from perf.static.bytes import counted_bytes

    case = small(workload, "infer", layout=layout)
    run_pass = workloads.pass_of(case, CPU)
    with counted_bytes() as count:
        run_pass()
    needed = workloads.bytes_needed(case)
    assert needed
    assert needed <= count.read + count.written < 1.6 * needed


def test_a_copy_reads_and_writes_and_a_pass_belongs_to_one_provider() -> None:
    case = small("copy", "infer")
    result, other = measured(case, PLAIN, OURS)
    assert (result.status, result.images_per_s, other.status) == ("ok", None, "unsupported")
    assert result.bytes_needed == 2 * 4 * case.B * case.C * case.H * case.W
    assert result.gbps is not None
    assert result.pct_copy is not None
    results = measured(small("moments", "infer"), PLAIN, PROVIDERS["ours-triton-eager"])
    assert {result.status for result in results} == {"unsupported"}
    assert results[0].reason == "moments is a pass of ours-triton-eager"


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_pass_is_timed_after_its_fuse_select_was_judged(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Provider, "unavailable", lambda *_: None)
    case = small("select", "infer", batch=2)
    ours = PROVIDERS["ours-triton-eager"]
    monkeypatch.setattr(contest, "_judged_step", contest._judged_step.__wrapped__)
    (result,) = measured(case, ours)
    assert (result.status, result.reason) == ("ok", "")
    assert result.grad_err is not None
    assert result.bytes_needed == 3 * 4 * case.B * case.C * case.H * case.W
    assert result.gbps is not None

    wrong = Result("unverified", "output off")
    monkeypatch.setattr(contest, "judge_case", lambda *_: {ours.name: wrong})
    assert measured(case, ours) == [wrong]


# Families: what stands before, what after, and that both are checked

# A radix of 1 is the same module with one branch, where there is nothing to select.
WITHOUT_A_ROW = {"ResNeSt split attention, radix 1"}

every_family = pytest.mark.parametrize("name", FAMILIES)


def family(name: str, mode: str, **axes: object) -> Case:
    return small(name, mode, **{"resolution": 28, **axes})


def accelerated_within(module: nn.Module) -> list[str]:
    found = [m for m in module.modules() if isinstance(m, Accelerated)]
    return [m._skt_family.name for m in found]


def test_every_family_that_accelerate_knows_is_measured() -> None:
    built = [families.accelerated(family(name, "infer")) for name in FAMILIES]
    kinds = {kind for module in built for kind in accelerated_within(module)}
    assert kinds == {family.name for family in known()} - WITHOUT_A_ROW
    assert {job.case.workload for job in jobs(PRESETS["family"].grids, 0)} == set(FAMILIES)


@every_family
def test_before_is_the_module_itself_and_after_the_same_module_accelerated(name: str) -> None:
    case = family(name, "train")
    before, after = (workloads.parameters(case, source, 0) for source in ("plain", "ours"))
    assert (accelerated_within(before), len(accelerated_within(after))) == ([], 1)
    state = after.state_dict()
    assert before.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())


@pytest.mark.parametrize(("mode", "layout"), [("train", "nchw"), ("infer", "channels_last")])
@every_family
def test_both_pass_the_gate_and_are_timed(name: str, mode: str, layout: str) -> None:
    for result in measured(family(name, mode, layout=layout), PLAIN, OURS):
        assert (result.status, result.reason) == ("ok", "")
        assert result.ms_p50
        if mode == "infer":
            assert (result.saved_mb, result.saved_own_mb) == (None, None)
            continue
        # A bound near one, as of a bias before a batch norm, would let any gradient pass.
        assert cast(float, result.grad_err_bound) < 0.2
        assert cast(float, result.saved_own_mb) <= cast(float, result.saved_mb)


class _BranchesReversed(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.module = families.accelerated(case)

    def forward(self, *branches: Tensor) -> Tensor:
        out: Tensor = self.module(*reversed(branches))
        return out


def test_what_accelerate_computes_wrongly_is_unverified(monkeypatch: Patch) -> None:
    def before(ours: nn.Module) -> nn.Module:
        return families.original(ours.get_submodule("module"))

    case = family("mirnet_skff", "infer")
    plant(monkeypatch, "mirnet_skff", _BranchesReversed(case), plain=before)
    plain, ours = measured(case, PLAIN, OURS)
    assert (plain.status, ours.status, ours.ms_p50) == ("ok", "unverified", None)


def test_a_module_that_accelerate_leaves_is_an_error(monkeypatch: Patch) -> None:
    class Other(rebuilt.SKConv):
        def attention(self, wide: Tensor) -> Tensor:
            return super().attention(wide.sigmoid())

    monkeypatch.setitem(FAMILIES, "port_sk_conv", Family(lambda case: Other(case.C, case.C), C=128))
    results = measured(family("port_sk_conv", "infer"), PLAIN, OURS)
    assert {result.status for result in results} == {"error"}
    assert "expected one accelerated module, got: 1 left" in results[1].reason


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
            case = family(name, "infer", layout=layout)
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


@pytest.mark.parametrize(
    ("workload", "passes"),
    [
        ("sk_fuse", (3, 3, 0)),
        ("sk_select", (4, 11, 7)),
        ("sk_fuse_select", (7, 21, 11)),
        ("mirnet_skff", (7, 15, 8)),
        ("timm_selective_kernel", None),
    ],
)
def test_what_is_needed_is_the_passes_of_the_mathematics(
    workload: str, passes: tuple[int, int, int] | None
) -> None:
    for i, mode in enumerate(("infer", "train", "bwd")):
        case = small(workload, mode, M=3, dtype="bf16")
        one_pass = case.B * case.C * case.H * case.W * 2
        assert workloads.bytes_needed(case) == (passes and passes[i] * one_pass)


def test_the_backward_pass_of_a_family_is_measured_alone() -> None:
    results = measured(family("dehazeformer_sk_fusion", "bwd"), PLAIN, OURS)
    assert {result.status for result in results} == {"ok"}


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
