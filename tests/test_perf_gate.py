"""The gate lets what is right pass and stops what is wrong, in values and in gradients."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from perf.peers import baseline
from perf.rows import env
from perf.rows.schema import Case
from perf.sweep import contest, gate, measure, workloads
from perf.sweep.providers import PROVIDERS, Evaluation
from perf.sweep.workloads import make_case
from sknet_triton import SKConv, SKUnit, sknet26
from tests.sweeps import CONDITIONS, CPU, small

EAGER, REFERENCE = PROVIDERS["plain-eager"], PROVIDERS["ours-pytorch-eager"]

Forward = Callable[..., Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")

Plant = Callable[[str, Forward], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a wrong computation in the place of our module of a workload."""

    def put(workload: str, forward: Forward) -> None:
        class Planted(nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                out: Tensor = forward(*inputs)
                return out

        wrong = replace(workloads.WORKLOADS[workload], ours=lambda case: Planted())
        monkeypatch.setitem(workloads.WORKLOADS, workload, wrong)

    return put


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
    out: Tensor = baseline.plain_fuse(*branches)
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
    plant: Plant, monkeypatch: pytest.MonkeyPatch, workload: str, forward: Forward, dtype: str
) -> None:
    plant(workload, forward)
    timed: list[str] = []

    def spy(runs: Mapping[str, object], *rest: object) -> dict[str, measure.Times]:
        timed.extend(runs)
        return {name: measure.Times(env.switches(), [1.0]) for name in runs}

    monkeypatch.setattr(measure, "interleaved", spy)
    case = small(workload, "infer", dtype=dtype)
    results = contest.measure_case(case, (EAGER, REFERENCE), CONDITIONS)
    assert results["ours-pytorch-eager"].status == "unverified"
    assert results["ours-pytorch-eager"].ms_p50 is None
    assert "output off by" in results["ours-pytorch-eager"].reason
    assert results["plain-eager"].status == "ok"
    assert timed == ["plain-eager"]


def test_right_output_with_wrong_gradient_is_unverified(plant: Plant) -> None:
    def no_gradient_for_logits(logits: Tensor, *branches: Tensor) -> Tensor:
        out: Tensor = baseline.plain_select(logits, *branches)
        return out + 1e-2 * (logits - logits.detach()).sum()

    plant("sk_select", no_gradient_for_logits)
    result = contest.measure_case(small("sk_select", "train"), (REFERENCE,), CONDITIONS)
    assert result["ours-pytorch-eager"].status == "unverified"
    assert "gradient off by" in result["ours-pytorch-eager"].reason


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
    case = small("resnest_split_attention", "train")
    result = contest.measure_case(case, (EAGER,), CONDITIONS)["plain-eager"]
    assert result.status == "ok"
    assert result.grad_err_bound is not None
    assert result.grad_err_bound < 0.2


class _Magnified(nn.Module):
    """Averages that hardly differ from image to image, normalised over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalised(x.mean(dim=(2, 3)))

    @staticmethod
    def normalised(averages: Tensor) -> Tensor:
        return (averages - averages.mean(0)) / averages.std(0)


def test_what_magnifies_an_average_magnifies_what_a_sum_may_be_off() -> None:
    case = small("sk_conv", "infer")
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.01 * torch.randn(4, 16, 1, 1, generator=generator)
    x = x + 0.1 * torch.randn(4, 16, 64, 64, generator=generator)
    oracle = gate.consult(lambda case: _Magnified(), case, (x,), seed=0)
    total = torch.zeros(4, 16)
    for position in x.flatten(2).unbind(2):  # one after the other, as torch.compile may
        total += position
    out = _Magnified.normalised(total / 64**2)
    verdict = oracle.judge(Evaluation(out, {}))
    assert verdict.out_err > oracle.floor + 2 * oracle.plain_out_err
    assert verdict.passed
    forgotten = _Magnified.normalised(x.flatten(2)[..., 1:].mean(2))
    assert not oracle.judge(Evaluation(forgotten, {})).passed


@pytest.mark.parametrize("workload", ["sk_fuse", "sk_select", "sknet26"])
def test_what_hardly_magnifies_hardly_widens_the_bound(workload: str) -> None:
    case = small(workload, "infer")
    inputs = workloads.inputs(case, 0, CPU)

    def plain(case: Case) -> nn.Module:
        module = workloads.parameters(case, "plain", 0)
        return workloads.place_module(module, case, CPU)

    oracle = gate.consult(plain, case, inputs, seed=0)
    assert oracle.magnified < 0.3 * oracle.floor


def test_failing_provider_is_a_row_with_one_line_of_reason(plant: Plant) -> None:
    def fail(*branches: Tensor) -> Tensor:
        raise RuntimeError("first line\nsecond line")

    def out_of_memory(*branches: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    plant("sk_fuse", fail)
    plant("sk_select", out_of_memory)
    failed = contest.measure_case(small("sk_fuse", "infer"), (EAGER, REFERENCE), CONDITIONS)
    full = contest.measure_case(small("sk_select", "infer"), (EAGER, REFERENCE), CONDITIONS)
    assert (failed["ours-pytorch-eager"].status, failed["plain-eager"].status) == ("error", "ok")
    assert failed["ours-pytorch-eager"].reason == "RuntimeError: first line"
    assert (full["ours-pytorch-eager"].status, full["plain-eager"].status) == ("oom", "ok")


def test_provider_that_fails_while_timed_leaves_the_others(plant: Plant) -> None:
    calls = 0

    def fail_later(*inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise RuntimeError("tired")
        return baseline.plain_fuse(*inputs)

    plant("sk_fuse", fail_later)
    results = contest.measure_case(small("sk_fuse", "infer"), (EAGER, REFERENCE), CONDITIONS)
    assert results["ours-pytorch-eager"].reason == "RuntimeError: tired"
    assert results["plain-eager"].status == "ok"


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
    case = small(workload, mode, dtype=dtype, layout=layout)
    results = contest.measure_case(case, (EAGER, REFERENCE), CONDITIONS)
    for result in results.values():
        assert (result.status, result.reason) == ("ok", "")
        assert result.out_err is not None
        assert result.ms_p20 is not None
        assert result.ms_p50 is not None
        assert result.ms_p80 is not None
        assert 0 < result.ms_p20 <= result.ms_p50 <= result.ms_p80
        assert (result.grad_err is None) == (mode == "infer")
        assert (result.saved_mb is None) == (mode == "infer")
        assert (result.gbps is None) == (case.level != "op")
        assert (result.images_per_s is None) == (case.level == "op")


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
    def once(*branches: Tensor) -> Tensor:
        out: Tensor = _BackwardOnce.apply(*branches)  # type: ignore[no-untyped-call]
        return out

    plant("sk_fuse", once)
    results = contest.measure_case(small("sk_fuse", "bwd"), (EAGER, REFERENCE), CONDITIONS)
    assert (results["ours-pytorch-eager"].status, results["plain-eager"].status) == (
        "unsupported",
        "ok",
    )
    assert "backward through the graph a second time" in results["ours-pytorch-eager"].reason


def test_wrong_second_backward_is_unverified_in_bwd(plant: Plant) -> None:
    calls = 0

    def twice_as_much_again(dout: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return dout if calls == 1 else 2 * dout

    def hooked(*branches: Tensor) -> Tensor:
        out: Tensor = baseline.plain_fuse(*branches)
        if out.requires_grad:
            out.register_hook(twice_as_much_again)  # type: ignore[no-untyped-call]
        return out

    plant("sk_fuse", hooked)
    result = contest.measure_case(small("sk_fuse", "bwd"), (REFERENCE,), CONDITIONS)[
        "ours-pytorch-eager"
    ]
    assert result.status == "unverified"


def test_bwd_times_the_backward_pass_alone(plant: Plant) -> None:
    forwards = 0

    def counted(logits: Tensor, *branches: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        out: Tensor = baseline.plain_select(logits, *branches)
        return out

    plant("sk_select", counted)
    for seconds in (0.002, 0.05):
        contest.measure_case(
            small("sk_select", "bwd"), (REFERENCE,), replace(CONDITIONS, seconds=seconds)
        )
    # The graph that is judged and timed, and the count of what is saved, however long.
    assert forwards == 2 * 2


@pytest.mark.slow
def test_bwd_of_torch_compile_runs_again() -> None:
    results = contest.measure_case(
        small("sk_select", "bwd", batch=2), (PROVIDERS["plain-compile"],), CONDITIONS
    )
    assert (results["plain-compile"].status, results["plain-compile"].reason) == ("ok", "")


@pytest.mark.parametrize("name", ["plain-max-autotune", "ours-triton-cudagraph"])
def test_cuda_graphs_are_unsupported_in_bwd(name: str) -> None:
    reason = PROVIDERS[name].unavailable(small("sk_select", "bwd"), torch.device("cuda"))
    assert reason == "a CUDA graph replays one backward pass after each forward pass"


def test_backward_of_fuse_needs_no_bytes_and_has_no_bandwidth() -> None:
    result = contest.measure_case(small("sk_fuse", "bwd"), (EAGER,), CONDITIONS)["plain-eager"]
    assert (result.status, result.bytes_needed) == ("ok", 0)
    assert (result.gbps, result.pct_copy) == (None, None)


@pytest.mark.parametrize("M", [1, 3])
def test_gate_takes_other_numbers_of_branches(M: int) -> None:
    case = small("sk_select", "train", M=M)
    assert contest.measure_case(case, (REFERENCE,), CONDITIONS)["ours-pytorch-eager"].status == "ok"


@pytest.mark.parametrize(
    "case",
    [
        small("sk_conv", "train", batch=1),
        small("sk_fuse", "infer", dtype="tf32"),
        small("sk_fuse", "infer", dtype="autocast"),
        small("digits", "infer"),
        small("digits", "bwd"),
        small("sknet26", "bwd"),
        small("sk_unit", "bwd", batch=1),
    ],
)
def test_impossible_case_is_unsupported_with_a_reason(case: Case) -> None:
    result = contest.measure_case(case, (EAGER,), CONDITIONS)["plain-eager"]
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
    case = make_case("digits", "train", batch=64)
    result = contest.measure_case(case, (REFERENCE,), CONDITIONS)["ours-pytorch-eager"]
    assert result.status == "ok"
    assert result.accuracy is not None
    assert result.accuracy >= 0.97


@pytest.mark.parametrize(("mode", "passes"), [("infer", 1), ("train", 3), ("bwd", 2)])
def test_flops_are_those_of_the_published_network(mode: str, passes: int) -> None:
    case = make_case("sknet50", mode, batch=1, resolution=224)  # type: ignore[arg-type]
    module = workloads.parameters(case, "plain", seed=0).eval()
    inputs = workloads.inputs(case, 0, CPU)
    counted = measure.flops(module, inputs, case.mode)
    assert counted / 2 == pytest.approx(4.46e9 * passes, rel=0.005)


def test_a_copy_reads_and_writes_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    def four_ms(run: Callable[[], Tensor], device: torch.device, seconds: float) -> list[float]:
        copied.append(run().numel())
        return [4.0]

    monkeypatch.setattr(measure, "sample", four_ms)
    gbps = measure.copy_gbps.__wrapped__(torch.device("cpu"))
    (size,) = copied
    assert gbps == pytest.approx((size + size) / 4e-3 / 1e9)


def test_quantiles_leave_a_fifth_of_the_times_on_either_side() -> None:
    assert measure.quantiles([8.0, 0.0, 2.0, 4.0, 10.0, 6.0]) == pytest.approx((2.0, 5.0, 8.0))


def test_figures_follow_from_the_median_time() -> None:
    op, layer = small("sk_select", "infer"), small("sk_conv", "infer")
    of_op, of_layer = (
        contest.measure_case(case, (EAGER,), CONDITIONS)["plain-eager"] for case in (op, layer)
    )
    seconds = cast(float, of_op.ms_p50) / 1e3
    gbps = cast(float, of_op.bytes_needed) / seconds / 1e9
    assert of_op.gbps == pytest.approx(gbps)
    assert of_op.pct_copy == pytest.approx(100 * gbps / cast(float, of_op.copy_gbps))
    seconds = cast(float, of_layer.ms_p50) / 1e3
    assert of_layer.images_per_s == pytest.approx(layer.B / seconds)
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
