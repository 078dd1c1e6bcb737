"""Tuning: candidates are judged, timed and kept; without a GPU they are listed as modelled."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from perf.__main__ import main
from perf.commands import tune as command
from perf.rows import env
from perf.rows import schema as rows
from perf.rows.schema import Timing
from perf.rows.store import open_store
from perf.rows.typed_csv import values_of
from perf.static import trials
from perf.static.aot import Compiled, Resources
from perf.static.specialisations import LAYOUTS, Setting, chosen, inputs
from perf.static.trials import AnyConfig, AnyKernel, Given, Subject
from perf.sweep import measure, tuning
from perf.sweep.contest import BudgetSpentError, Conditions, DeviceLostError
from sknet_kernels import arguments, tuned
from sknet_kernels.arguments import configuration
from sknet_kernels.config import (
    FUSE,
    MOMENTS,
    SELECT,
    STREAMING_KERNELS,
    DeviceFacts,
    LaunchConfig,
    StreamingKernel,
)
from sknet_kernels.launch import Launch
from sknet_kernels.small import FUSE_COMBINE, LOGITS, SMALL_KERNELS
from tests.sweeps import CONDITIONS, CPU, ENV, Patch, Printed, refusal

H200 = DeviceFacts(multiprocessors=132, warp_size=32, name="NVIDIA H200")
FEW = DeviceFacts(multiprocessors=2, warp_size=32)
KERNELS: tuple[AnyKernel, ...] = (*STREAMING_KERNELS, *SMALL_KERNELS)


def small(*kernels: AnyKernel, layout: str = "contiguous") -> list[Subject]:
    setting = Setting(2, layout, torch.float32, (2, 8, 40), CPU)
    return [Subject(kernel, setting) for kernel in kernels]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: Patch) -> Iterator[Path]:
    """Where tables are, instead of in the package; nothing of it is remembered."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    (tmp_path / "tuned").mkdir()
    _forget()
    yield tmp_path / "tuned"
    _forget()


def _forget() -> None:
    tuned.table.cache_clear()
    arguments._configuration.cache_clear()


def described(launch: Launch) -> tuple[Any, ...]:
    return launch.programs, launch.constants, launch.options


def written(subject: Subject, config: AnyConfig, path: Path) -> None:
    problem, timing = subject.problem(H200), Timing(2.0, 1.0, 9, 1)
    row = values_of(problem, config, timing, ENV, kernel=subject.kernel.name)
    with open_store(path, resume=True, columns=rows.TUNED) as store:
        store.append([row])


# The table


def test_a_row_replaces_the_heuristics_on_its_device_and_problem_alone(folder: Path) -> None:
    subject, other = small(FUSE, SELECT)
    problem: Any = subject.problem(H200)
    heuristic = FUSE.heuristic(problem, H200)
    assert tuned.choice(FUSE, problem, H200) == heuristic
    config = LaunchConfig(4, 8, splits=3, num_warps=2, num_stages=4, access=2)
    written(subject, config, tuned.table_path(H200.name))
    assert tuned.choice(FUSE, problem, H200) == heuristic  # read once, before
    _forget()
    assert tuned.table_path(H200.name) == folder / "nvidia-h200.csv"
    assert tuned.choice(FUSE, problem, H200) == config
    cases: list[tuple[StreamingKernel, Any, DeviceFacts]] = [
        (SELECT, other.problem(H200), H200),
        (FUSE, dataclasses.replace(problem, B=3), H200),
        (FUSE, problem, dataclasses.replace(H200, name="NVIDIA H100")),
        (FUSE, problem, dataclasses.replace(H200, name="")),
    ]
    for kernel, given, device in cases:
        assert tuned.choice(kernel, given, device) == kernel.heuristic(given, device)


@pytest.mark.parametrize("kernel", [FUSE, *SMALL_KERNELS], ids=lambda kernel: kernel.name)
def test_the_launch_of_a_kernel_takes_what_the_table_has(kernel: AnyKernel) -> None:
    (subject,) = small(kernel)
    problem: Any = subject.problem(H200)
    first: Any = kernel.heuristic(problem, H200)
    config = dataclasses.replace(first, num_warps=max(1, first.num_warps // 2), block_c=16)
    assert described(subject.launch(None, H200)) == described(subject.launch(first, H200))
    written(subject, config, tuned.table_path(H200.name))
    _forget()
    assert described(subject.launch(None, H200)) == described(subject.launch(config, H200))
    assert described(subject.launch(config, H200)) != described(subject.launch(first, H200))


def test_a_line_that_is_still_written_is_no_row_and_a_damaged_one_is_named() -> None:
    path = tuned.table_path(H200.name)
    written(small(FUSE)[0], LaunchConfig(4, 8), path)
    _forget()
    with path.open("a") as file:
        file.write("sk_fuse,12")
    assert list(tuned.table(H200.name).values()) == [LaunchConfig(4, 8)]
    _forget()
    path.write_text(path.read_text().replace("False", "maybe"))
    _forget()
    with pytest.raises(ValueError, match=r"nvidia-h200\.csv:2: expected a problem and its launch"):
        tuned.table(H200.name)


# Judged and timed


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "kernel",
    [k if k in (SELECT, LOGITS) else pytest.param(k, marks=pytest.mark.slow) for k in KERNELS],
    ids=lambda kernel: kernel.name,
)
def test_every_candidate_of_every_kernel_is_right(kernel: AnyKernel) -> None:
    for layout in LAYOUTS if isinstance(kernel, StreamingKernel) else LAYOUTS[:1]:
        (subject,) = small(kernel, layout=layout)
        problem: Any = subject.problem(FEW)
        configs = kernel.candidates(problem, FEW)
        assert len(configs) >= (6 if isinstance(kernel, StreamingKernel) else 2)
        given = inputs(subject.setting)
        assert tuning.judged(subject, configs, given, CPU) == list(configs)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("whose", "fault"), [("heuristics", 1.0), ("candidate", 1.0), ("candidate", 4e-6)]
)
def test_what_is_wrong_is_refused_before_it_is_timed(
    whose: str, fault: float, monkeypatch: Patch, capsys: Printed
) -> None:
    subject = small(SELECT)[0]
    problem: Any = subject.problem(FEW)
    configs = SELECT.candidates(problem, FEW)[:3]
    bad = configs[0 if whose == "heuristics" else 1]
    run = Subject.run

    def wrong(subject: Subject, given: Given, config: AnyConfig) -> list[Tensor]:
        (out,) = run(subject, given, config)
        if config == bad:
            out[-1, -1, -1] += fault * out.abs().max()  # one element of many
        return [out]

    monkeypatch.setattr(Subject, "run", wrong)
    given = inputs(subject.setting)
    if whose == "heuristics":
        with pytest.raises(tuning.WrongError, match="result 0 off by"):
            tuning.judged(subject, configs, given, CPU)
    else:
        assert tuning.judged(subject, configs, given, CPU) == [configs[0], configs[2]]
        assert f"refused {bad}: result 0 off by" in capsys.readouterr().err


def test_the_choice_is_faster_beyond_the_noise() -> None:
    first, second = LaunchConfig(1, 1), LaunchConfig(2, 2)
    steady, wide = [0.98, 1.0, 1.02], [0.5, 0.9, 1.1]
    assert tuning.fastest({first: steady, second: wide}) == (first, 1.0, 1.0)
    chosen, *ms = tuning.fastest({first: steady, second: [0.89, 0.9, 0.91]})
    assert chosen == second
    assert ms == pytest.approx([1.0, 0.9])
    assert tuning.fastest({first: steady}) == (first, 1.0, 1.0)


def test_every_other_round_runs_backwards(monkeypatch: Patch) -> None:
    order: list[object] = []

    def sample(run: Any, *_: object) -> list[float]:
        order.append(run())
        return [1.0]

    two = [LaunchConfig(8, 8), LaunchConfig(8, 16)]
    monkeypatch.setattr(measure, "sample", sample)
    monkeypatch.setattr(tuning, "judged", lambda *_: two)
    monkeypatch.setattr(Subject, "prepared", lambda self, given, config: lambda: config)
    tuning.measured(small(FUSE)[0], dataclasses.replace(CONDITIONS, rounds=3))
    assert order == [*two, *two[::-1], *two]
    order.clear()
    runs = {"a": lambda: "a", "b": lambda: "b"}
    measure.interleaved(runs, lambda name: nullcontext(), CPU, 0.1, 3)
    assert order == [*"abbaab"]


@pytest.mark.interpreter
def test_small_kernels_join_as_many_parts_as_the_table_just_written_says(
    path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(measure, "sample", lambda run, device, seconds: [1.0, 1.0])
    pass_, joining = small(FUSE, FUSE_COMBINE)
    assert joining.problem(FEW).parts != 5  # type: ignore[union-attr]  # it is a small kernel
    written(pass_, LaunchConfig(8, 8, splits=5), path)
    with open_store(path, resume=True, columns=rows.TUNED) as store:
        for _ in range(2):  # the second finds its row
            assert tuning.tune([joining], store, CONDITIONS, budget=None) == "complete"
        assert tuning.unfinished([joining], store, CPU) == []
    table = rows.TUNED.read(path).set_index("kernel")
    assert table.loc["sk_fuse_combine"].parts == 5
    assert pd.isna(table.loc["sk_fuse_combine"].S)


@pytest.mark.slow
@pytest.mark.interpreter
def test_what_was_timed_stays_wherever_tuning_is_cut(path: Path, monkeypatch: Patch) -> None:
    chosen = small(FUSE, SELECT, MOMENTS)
    endings = iter([None, KeyboardInterrupt, None, BudgetSpentError, DeviceLostError("gone"), None])
    done: list[Subject] = []
    measured = tuning.measured

    def cut(subject: Subject, conditions: Conditions) -> tuple[AnyConfig, Timing]:
        ending = next(endings)
        if ending is not None:
            raise ending
        done.append(subject)
        return measured(subject, conditions)

    monkeypatch.setattr(tuning, "measured", cut)
    candidates = StreamingKernel.candidates
    monkeypatch.setattr(StreamingKernel, "candidates", lambda *_: candidates(*_)[:2])
    for expected, count in (("interrupt", 1), ("budget", 2), ("lost", 2), ("complete", 3)):
        with open_store(path, resume=True, columns=rows.TUNED) as store:
            assert tuning.tune(chosen, store, CONDITIONS, budget=None) == expected
        assert len(rows.TUNED.read(path)) == count
    assert done == chosen
    assert set(rows.TUNED.read(path).timed) == {2}


# The command


@pytest.mark.interpreter
def test_on_a_gpu_the_table_is_where_the_kernels_read_it(
    folder: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    # The interpreter on a CPU is taken for a GPU of that name.
    monkeypatch.setattr(command, "chosen_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(env, "gpu_name", lambda device: H200.name)
    monkeypatch.setattr(command, "Conditions", lambda device, *rest: Conditions(CPU, *rest))
    monkeypatch.setattr(tuning, "subjects", lambda kernels, *_, **__: small(*kernels))
    monkeypatch.setattr(measure, "sample", lambda run, device, seconds: [1.0, 1.0])
    folder.rmdir()  # there is none in a fresh copy
    arguments = ["tune", "--kernel", "sk_fuse"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "1 rows, 0 faster than the heuristics: 1.000 times as fast together; 0 of 1" in said
    assert said.splitlines()[-1] == str(folder / "nvidia-h200.csv")
    assert len(tuned.table(H200.name)) == 1
    assert "go on with it by --resume" in refusal(capsys, *arguments)
    assert main([*arguments, "--kernel", "sk_fuse", "sk_select_fwd", "--resume"]) == 0
    assert "2 rows" in capsys.readouterr().out


def test_what_moves_most_is_tuned_first() -> None:
    axes: dict[str, Any] = {"resolution": 224, "M": 2, "dtype": "bf16", "device": "meta"}
    chosen = tuning.subjects(KERNELS, ("nchw", "channels_last"), (1, 4), (32, 128), **axes)
    assert len(chosen) == (6 + 7) * 2 * 2 * 2
    moved = [subject.bytes_moved for subject in chosen]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] == 5 * 2 * 128 * 128 * 3136
    streaming = chosen[: 6 * 2 * 2 * 2]
    assert {subject.kernel for subject in streaming} == set(STREAMING_KERNELS)
    problems: list[Any] = [subject.problem(H200) for subject in streaming]
    assert {problem.layout for problem in problems} == {"rows", "shifted", "channels_last"}


def test_without_a_gpu_candidates_are_listed_in_their_modelled_order(
    monkeypatch: Patch, capsys: Printed, folder: Path
) -> None:
    compiled = Compiled(Resources(40, 0, 0, 0, 16, 16, tf32=False), "", None)
    vars(compiled)["sass"] = ""
    monkeypatch.setattr(trials, "compile_launch", lambda launch, target: compiled)
    arguments = ["tune", "--device", "cpu", "--kernel", "sk_fuse", "--batch", "32", "--stage", "2"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in refusal(capsys, *arguments)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("modelled, not measured")
    assert "sk_fuse contiguous bfloat16 M=2 [32, 256, 784]" in said
    assert "sk_fuse channels_last bfloat16 M=2 [32, 256, 784]" in said
    streaming, joining = (pd.DataFrame(trials.modelled(each)) for each in small(FUSE, LOGITS))
    assert streaming.tb_s.is_monotonic_decreasing
    assert joining.read_kb.is_monotonic_increasing
    assert streaming.heuristic.sum() == joining.heuristic.sum() == 1
    assert len(joining) > 1
    assert list(folder.iterdir()) == []


def test_a_choice_whose_launch_fails_is_forgotten() -> None:
    def fail() -> None:
        with chosen({FUSE: LaunchConfig(1, 16)}) as asked:
            configuration(FUSE, [torch.ones(2, 8, 16)] * 2)
            assert asked.keys() == {FUSE}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert arguments._configuration.cache_info().currsize == 0
