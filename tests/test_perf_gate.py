"""The gate lets what is right pass and stops what is wrong, in values and in gradients."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from perf.peers import baseline
from perf.rows import env
from perf.rows.schema import Result
from perf.sweep import contest, gate, measure, workloads
from perf.sweep.providers import PROVIDERS, Evaluation
from perf.sweep.workloads import make_case
from sknet_triton import SKConv, SKUnit, sknet26
from tests.sweeps import CONDITIONS, CPU, Patch, small

EAGER, REFERENCE = PROVIDERS["plain-eager"], PROVIDERS["ours-pytorch-eager"]

Forward = Callable[..., Tensor]
Plant = Callable[[str, Forward], None]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def plant(monkeypatch: Patch) -> Plant:
    """Puts a wrong computation in the place of our module of a workload."""

    def put(workload: str, forward: Forward) -> None:
        wrong = replace(workloads.WORKLOADS[workload], ours=lambda case: baseline.Function(forward))
        monkeypatch.setitem(workloads.WORKLOADS, workload, wrong)

    return put


def both(workload: str, mode: str, **axes: object) -> tuple[Result, Result]:
    """Measures plain PyTorch and ours."""
    results = contest.measure_case(small(workload, mode, **axes), (EAGER, REFERENCE), CONDITIONS)
    return results[EAGER.name], results[REFERENCE.name]


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
    out = baseline.plain_fuse(*branches)
    mask = torch.zeros_like(out)
    mask[0, 0] = float("nan")
    return out + mask


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
    plant: Plant, monkeypatch: Patch, workload: str, forward: Forward, dtype: str
) -> None:
    plant(workload, forward)
    timed: list[str] = []

    def spy(runs: Mapping[str, object], *_: object) -> tuple[dict[str, measure.Times], Any]:
        timed.extend(runs)
        return {name: measure.Times(env.switches(), [1.0]) for name in runs}, {}

    monkeypatch.setattr(measure, "interleaved", spy)
    plain, ours = both(workload, "infer", dtype=dtype)
    assert (plain.status, ours.status, ours.ms_p50) == ("ok", "unverified", None)
    assert "output off by" in ours.reason
    assert timed == [EAGER.name]


def test_right_output_with_wrong_gradient_is_unverified(plant: Plant) -> None:
    def no_gradient_for_logits(logits: Tensor, *branches: Tensor) -> Tensor:
        out = baseline.plain_select(logits, *branches)
        return out + 1e-2 * (logits - logits.detach()).sum()

    plant("sk_select", no_gradient_for_logits)
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


def test_a_bias_before_a_batch_norm_does_not_widen_the_bounds() -> None:
    result, _ = both("resnest_split_attention", "train")
    assert result.status == "ok"
    assert result.grad_err_bound is not None
    assert result.grad_err_bound < 0.2


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
    error: Exception, status: str, calls: int, plant: Plant
) -> None:
    left = itertools.count(calls, -1)

    def fail(*branches: Tensor) -> Tensor:
        if next(left) <= 0:
            raise error
        return baseline.plain_fuse(*branches)

    plant("sk_fuse", fail)
    plain, ours = both("sk_fuse", "infer")
    assert (plain.status, ours.status) == ("ok", status)
    assert ours.reason == f"{type(error).__name__}: first line"


@pytest.mark.parametrize(
    ("workload", "mode", "dtype", "layout"),
    [
        ("sk_fuse", "train", "fp32", "channels_last"),
        ("sk_select", "train", "bf16", "nchw"),
        ("sk_select", "train", "fp16", "channels_last"),
        ("sk_fuse_select", "train", "fp32", "nchw"),
        ("sk_fuse_select", "infer", "bf16", "channels_last"),
        ("sk_conv", "train", "fp32", "channels_last"),
        ("sk_select", "bwd", "fp32", "nchw"),
        ("sk_fuse_select", "bwd", "bf16", "channels_last"),
        ("sk_conv", "bwd", "fp32", "nchw"),
        ("sk_unit", "bwd", "fp32", "channels_last"),
        ("sk_conv", "infer", "autocast", "nchw"),
        ("sk_unit", "train", "fp32", "nchw"),
        ("sknet26", "infer", "fp32", "nchw"),
    ],
)
def test_reference_passes_and_is_timed(workload: str, mode: str, dtype: str, layout: str) -> None:
    level = small(workload, mode).level
    for result in both(workload, mode, dtype=dtype, layout=layout):
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


def test_provider_that_cannot_run_backward_again_is_unsupported_in_bwd(plant: Plant) -> None:
    plant("sk_fuse", lambda *branches: _BackwardOnce.apply(*branches))  # type: ignore[no-untyped-call]
    plain, ours = both("sk_fuse", "bwd")
    assert (plain.status, ours.status) == ("ok", "unsupported")
    assert "backward through the graph a second time" in ours.reason


def test_wrong_second_backward_is_unverified_in_bwd(plant: Plant) -> None:
    factors = itertools.chain([1], itertools.repeat(2))

    def hooked(*branches: Tensor) -> Tensor:
        out = baseline.plain_fuse(*branches)
        if out.requires_grad:
            out.register_hook(lambda dout: next(factors) * dout)  # type: ignore[no-untyped-call]
        return out

    plant("sk_fuse", hooked)
    assert both("sk_fuse", "bwd")[1].status == "unverified"


def test_bwd_times_the_backward_pass_alone(plant: Plant) -> None:
    forwards = itertools.count()

    def counted(logits: Tensor, *branches: Tensor) -> Tensor:
        next(forwards)
        return baseline.plain_select(logits, *branches)

    plant("sk_select", counted)
    for seconds in (0.002, 0.05):
        conditions = replace(CONDITIONS, seconds=seconds)
        contest.measure_case(small("sk_select", "bwd"), (REFERENCE,), conditions)
    # The graph that is judged and timed, and the count of what is saved, however long.
    assert next(forwards) == 2 * 2


@pytest.mark.slow
def test_bwd_of_torch_compile_runs_again() -> None:
    results = contest.measure_case(
        small("sk_select", "bwd", batch=2), (PROVIDERS["plain-compile"],), CONDITIONS
    )
    assert (results["plain-compile"].status, results["plain-compile"].reason) == ("ok", "")


def test_backward_of_fuse_needs_no_bytes_and_has_no_bandwidth() -> None:
    result, _ = both("sk_fuse", "bwd")
    assert (result.status, result.bytes_needed) == ("ok", 0)
    assert (result.gbps, result.pct_copy) == (None, None)


@pytest.mark.parametrize("M", [1, 3])
def test_gate_takes_other_numbers_of_branches(M: int) -> None:
    assert both("sk_select", "train", M=M)[1].status == "ok"


@pytest.mark.parametrize(
    ("workload", "mode", "axes"),
    [
        ("sk_conv", "train", {"batch": 1}),
        ("sk_fuse", "infer", {"dtype": "tf32"}),
        ("sk_fuse", "infer", {"dtype": "autocast"}),
        ("digits", "infer", {}),
        ("digits", "bwd", {}),
        ("sknet26", "bwd", {}),
        ("sk_unit", "bwd", {"batch": 1}),
    ],
)
def test_impossible_case_is_unsupported_with_a_reason(
    workload: str, mode: str, axes: dict[str, Any]
) -> None:
    result, _ = both(workload, mode, **axes)
    assert result.status == "unsupported"
    assert result.reason


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
    for verdict in (
        gate.Verdict(value, 1.0, 0.0, 1.0),
        gate.Verdict(0.0, value, 0.0, 1.0),
        gate.Verdict(value, value, None, None),
        gate.Verdict(0.0, 1.0, value, 1.0),
        gate.Verdict(0.0, 1.0, 0.0, value),
        gate.Verdict(0.0, 1.0, value, value),
    ):
        assert not verdict.passed
