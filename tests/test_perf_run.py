"""The run command: what it selects, writes and says; a mistake is one line and exit status 2."""

import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest

from perf.__main__ import BROKEN_PIPE, SOFTWARE_ERROR, main
from perf.rows import schema
from perf.sweep import sweep
from perf.sweep.presets import PRESETS, Grid, jobs
from perf.sweep.providers import PROVIDERS
from perf.sweep.workloads import make_case, stage_shape
from tests.helpers import ROOT
from tests.sweeps import (
    REPORTS,
    TINY,
    MadeUp,
    Patch,
    Printed,
    in_a_process,
    lines_in,
    make_up,
    refusal,
    state,
    wait_for,
)

UNCOMPILED = ["--provider", "plain-eager", "ours-pytorch-eager", "ours-triton-eager"]


@pytest.fixture
def made_up(monkeypatch: Patch) -> MadeUp:
    """Replaces measuring by rows that are made up."""
    return make_up(monkeypatch)


@pytest.mark.usefixtures("one_thread")
def test_a_small_sweep_end_to_end(path: Path, capsys: Printed) -> None:
    assert main([*TINY, *UNCOMPILED, "--out", str(path)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[-1] == str(path)
    assert "\r" not in said.out
    assert "unsupported: ours-triton-eager (3 rows)" in said.out
    frame = schema.read(path)
    workloads_of_ops = ("sk_fuse", "sk_select", "sk_fuse_select")
    every = set(itertools.product(workloads_of_ops, UNCOMPILED[1:]))
    assert set(zip(frame.workload, frame.provider, strict=True)) == every
    measured = frame[frame.status == "ok"]
    assert len(measured) == 6
    assert (measured.out_err <= measured.out_err_bound).all()
    assert (measured.bytes_needed > 0).all()
    assert (frame.torch != "").all()


@pytest.mark.slow
def test_interrupted_sweep_keeps_its_rows_and_says_what_is_missing(path: Path) -> None:
    run = ["run", "--level", "op", "--batch", "1:64:1", *UNCOMPILED]
    process = subprocess.Popen(
        [sys.executable, "-m", "perf", *run, "--out", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores the signal, and its children would as well.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: lines_in(path) > 3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == ""
    rows = len(schema.read(path))
    assert f"interrupted: {rows} of 1152 rows done; missing" in stdout
    assert stdout.splitlines()[-1] == str(path)


def test_default_report_is_named_after_its_environment_and_not_overwritten(
    made_up: MadeUp, tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--level", "op"]) == 0
    (report,) = tmp_path.iterdir()
    assert report.name.startswith("perf-quick-op-")
    assert "torch2" in report.name
    before = report.read_bytes()
    assert "--resume" in refusal(capsys, "run", "--level", "op")
    assert report.read_bytes() == before


def test_resume_measures_only_what_is_missing(made_up: MadeUp, path: Path) -> None:
    run = [*TINY, "--out", str(path), "--provider", "plain-eager"]
    assert main(run) == 0
    first = list(made_up.asked)
    assert main([*run, "--resume"]) == 0
    assert made_up.asked == first
    assert main([*run, "ours-pytorch-eager", "--resume"]) == 0
    assert sorted(map(str, made_up.asked[len(first) :])) == sorted(map(str, first))
    assert len(schema.read(path)) == 2 * len(first)


def test_budget_ends_in_the_middle_of_a_case_and_says_what_is_missing(
    made_up: MadeUp, path: Path, capsys: Printed
) -> None:
    made_up.most = 3
    start = time.perf_counter()
    grid = ["--batch", "1", "--stage", "1", "2", "--mode", "infer", "--provider", "plain-eager"]
    assert main(["run", "--level", "op", *grid, "--out", str(path), "--budget", "1"]) == 0
    assert time.perf_counter() - start < 20
    assert "the budget is spent: 3 of 6 rows done; missing" in capsys.readouterr().out
    assert len(schema.read(path)) == 3


def test_a_case_that_the_budget_cuts_ends_the_sweep_with_what_is_ready(
    made_up: MadeUp, monkeypatch: Patch, path: Path, capsys: Printed
) -> None:
    monkeypatch.setattr(sweep, "measure_case", lambda case, two, *_: made_up(case, two[:1], *_))
    assert main([*TINY, *UNCOMPILED[:3], "--out", str(path)]) == 0
    assert "the budget is spent: 1 of 6 rows done; missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "axes"),
    [
        (
            "--level layer model --batch 2:6:2 --dtype bf16 fp32",
            {"level": {"layer", "model"}, "B": {2, 4, 6}, "dtype": {"bf16", "fp32"}},
        ),
        (
            "--preset family --workload mirnet_skff cycle_mlp --mode train",
            {
                "workload": {"mirnet_skff", "cycle_mlp"},
                "level": {"family"},
                "mode": {"train"},
                "layout": {"nchw", "channels_last"},
                "resolution": {128, 224},
            },
        ),
    ],
)
def test_flags_pick_from_the_preset_or_replace_its_axes(
    arguments: str, axes: dict[str, set[object]], made_up: MadeUp, path: Path
) -> None:
    assert main(["run", *arguments.split(), "--out", str(path)]) == 0
    assert {name: {getattr(case, name) for case in made_up.asked} for name in axes} == axes


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


@pytest.mark.slow
def test_closed_pipe_ends_without_a_traceback(path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = in_a_process("perf", *TINY, "--provider=plain-eager", f"--out={path}", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")
    assert len(schema.read(path)) == 3


def test_help_and_env_work(capsys: Printed) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])
    assert stopped.value.code == 0
    assert "--budget" in capsys.readouterr().out
    assert main(["env"]) == 0
    assert "git_sha" in capsys.readouterr().out


# Mistakes, before anything is measured or written

REPORT = REPORTS / "perf-op-train-compiled-cpu-torch2.13.0.csv"
Refused = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A folder to stand in, with a file, a folder, a pipe and links to nowhere in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.csv").write_text("mine\n")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling.csv").symlink_to("gone/away.csv")
    (tmp_path / "circle.csv").symlink_to("circle.csv")
    return tmp_path


@pytest.fixture
def refused(folder: Path, made_up: MadeUp, capsys: Printed) -> Refused:
    """Runs a command that is to be refused, and returns its one line."""

    def run(*arguments: str) -> str:
        before = state(folder)
        said = refusal(capsys, *arguments)
        assert made_up.asked == []
        assert state(folder) == before
        return said

    return run


OUTS = {
    "folder": "folder is a folder",
    ".": ". is a folder",
    "": ". is a folder",
    "..": ".. is a folder",
    "/": "/ is a folder",
    "folder/": "folder is a folder",
    "nowhere/a.csv": "No such file or directory",
    "file.csv/a.csv": "Not a directory",
    "file.csv": "file.csv exists",
    "dangling.csv": "dangling.csv exists",
    "circle.csv": "circle.csv exists",
    "/proc/a.csv": "/proc/a.csv cannot be written",
    "/dev/null": "/dev/null exists",
    "pipe": "pipe exists",
    "x" * 300: "File name too long",
}
RESUMED = {
    **OUTS,
    "file.csv": "file.csv:1: not the columns of this version",
    "dangling.csv": "No such file or directory",
    "circle.csv": "Too many levels of symbolic links",
    "/dev/null": "/dev/null is no regular file",
    "pipe": "pipe is no regular file",
}


@pytest.mark.parametrize("out", OUTS)
def test_run_says_where_it_cannot_write(out: str, refused: Refused) -> None:
    assert OUTS[out] in refused("run", "--level", "op", f"--out={out}")
    assert RESUMED[out] in refused("run", "--level", "op", f"--out={out}", "--resume")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", str(2**63)], f"'{2**63}' is not a whole number from 0 to 4,294,967,295"),
        (["--seed", "-1"], "'-1' is not a whole number from 0"),
        (["--seed", "9" * 5000], "is not a whole number from 0"),
        (["--threads", "0"], "'0' is not a whole number from 1"),
        (["--threads", str(10**12)], "is not a whole number from 1 to"),
        (["--batch", "1:1000000000:1"], "'1000000000' is not a whole number from 1 to"),
        (["--batch", "1:1000000:1"], "--batch: 1,000,000 values"),
        (["--resolution", "1:1000000:1"], "--resolution: 1,000,000 values"),
        (["--branches", "1:1000000:1"], "--branches: 1,000,000 values"),
        (["--batch", *["1:20000:1"] * 5], "--batch: 100,000 values"),
        (["--batch", "1:900:1", "--resolution", "1:900:1"], "cases are more than the 10,000"),
        (["--batch", "1:2:0"], "'0' is not a whole number from 1"),
        (["--batch", "8:1:1"], "range '8:1:1' is empty"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--workload", "sk_conv"], "the preset quick has no sk_conv cases"),
        (["--batch", "1:2"], "'1:2' is neither a positive number nor a range"),
        (["--batch", "٣x"], "is neither a positive number nor a range"),
        (["--batch", ""], "'' is neither a positive number nor a range"),
        (["--budget", "nan"], "'nan' is not a positive number of seconds"),
        (["--budget", "inf"], "'inf' is not a positive number of seconds"),
        (["--budget", "soon"], "'soon' is not a positive number of seconds"),
        (["--stage", "0"], "invalid choice: 0"),
        (["--provider", "eager"], "invalid choice: 'eager'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--what"], "unrecognized arguments: --what"),
        (["--new\nline"], "unrecognized arguments: --new\\nline"),
    ],
)
def test_run_says_what_it_cannot_take(arguments: list[str], said: str, refused: Refused) -> None:
    assert said in refused("run", "--level", "op", *arguments)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ("RANK=one", "RANK: expected a whole number, got 'one'"),
        ("RANK=-1", "RANK: expected a whole number, got '-1'"),
        ("RANK= WORLD_SIZE=2", "RANK: expected a whole number, got ''"),
        ("WORLD_SIZE=0", "RANK: expected less than WORLD_SIZE, which is 0, got 0"),
        ("RANK=2 WORLD_SIZE=2", "RANK: expected less than WORLD_SIZE, which is 2, got 2"),
        ("LOCAL_RANK=0x1", "LOCAL_RANK: expected a whole number, got '0x1'"),
        ("RANK=1 WORLD_SIZE=2", "rank 1 of 2 (RANK, WORLD_SIZE) met no others"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=0", "rank 0 of 2"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=port", "rank 0 of 2"),
    ],
)
def test_ranks_that_are_none_and_ranks_that_never_come(
    environment: str, said: str, refused: Refused, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(sweep, "PATIENCE", timedelta(seconds=1))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for pair in environment.split():
        monkeypatch.setenv(*pair.split("="))
    start = time.monotonic()
    assert said in refused("run", "--level", "op", "--out", "a.csv")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("arguments", "interpret", "said"),
    [
        (["traffic", "--shape", "1", "8", "4", "4"], "1", "--shape: expected B >= 2"),
        (["kernels"], "1", "TRITON_INTERPRET: kernels cannot be compiled where it is 1"),
        (["host", "--rounds", "1"], "0", "'1' is not a whole number from 2 to 10,000"),
        (["host", "--rounds", str(10**9)], "0", "is not a whole number from 2 to 10,000"),
        (["check", "--seed", str(2**32)], "1", "is not a whole number from 0 to 4,294,967,295"),
        (["host"], "1", "TRITON_INTERPRET: nothing is launched where it is 1; unset it"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_other_commands_say_what_they_cannot_take(
    arguments: list[str], interpret: str, said: str, refused: Refused, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert said in refused(*arguments)


# Reports that are damaged

LINES = REPORT.read_bytes().splitlines(keepends=True)
WHOLE = b"".join(LINES)


def third(line: bytes, *rest: bytes) -> bytes:
    """Returns the report with other lines in the place of its third."""
    return b"".join([*LINES[:2], line, *rest, *LINES[3:]])


def cell(column: str, text: str) -> bytes:
    """Returns the report with another cell in its third line."""
    names = LINES[0].decode().rstrip("\n").split(",")
    cells = LINES[2].rstrip(b"\n").split(b",")
    assert len(cells) == len(names)
    cells[names.index(column)] = text.encode()
    return third(b",".join(cells) + b"\n")


def header(old: bytes, new: bytes) -> bytes:
    return b"".join([LINES[0].replace(old, new), *LINES[1:]])


DAMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ":1: the file is empty"),
    "UTF-16": (WHOLE.decode().encode("utf-16"), ":1: not UTF-8"),
    "UTF-16 without mark": (WHOLE.decode().encode("utf-16-le"), ":1: not the columns"),
    "UTF-8 with mark": (b"\xef\xbb\xbf" + WHOLE, ":1: not the columns"),
    "compressed": (b"\x1f\x8b\x08\x00" + bytes(range(256)), ":1: not UTF-8"),
    "zeros": (bytes(100), ":1: the line is cut off"),
    "cut in the header": (WHOLE[:20], ":1: the line is cut off"),
    "cut by a byte": (WHOLE[:-1], ": the line is cut off"),
    "cut and gone on": (third(LINES[2][:40] + LINES[3]), ":3: expected"),
    "missing field": (third(LINES[2].partition(b",")[2]), ":3: expected"),
    "further field": (third(b"x," + LINES[2]), ":3: expected"),
    "empty line": (third(b"\n", LINES[2]), ":3: expected"),
    "twice the header": (third(LINES[0], LINES[2]), ":3: level: expected one of"),
    "twice a row": (third(LINES[2], LINES[1]), ":4: the same key as in line 2"),
    "quoted comma": (cell("ms_p50", '"1,5"'), ":3: ms_p50: expected a number, got '1,5'"),
    "unit": (cell("ms_p50", "1.5 ms"), ":3: ms_p50: expected a number"),
    "missing time": (cell("ms_p50", ""), ":3: ms_p50: expected a time"),
    "missing spread": (cell("ms_p20", ""), ":3: ms_p20: expected a time"),
    "time of NaN": (cell("ms_p50", "nan"), ":3: ms_p50: expected a time"),
    "infinite time": (cell("ms_p80", "inf"), ":3: ms_p80: expected a time"),
    "time below zero": (cell("ms_p50", "-1"), ":3: ms_p50: expected a time"),
    "no time": (cell("ms_p50", "0"), ":3: ms_p50: expected a time"),
    "fraction": (cell("B", "8.0"), ":3: B: expected a whole number"),
    "64 bits": (cell("B", str(2**63)), ":3: B: expected a whole number"),
    "no size": (cell("B", ""), ":3: B: expected a whole number"),
    "no truth": (cell("git_dirty", "0"), ":3: git_dirty: expected True or"),
    "other status": (cell("status", "fine"), ":3: status: expected one of"),
    "other level": (cell("level", "../x"), ":3: level: expected one of"),
    "other provider": (cell("provider", "eager"), ":3: provider: expected"),
    "quote": (third(b'"' + LINES[2]), ":3: "),
    "quote inside": (cell("gpu", '"a"b'), ":3: "),
    "other column": (header(b",status,", b",speed,"), "version; missing: status; unknown: speed"),
    "other order": (header(b"level,workload", b"workload,level"), "this version; reordered"),
    "semicolons": (WHOLE.replace(b",", b";"), ":1: not the columns"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_report_is_refused_by_file_and_line(
    name: str, folder: Path, refused: Refused
) -> None:
    data, said = DAMAGES[name]
    (folder / "bad.csv").write_bytes(data)
    for reports in (("bad.csv", str(REPORT)), (str(REPORT), "bad.csv")):
        message = refused("compare", *reports)
        assert "bad.csv:" in message
        assert said in message
    if "time" not in name and "spread" not in name:
        for command in ("summary", "plot"):
            assert said in refused(command, "bad.csv")
    if "cut " not in name and name not in ("empty", "zeros"):
        # A report that is only cut off at its end goes on after its last whole line.
        assert "bad.csv:" in refused("run", "--level", "op", "--out", "bad.csv", "--resume")


@pytest.mark.parametrize("name", ["folder", "nowhere.csv", "circle.csv", "x" * 300, "/dev/null"])
@pytest.mark.parametrize("command", ["compare", "summary", "plot"])
def test_report_that_cannot_be_read_is_named(command: str, name: str, refused: Refused) -> None:
    arguments = (name, str(REPORT)) if command == "compare" else (name,)
    assert f"{name}: " in refused(command, *arguments)


@pytest.mark.parametrize("command", ["compare", "summary", "plot"])
def test_report_without_a_row_is_said(command: str, folder: Path, refused: Refused) -> None:
    (folder / "a.csv").write_bytes(WHOLE.partition(b"\n")[0] + b"\n")
    assert "a.csv" in refused(command, *["a.csv"] * (1 + (command == "compare")))


def test_report_with_line_breaks_of_another_system_is_read(folder: Path, capsys: Printed) -> None:
    (folder / "a.csv").write_bytes(WHOLE.replace(b"\n", b"\r\n"))
    assert main(["compare", "a.csv", str(REPORT)]) == 0
    assert "slower" not in capsys.readouterr().out


def test_report_of_an_older_version_is_read_and_not_gone_on_with(
    folder: Path, refused: Refused
) -> None:
    older = pd.read_csv(REPORT, dtype=str, keep_default_na=False).drop(columns="timed_threads")
    older.to_csv("a.csv", index=False)
    assert "not exactly the columns of this version" in refused("run", "--out=a.csv", "--resume")
    assert main(["summary", "a.csv"]) == 0


def test_failure_of_the_harness_is_no_verdict(monkeypatch: Patch, capsys: Printed) -> None:
    monkeypatch.setattr("perf.report.tables.compare", Mock(side_effect=RuntimeError("unforeseen")))
    assert main(["compare", str(REPORT), str(REPORT)]) == SOFTWARE_ERROR
    assert "RuntimeError: unforeseen" in capsys.readouterr().err


# Other commands that write


@pytest.mark.parametrize("out", ["file.csv", "file.csv/x", "/proc/x", "pipe"])
def test_plot_says_where_it_cannot_write(out: str, refused: Refused) -> None:
    assert f"--out: {out} " in refused("plot", str(REPORT), "--out", out)


@pytest.mark.parametrize("out", ["folder", "nowhere/a.csv", "file.csv/a.csv", "pipe", "x" * 300])
@pytest.mark.parametrize("command", ["kernels", "traffic", "host"])
def test_where_a_table_goes_is_checked_before_the_work(
    command: str, out: str, refused: Refused, monkeypatch: Patch
) -> None:
    work = Mock(side_effect=AssertionError("worked first"))
    monkeypatch.setattr("perf.static.compiled.kernel_table", work)
    monkeypatch.setattr("perf.static.launches.launches_of", work)
    monkeypatch.setattr("perf.static.launches.install", work)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(command == "traffic")))
    assert f"--out: {out}" in refused(command, "--out", out)
