"""The run command: what it selects, writes, refuses and says."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf.__main__ import BROKEN_PIPE, main
from perf.rows import schema
from perf.rows.schema import Case, Result
from perf.sweep import sweep, workloads
from perf.sweep.contest import Conditions
from perf.sweep.presets import PRESETS, Grid, jobs
from perf.sweep.providers import PROVIDERS, Provider
from perf.sweep.workloads import make_case, stage_shape
from tests.helpers import ROOT
from tests.sweeps import Patch, Printed, make_up, perf, refusal

PERF = [sys.executable, "-m", "perf"]
TINY = ["run", "--level", "op", "--batch", "2", "--resolution", "32", "--mode", "infer"]
UNCOMPILED = ["--provider", "plain-eager", "ours-pytorch-eager", "ours-triton-eager"]


@pytest.fixture
def instant(monkeypatch: Patch) -> list[Case]:
    """Replaces measuring by made-up rows and returns the list of cases that were asked for."""
    return make_up(monkeypatch).asked


@pytest.mark.usefixtures("one_thread")
def test_a_small_sweep_end_to_end(tmp_path: Path, capsys: Printed) -> None:
    out = tmp_path / "a.csv"
    assert main([*TINY, *UNCOMPILED, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[-1] == str(out)
    assert "\r" not in said.out
    assert "unsupported: ours-triton-eager (3 rows)" in said.out
    frame = schema.read(out)
    assert set(zip(frame.workload, frame.provider, strict=True)) == {
        (workload, provider)
        for workload in ("sk_fuse", "sk_select", "sk_fuse_select")
        for provider in ("plain-eager", "ours-pytorch-eager", "ours-triton-eager")
    }
    measured = frame[frame.status == "ok"]
    assert len(measured) == 6
    assert (measured.out_err <= measured.out_err_bound).all()
    assert (measured.bytes_needed > 0).all()
    assert (frame.torch != "").all()


@pytest.mark.slow
def test_interrupted_sweep_keeps_its_rows_and_says_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    command = [*PERF, "run", "--level", "op", "--batch", "1:64:1"]
    process = subprocess.Popen(
        [*command, *UNCOMPILED, "--resolution", "32", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores the signal, and its children would as well.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not (out.exists() and out.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == ""
    rows = len(schema.read(out))
    assert f"interrupted: {rows} of 1152 rows done; missing" in stdout
    assert stdout.splitlines()[-1] == str(out)


def test_default_report_is_named_after_its_environment_and_not_overwritten(
    instant: list[Case], tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--level", "op"]) == 0
    (report,) = tmp_path.iterdir()
    assert report.name.startswith("perf-quick-op-")
    assert "torch2" in report.name
    before = report.read_bytes()
    assert "--resume" in refusal(capsys, "run", "--level", "op")
    assert report.read_bytes() == before


def test_resume_measures_only_what_is_missing(instant: list[Case], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "a.csv")]
    assert main([*TINY, "--provider", "plain-eager", *out]) == 0
    first = list(instant)
    assert main([*TINY, "--provider", "plain-eager", *out, "--resume"]) == 0
    assert instant == first
    assert main([*TINY, "--provider", "plain-eager", "ours-pytorch-eager", *out, "--resume"]) == 0
    assert sorted(map(str, instant[len(first) :])) == sorted(map(str, first))
    frame = schema.read(tmp_path / "a.csv")
    assert not frame.duplicated(list(schema.KEY_COLUMNS)).any()
    assert len(frame) == 2 * len(first)


def test_budget_ends_in_the_middle_of_a_case_and_says_what_is_missing(
    monkeypatch: Patch, tmp_path: Path, capsys: Printed
) -> None:
    asked: list[Case] = []

    def slow(
        case: Case, providers: tuple[Provider, ...], conditions: Conditions
    ) -> dict[str, Result]:
        asked.append(case)
        time.sleep(0 if len(asked) <= 3 else 30)
        return {provider.name: Result("ok", ms_p50=1.0) for provider in providers}

    monkeypatch.setattr(sweep, "measure_case", slow)
    start = time.perf_counter()
    grid = ["--batch", "1", "--stage", "1", "2", "--mode", "infer"]
    out = tmp_path / "a.csv"
    arguments = ["run", "--level", "op", *grid, "--provider", "plain-eager", "--out", str(out)]
    assert main([*arguments, "--budget", "1"]) == 0
    assert time.perf_counter() - start < 20
    assert "the budget is spent: 3 of 6 rows done; missing" in capsys.readouterr().out
    assert len(schema.read(out)) == 3


def test_flags_replace_an_axis_of_the_preset(instant: list[Case], tmp_path: Path) -> None:
    arguments = ["--level", "layer", "model", "--batch", "2:6:2", "--dtype", "bf16", "fp32"]
    assert main(["run", *arguments, "--out", str(tmp_path / "a.csv")]) == 0
    assert {case.level for case in instant} == {"layer", "model"}
    assert {case.B for case in instant} == {2, 4, 6}
    assert {case.dtype for case in instant} == {"bf16", "fp32"}


def test_a_workload_is_picked_from_the_preset(instant: list[Case], tmp_path: Path) -> None:
    chosen = ["--preset", "family", "--workload", "mirnet_skff", "cycle_mlp", "--mode", "train"]
    assert main(["run", *chosen, "--out", str(tmp_path / "a.csv")]) == 0
    assert {case.workload for case in instant} == {"mirnet_skff", "cycle_mlp"}
    assert {case.level for case in instant} == {"family"}
    assert {case.layout for case in instant} == {"nchw", "channels_last"}
    assert {case.resolution for case in instant} == {128, 224}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_providers_that_exist_and_each_case_once(name: str) -> None:
    todo = jobs(PRESETS[name].grids, seed=0)
    assert len({job.case for job in todo}) == len(todo)
    for job in todo:
        assert set(job.providers) <= set(PROVIDERS)
        assert len(set(job.providers)) == len(job.providers)


def test_order_is_shuffled_by_the_seed_within_a_grid_only() -> None:
    grids = (Grid(("sk_fuse",), batches=tuple(range(1, 20))), Grid(("sk_conv",)))
    first, again, other = jobs(grids, 0), jobs(grids, 0), jobs(grids, 1)
    assert first == again
    assert first != other
    assert set(first) == set(other)
    assert [job.case.level for job in first] == ["op"] * 38 + ["layer"] * 2


def test_stage_shapes_are_those_of_the_network() -> None:
    at_224 = [stage_shape(stage, 224) for stage in (1, 2, 3, 4)]
    assert at_224 == [(128, 56), (256, 28), (512, 14), (1024, 7)]
    assert stage_shape(4, 33) == (1024, 2)
    assert make_case("sk_conv", "infer", resolution=64, stage=2).H == 8


@pytest.mark.parametrize(
    ("workload", "infer", "train", "bwd"),
    [("sk_fuse", 3, 3, 0), ("sk_select", 4, 11, 7), ("sk_fuse_select", 7, 21, 11)],
)
def test_ops_need_the_passes_of_the_mathematics(
    workload: str, infer: int, train: int, bwd: int
) -> None:
    one_pass = 2 * 128 * 8 * 8 * 2
    for mode, passes in (("infer", infer), ("train", train), ("bwd", bwd)):
        case = make_case(workload, mode, M=3, dtype="bf16", batch=2, resolution=32)  # type: ignore[arg-type]
        assert workloads.bytes_needed(case) == passes * one_pass


@pytest.mark.slow
def test_closed_pipe_ends_without_a_traceback(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    read, write = os.pipe()
    os.close(read)
    done = perf("perf", *TINY, "--provider", "plain-eager", "--out", str(out), stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")
    assert len(schema.read(out)) == 3


def test_help_and_env_work(capsys: Printed) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])
    assert stopped.value.code == 0
    assert "--budget" in capsys.readouterr().out
    assert main(["env"]) == 0
    assert "git_sha" in capsys.readouterr().out
