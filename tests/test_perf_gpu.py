"""What the harness does on a GPU, with CUDA's answers put in by stubs."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sknet_triton as skt
from perf.__main__ import main
from perf.commands import run as run_command
from perf.commands.options import chosen_device, read_report
from perf.peers import baseline
from perf.report import tables
from perf.rows import UsageError, env, schema
from perf.rows.schema import Case, Result
from perf.static.bytes import MEBI
from perf.sweep import contest, gate, measure, providers, sweep, workloads
from perf.sweep.contest import DeviceLostError
from perf.sweep.providers import PROVIDERS, Call, Provider, captured, evaluate, recorded, settings
from perf.sweep.sweep import Rank
from perf.sweep.workloads import make_case
from tests.sweeps import (
    CPU,
    OURS,
    PLAIN,
    Patch,
    Printed,
    make_up,
    measured,
    plant,
    refusal,
    small,
    stub_cuda,
    take_times,
)

GPU = torch.device("cuda", 0)
pytestmark = pytest.mark.usefixtures("one_thread")


# Switches


def test_cudnn_is_on_where_a_layer_is_timed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    (result,) = measured(small("sk_conv", "infer"), OURS)
    assert (result.cudnn, result.cudnn_benchmark, result.cudnn_deterministic) == (True, True, False)
    assert (result.cudnn_tf32, result.matmul_tf32) == (False, False)
    assert result.timed_threads == 1


def test_the_oracle_does_not_time_algorithms() -> None:
    seen: list[env.Switches] = []
    case, module = small("sk_fuse", "infer"), baseline.Function(baseline.plain_fuse)
    module.register_forward_pre_hook(lambda *_: seen.append(env.switches()))
    gate.consult(lambda case: module, case, workloads.inputs(case, 0, CPU), 0)
    assert {(now.cudnn, now.cudnn_benchmark) for now in seen} == {(True, False)}


@pytest.mark.parametrize(("dtype", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_tf32_is_what_the_dtype_says(dtype: str, tf32: bool) -> None:
    with settings(small("sk_conv", "infer", dtype=dtype)):
        now = env.switches()
    assert (now.cudnn_tf32, now.matmul_tf32) == (tf32, tf32)


def test_switches_are_read_while_timing_and_not_assumed(monkeypatch: Patch) -> None:
    @contextmanager
    def without_cudnn(case: Case) -> Iterator[None]:
        with settings(case), torch.backends.cudnn.flags(enabled=False):
            yield

    monkeypatch.setattr(contest, "settings", without_cudnn)
    (result,) = measured(small("sk_fuse", "infer"), PLAIN)
    assert (result.status, result.cudnn) == ("ok", False)


def test_switches_are_what_pytorch_says() -> None:
    before = env.switches()
    torch.set_num_threads(before.timed_threads + 1)
    torch.use_deterministic_algorithms(not before.deterministic)
    try:
        with torch.backends.cudnn.flags(
            enabled=not before.cudnn,
            benchmark=not before.cudnn_benchmark,
            deterministic=not before.cudnn_deterministic,
            allow_tf32=not before.cudnn_tf32,
        ):
            changed = env.switches()
    finally:
        torch.use_deterministic_algorithms(before.deterministic)
        torch.set_num_threads(before.timed_threads)
    kept = [name for name, value in asdict(before).items() if value == getattr(changed, name)]
    assert kept == ["matmul_tf32"]


# Networks are judged on a part of the batch


@pytest.mark.parametrize(
    ("workload", "mode", "batch", "judged"),
    [
        ("sknet50", "infer", 128, 8),
        ("sknet50", "train", 12, 6),
        ("sknet50", "train", 4, 4),
        ("sknet50", "train", 11, 11),
        ("sk_unit", "train", 128, 128),
        ("digits", "train", 64, 64),
    ],
)
def test_float64_sees_few_images_of_a_network(
    workload: str, mode: str, batch: int, judged: int
) -> None:
    case = make_case(workload, mode, batch=batch)  # type: ignore[arg-type]
    assert judged == workloads.judged(case).B
    assert workloads.judged(workloads.judged(case)) == workloads.judged(case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_network_is_judged_on_eight_images_once(monkeypatch: Patch, mode: str) -> None:
    consult = Mock(wraps=gate.consult)
    monkeypatch.setattr(gate, "consult", consult)
    results = measured(small("sknet26", mode, batch=16), PLAIN, OURS)
    ((_, judged, inputs, _),) = (call.args for call in consult.call_args_list)
    assert judged.B == len(inputs[0]) == 8
    for result in results:
        assert (result.status, result.reason, result.judged_batch) == ("ok", "", 8)


def test_a_fault_beyond_the_judged_images_is_seen(monkeypatch: Patch) -> None:
    spoil = baseline.Function(lambda out: torch.cat([out[:-1], 1.1 * out[-1:]]))
    wrong = nn.Sequential(skt.sknet26(), spoil)
    plant(monkeypatch, "sknet26", wrong, plain=lambda ours: baseline.with_plain_convs(ours[0]))
    (result,) = measured(small("sknet26", "infer", batch=16), OURS)
    assert result.status == "unverified"


def test_an_oracle_that_fails_is_asked_once(monkeypatch: Patch) -> None:
    consult = Mock(side_effect=torch.OutOfMemoryError("no room"))
    monkeypatch.setattr(gate, "consult", consult)
    for result in measured(small("sknet26", "infer", batch=16), PLAIN, OURS):
        assert result.status == "oom"
        assert result.reason == "the check of 8 images: OutOfMemoryError: no room"
    consult.assert_called_once()


# Graphs


class _Graph(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """A CUDA graph of CPU tensors: what is recorded runs again, on the tensors of then."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture
def graphs(monkeypatch: Patch) -> None:
    """Puts CUDA graphs and streams that work on CPU tensors in the place of CUDA's."""
    streams = {"Stream": Mock(), "current_stream": Mock()}  # there is one order on a CPU
    contexts = {"graph": lambda graph: graph, "stream": lambda stream: nullcontext()}
    stub_cuda(monkeypatch, CUDAGraph=_Graph, **streams, **contexts)


def call_of(case: Case) -> Call:
    module = workloads.parameters(case, "plain", seed=0)
    module = workloads.place_module(module, case, CPU)
    return Call(case, module, module, workloads.inputs(case, 0, CPU), 0)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("dtype", "out"), [("fp32", torch.float32), ("autocast", torch.bfloat16)])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_graph_replays_on_the_tensors_that_it_captured(
    mode: str, dtype: str, out: torch.dtype
) -> None:
    case = small("sk_conv", mode, dtype=dtype)
    call, plain = call_of(case), call_of(case)
    with settings(case):
        run = captured(call)
        addresses = [x.data_ptr() for x in call.inputs]
        for seed in (0, 1):
            if seed:
                call.load(workloads.inputs(case, seed, CPU), seed)
                plain.load(workloads.inputs(case, seed, CPU), seed)
            graphed, eager = evaluate(call, run), evaluate(plain, plain)
            assert eager.out.dtype == out
            torch.testing.assert_close(graphed.out, eager.out)
            for name, grad in eager.grads.items():
                torch.testing.assert_close(graphed.grads[name], grad)
    assert [x.data_ptr() for x in call.inputs] == addresses
    assert mode == "infer" or len(graphed.grads) > 1


@pytest.mark.parametrize(
    ("name", "mode", "how"),
    [
        ("plain-cudagraph", "", "captured"),
        ("ours-triton-cudagraph", "", "captured"),
        ("plain-reduce-overhead", "reduce-overhead", "recorded"),
        ("plain-max-autotune", "max-autotune", "recorded"),
        ("plain-max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs", "called"),
        ("plain-compile", None, "called"),
    ],
)
def test_what_a_provider_compiles_and_repeats(
    name: str, mode: str | None, how: str, monkeypatch: Patch
) -> None:
    provider, module = PROVIDERS[name], nn.ReLU()
    for graph in ("captured", "recorded"):
        monkeypatch.setattr(providers, graph, lambda call, graph=graph: graph)
    prepared: object = provider.prepared("called")  # type: ignore[arg-type]  # handed on
    assert prepared == how
    monkeypatch.setattr(torch, "compile", lambda module, **options: options["mode"])
    wrapped: object = provider.wrapped(module)
    assert wrapped == (module if mode == "" else mode)
    reason = provider.unavailable(small("sk_select", "bwd"), GPU)
    replays = "a CUDA graph replays one backward pass after each forward pass"
    assert reason == (None if how == "called" else replays)


def test_a_graph_has_no_peak_of_its_own(monkeypatch: Patch) -> None:
    monkeypatch.setattr(measure, "peak_memory_mb", lambda run, device: 3.0)
    case = small("sk_fuse", "infer")
    for graphed, peak in ((False, 3.0), (True, None)):
        monkeypatch.setattr(Provider, "graphed", graphed)
        assert measured(case, PLAIN)[0].peak_mb == peak


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_compiled_graph_is_told_that_inputs_stay(monkeypatch: Patch, mode: str) -> None:
    said: list[int] = []
    monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda x: said.append(x.data_ptr()))
    case = small("sk_select", mode)
    call = call_of(case)
    call.net = Mock(wraps=call.net)
    with settings(case):
        run = recorded(call)
        run()
        run()
    seen = [x.data_ptr() for called in call.net.call_args_list for x in called.args]
    assert seen == 2 * said


def test_the_timed_step_runs_on_the_judged_tensors(monkeypatch: Patch) -> None:
    seen: set[int] = set()

    def spy(*branches: Tensor) -> Tensor:
        seen.update(x.data_ptr() for x in branches)
        return baseline.plain_fuse(*branches)

    plant(monkeypatch, "sk_fuse", spy)
    case = small("sk_fuse", "train")
    assert measured(case, OURS)[0].status == "ok"
    assert len(seen) == case.M


# Clocks and counters


def test_two_times_a_call(monkeypatch: Patch) -> None:
    from triton import testing

    now = 0.0
    did: list[str] = []

    def run() -> None:
        nonlocal now
        now += 1e-3
        did.append("call")

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append("wait"))
    monkeypatch.setattr(testing, "do_bench", lambda *_, **__: [0.25, 0.25])
    taken, _ = measure.interleaved({"a": run}, lambda name: nullcontext(), GPU, 0.1, 2)
    times = taken["a"]
    assert times.ms == [0.25] * 4
    assert times.call_ms == pytest.approx([1.0] * len(times.call_ms))
    assert len(times.call_ms) == 2 * measure.MIN_BLOCKS
    # The host waits for the GPU at both ends of a block, and not between its calls.
    block = ["wait", *["call"] * 16, "wait"]
    assert did[-len(block) :] == block


def test_only_a_first_call_that_compiles_has_its_time_in_the_row(monkeypatch: Patch) -> None:
    clock = itertools.count(step=2.5)
    monkeypatch.setattr(contest, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    results = measured(small("sk_fuse", "infer"), PLAIN, replace(PLAIN, wrap="compile"))
    assert [result.compile_s for result in results] == [None, 2.5]


@pytest.mark.parametrize(("batch", "ms"), [(8, 4.0), (16, 2.0)])
def test_small_batches_are_judged_from_call_to_call(
    monkeypatch: Patch, path: Path, batch: int, ms: float
) -> None:
    take_times(monkeypatch, [1.0, 2.0, 3.0], [4.0])
    run = ["run", "--preset", "gpu-conv", "--layout", "nchw", "--mode", "infer", "--device", "cpu"]
    size = ["--batch", str(batch), "--resolution", "32", "--stage", "1"]
    assert main([*run, *size, "--provider", PLAIN.name, "--out", str(path)]) == 0
    shown = read_report(path)
    assert shown.ms_p50.tolist() == [ms]
    assert shown.images_per_s.tolist() == pytest.approx([1e3 * batch / ms], rel=1e-3)
    row = schema.read(path).loc[0]
    assert (row.ms_p50, row.call_ms_p50, row.n) == (2.0, 4.0, 3)
    assert ("from call to call" in tables.table(schema.read(path))) == (ms == 4.0)


def test_launches_are_counted_once_a_provider(monkeypatch: Patch) -> None:
    monkeypatch.setattr(measure, "launches", Mock(side_effect=[7, 8]))
    results = measured(small("sk_fuse", "infer"), PLAIN, OURS)
    assert [result.launches for result in results] == [7, 8]


def test_what_a_profile_counts_as_a_launch(monkeypatch: Patch) -> None:
    kinds = [SimpleNamespace(name=name) for name in ("CUDA", "CPU", "CUDA")]
    profiler = SimpleNamespace(events=lambda: [SimpleNamespace(device_type=kind) for kind in kinds])
    monkeypatch.setattr(measure, "profile", lambda activities: nullcontext(profiler))
    stub_cuda(monkeypatch, synchronize=Mock())
    assert measure.launches(lambda: None, GPU) == 2
    assert measure.launches(lambda: None, CPU) is None


def test_peak_memory_is_the_steps_own(monkeypatch: Patch) -> None:
    peaks = [9 * MEBI]
    stub_cuda(
        monkeypatch,
        synchronize=Mock(),
        memory_allocated=lambda device: 5 * MEBI,
        reset_peak_memory_stats=lambda device: peaks.append(5 * MEBI),
        max_memory_allocated=lambda device: peaks[-1],
    )
    assert measure.peak_memory_mb(lambda: peaks.append(peaks[-1] + 3 * MEBI), GPU) == 3.0


# A device that is lost


def test_an_error_that_stays_is_no_row(monkeypatch: Patch) -> None:
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    stub_cuda(monkeypatch, synchronize=Mock(side_effect=error))
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        contest.failure(error, GPU)
    assert contest.failure(error, CPU).status == "error"
    # The first call tells of an error that is over with it.
    stub_cuda(monkeypatch, synchronize=Mock(side_effect=[error, None]))
    assert contest.failure(error, GPU).status == "error"


def test_a_lost_device_ends_the_run_with_its_rows_safe(
    monkeypatch: Patch, path: Path, capsys: Printed
) -> None:
    made_up = make_up(monkeypatch)

    def lose(case: Case, *rest: Any) -> dict[str, Result]:
        if len(made_up.asked) == 2:
            raise DeviceLostError("an illegal memory access")
        return made_up(case, *rest)

    run = ["run", "--level", "op", "--batch", "1:2:1", "--provider", PLAIN.name, f"--out={path}"]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "measure_case", lose)
        assert main(run) == 1
    assert "the device is lost: an illegal memory access" in capsys.readouterr().err
    assert len(schema.read(path)) == 2
    assert main([*run, "--resume"]) == 0
    assert len(schema.read(path)) == len(made_up.asked) == len(set(made_up.asked))


def test_a_check_says_that_the_device_is_lost(monkeypatch: Patch, capsys: Printed) -> None:
    lost = Mock(side_effect=DeviceLostError("an illegal memory access"))
    monkeypatch.setattr(run_command, "judge_case", lost)
    assert main(["check", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.endswith(": the device is lost: an illegal memory access\n")
    assert said.count("\n") == 1


def test_a_sweep_takes_its_own_gpu(monkeypatch: Patch) -> None:
    second, take = torch.device("cuda", 1), Mock()
    stub_cuda(monkeypatch, set_device=take)
    assert sweep.in_turn([], second, budget=None) == "complete"
    take.assert_called_once_with(second)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_port_computes_what_the_plain_modules_compute(mode: str) -> None:
    assert measured(small("sknet26", mode), PROVIDERS["port-eager"])[0].status == "ok"


# The environment

ANSWERS = """#!/bin/sh
case "$*" in
*--id=GPU-0123-45*clocks.sm*) {clock} ;;
*--id=*) exit 6 ;;
*driver_version*) {driver} ;;
esac
"""


@pytest.mark.parametrize(
    ("clock", "driver", "expected"),
    [
        ("echo 1980", "echo 580.1", (1980, "580.1")),
        ("echo '[N/A]'", "echo '[N/A]'", (0, "")),
        ("echo '[Not Supported]'", "printf '580.1\\n580.1\\n'", (0, "580.1")),
        ("echo 'No devices were found'; exit 6", "echo 580.1", (0, "580.1")),
        ("echo No devices were found", "echo 580.1", (0, "580.1")),
        ("exec sleep 60", "exec sleep 60", (0, "")),
    ],
    ids=["a GPU", "not available", "several GPUs", "MIG", "MIG without a status", "it hangs"],
)
def test_what_nvidia_smi_answers(
    monkeypatch: Patch, tmp_path: Path, clock: str, driver: str, expected: tuple[int, str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(ANSWERS.format(clock=clock, driver=driver))
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    stub_cuda(
        monkeypatch,
        get_device_properties=lambda device: SimpleNamespace(uuid="0123-45"),
        get_device_name=lambda device: "NVIDIA H100 MIG 1g.10gb",
    )
    monkeypatch.setattr(env, "_driver", env._driver.__wrapped__)
    monkeypatch.setattr(env, "ANSWER_SECONDS", 1.0)
    start = time.monotonic()
    now = env.snapshot(GPU, seed=0, ranks=1)
    assert time.monotonic() - start < 30
    assert (now.sm_clock_mhz, now.driver) == expected
    assert now.gpu == "NVIDIA H100 MIG 1g.10gb"


def test_a_copy_without_git_has_the_commit_of_its_variable(
    monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.setattr(env, "_git_state", env._git_state.__wrapped__)
    monkeypatch.setattr(env, "CHECKOUT", tmp_path)
    monkeypatch.setenv(env.COMMIT_VARIABLE, "abc123")
    now = env.snapshot(CPU, 0, 1)
    assert (now.git_sha, now.git_dirty) == ("abc123", False)


# What a GPU alone does


def test_a_copy_on_a_gpu_is_large_and_timed_by_events(monkeypatch: Patch) -> None:
    from triton import testing

    def bench(run: Callable[[], object], **_: object) -> list[float]:
        run()
        return [1e-3]

    assert measure.COPY_BYTES["cuda"] >= 512 * MEBI
    monkeypatch.setitem(measure.COPY_BYTES, "cuda", MEBI)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, dtype=torch.uint8))
    monkeypatch.setattr(testing, "do_bench", bench)
    gbps = measure.copy_gbps.__wrapped__(GPU)
    assert gbps == pytest.approx(2 * MEBI / 1e-3 / 1e6, rel=1e-5)


def test_memory_is_given_back_after_running_out(monkeypatch: Patch) -> None:
    empty_cache = Mock()
    stub_cuda(monkeypatch, synchronize=Mock(), empty_cache=empty_cache)
    assert contest.failure(torch.OutOfMemoryError("no room"), GPU).status == "oom"
    empty_cache.assert_called_once_with()


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch: Patch) -> None:
    stub_cuda(monkeypatch, is_available=lambda: True, device_count=lambda: 2)
    second = Rank(index=1, local=1, count=2)
    assert chosen_device(None, second) == chosen_device("cuda", second) == torch.device("cuda", 1)
    assert chosen_device("cpu", second) == CPU
    expected = "LOCAL_RANK: expected less than the number of GPUs, which is 2, got 2"
    with pytest.raises(UsageError, match=expected):
        chosen_device(None, Rank(index=2, local=2, count=3))


def test_a_gpu_that_is_not_there_is_one_line(capsys: Printed) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command in ("run", "check", "campaign"):
        said = refusal(capsys, command, "--device", "cuda", silent=False)
        assert "--device: there is no GPU" in said
