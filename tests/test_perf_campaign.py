"""The campaign: its plan, its time, and what it leaves behind wherever it is cut."""

import argparse
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from perf.__main__ import INTERRUPTED, IO_ERROR, main
from perf.commands import campaign as command
from perf.commands.campaign import GRACE, LEAST, Part, parts, plan, share
from perf.rows import schema
from tests.helpers import ROOT, source_environment
from tests.sweeps import Patch, Printed, in_a_process, refusal, state, wait_for, write_report


def python(code: str, seconds: float = 60.0) -> Part:
    return Part("part", "runs a line", (sys.executable, "-c", code), seconds, columns=None)


Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: Patch) -> Run:
    """Runs a campaign of the given parts, each with little time to end."""

    def campaign(out: Path, *planned: Part, minutes: float = 1) -> int:
        monkeypatch.setattr(command, "parts", lambda **_: planned)
        monkeypatch.setattr(command, "GRACE", 0.5)
        monkeypatch.setattr(command, "LEAST", 0.5)
        return main(["campaign", "--device", "cpu", "--minutes", str(minutes), f"--out={out}"])

    return campaign


# The plan


def test_the_plan_is_printed_and_nothing_runs(
    tmp_path: Path, capsys: Printed, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["campaign", "--minutes", "20", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    _, *lines, last = printed.splitlines()
    names = [part.name for part in parts()]
    assert names[:3] == ["environment", "copy", "checks"]
    assert [line.split()[0] for line in lines] == names
    assert (last.split()[0], last.split()[-1]) == ("together", "20.0")
    assert list(tmp_path.iterdir()) == []


def test_parts_are_chosen_by_name(capsys: Printed) -> None:
    assert main(["campaign", "--dry-run", "--minutes", "9", "--part", "conv", "passes"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["passes", "conv", "together"]
    assert sum(float(line.split()[2]) for line in lines[:-1]) == pytest.approx(9, abs=0.1)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="it is installed")
def test_a_part_without_its_program_is_said(capsys: Printed) -> None:
    said = refusal(capsys, "campaign", "--dry-run", "--part", "memcheck")
    assert "compute-sanitizer is not installed" in said


def test_the_sanitizer_is_a_part_where_it_is_installed() -> None:
    without = parts(which=lambda name: None)
    found = parts(which=lambda name: f"/opt/{name}")
    watched = [part for part in found if part not in without]
    assert [part.name for part in watched] == ["memcheck", "racecheck"]
    for part in watched:
        assert part.command[:3] == ("/opt/compute-sanitizer", "--tool", part.name)
        assert part.command[-1] == "check"
        assert part.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert found.index(watched[0]) == 3


@pytest.mark.parametrize("minutes", [1, 5, 15, 30, 120])
def test_shares_fill_the_time_and_no_more(minutes: int) -> None:
    planned = parts()
    left = 60.0 * minutes
    for i, part in enumerate(planned):
        seconds = share(left, part, planned[i + 1 :])
        assert seconds == 0 or seconds >= LEAST
        left -= seconds
    assert -1e-6 < left < LEAST
    assert len(plan(planned, 60 * minutes).splitlines()) == len(planned) + 2


# Its time


def test_a_part_that_hangs_costs_its_own_time(run: Run, tmp_path: Path, capsys: Printed) -> None:
    touched = tmp_path / "touched"
    deaf = python(
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)"
    )
    last = python(f"open({str(touched)!r}, 'w')", seconds=120.0)
    start = time.perf_counter()
    assert run(tmp_path / "a.csv", deaf, last, minutes=0.1) == 0
    assert time.perf_counter() - start < 12
    assert touched.exists()
    assert "part: cut off after" in capsys.readouterr().out


def test_a_part_that_fails_is_said_and_the_rest_runs(
    run: Run, tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    failing = python("import sys; sys.exit('no device')")
    sources = [str(ROOT), str(ROOT / "kernels")]
    fine = python(f"import sys; print('found' if sys.path[1:3] == {sources} else sys.path)")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert run(tmp_path / "a.csv", failing, fine) == 1
    printed = capsys.readouterr().out
    assert "failed with 1 after" in printed
    assert "done after" in printed
    log = (tmp_path / "a.csv.log").read_text()
    assert "no device" in log.splitlines()
    assert "found" in log.splitlines()


ENDINGS = {signal.SIGTERM: command.TERMINATED, signal.SIGINT: INTERRUPTED}
# Starts another process, and both write their numbers.
FAMILY = """
import os, sys, time
child = os.fork()
open(f"{sys.argv[1]}-{'part' if child else 'child'}", "w").write(f"{os.getpid()} ")
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_what_a_part_has_started_ends_with_the_campaign(
    number: signal.Signals, tmp_path: Path
) -> None:
    pids = [tmp_path / "pid-part", tmp_path / "pid-child"]
    started = f"(sys.executable, '-c', {FAMILY!r}, {str(tmp_path / 'pid')!r})"
    script = (
        # As a shell starts it, whatever started the tests ignores: nohup does, and a job in the
        # background.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "from perf.commands import campaign; from perf.commands.campaign import Part; "
        f"part = Part('part', '', {started}, 60.0, columns=None); "
        "campaign.parts = lambda **_: (part,); from perf.__main__ import main; "
        f"sys.exit(main(['campaign', '--device', 'cpu', '--out', {str(tmp_path / 'a.csv')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=source_environment(), cwd=tmp_path
    )
    wait_for(lambda: all(pid.exists() and pid.read_text().endswith(" ") for pid in pids))
    process.send_signal(number)
    assert process.wait(30) == ENDINGS.get(number, -number)
    # It was told to end, which may take a moment.
    wait_for(lambda: not any(Path("/proc", pid.read_text().strip()).exists() for pid in pids))


def test_a_second_campaign_on_one_report_is_refused_by_name(
    run: Run, tmp_path: Path, capsys: Printed
) -> None:
    out = tmp_path / "a.csv"
    write_report(out, [])
    again = ["campaign", "--device", "cpu", "--minutes", "0.01", "--out", str(out), "--resume"]
    with command._logged(tmp_path / "a.csv.log"):  # between two parts the report is nobody's
        said = refusal(capsys, *again, silent=False)
    assert "a.csv.log: another run is writing it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    with command._logged(tmp_path / "b.csv.log") as log:
        log.write(b"before\n")
    assert run(tmp_path / "b.csv", python("print(1)")) == 0
    assert (tmp_path / "b.csv.log").read_text().startswith("before\n")


def test_a_full_disk_ends_a_campaign_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    class Full(FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "FileIO", Full)
    out = tmp_path / "a.csv"
    assert run(out, python("print(1)")) == IO_ERROR
    said = capsys.readouterr().err
    assert said == f"python -m perf: {out}.log: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(
    "name",
    [
        *("bytes\udcff 測定[2].csv", "new\nline.csv", "-a", ".csv"),
        *("a.log", "a", ".log", "a.csv.log"),  # the log is never the report
    ],
)
def test_a_campaign_takes_any_name(name: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / name
    named = Part("part", "is told the file", (sys.executable, "-c", "import sys; sys.exit(3)"), 9.0)
    assert run(out, named) == 1
    assert os.fsencode(f"--out={out}") in (tmp_path / f"{name}.log").read_bytes()
    assert schema.read(out).empty


def test_a_part_that_appends_rows_gets_a_budget_below_its_time() -> None:
    args = argparse.Namespace(out=Path("b/a.csv"), device="cuda")
    *_, last = parts(which=lambda name: None)
    (swept,) = (part for part in parts() if part.name == "fuse-select")
    assert last.command == (*command.PERF, "tune")
    budget = ("--resume", "--budget", f"{100 - 2 * GRACE:.0f}")
    assert command.command(swept, args, 100.0)[-4:] == ("--out=b/a.csv", *budget)
    assert command.command(last, args, 100.0)[-4:] == ("--out=b/a-tuned.csv", *budget)
    args.device = "cpu"
    assert command.command(swept, args, 100.0)[-6:] == (*("--device", "cpu"), *command.REHEARSAL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "nowhere/a.csv"], "nowhere/a.csv.log cannot be written: No such file"),
        (["--out", "there.csv"], "there.csv exists; go on with it by --resume"),
        (["--out", "tuned.csv"], "tuned-tuned.csv exists; go on with it by --resume"),
        (["--out", "there.csv", "--resume"], "there.csv:1: not the columns"),
        (["--out", "folder"], "folder is a folder"),
        (["--out", "a"], "a.log cannot be written: Is a directory"),
        (["--out", "b"], "b.log cannot be written: No such device"),
        (["--out", "x" * 250], "File name too long"),
        (["--minutes", "0"], "not a positive number of minutes"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: Patch, capsys: Printed, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.csv", "tuned-tuned.csv"):
        Path(name).write_text("mine\n")
    for name in ("folder", "a.log"):
        Path(name).mkdir()
    os.mkfifo("b.log")
    before = state(tmp_path)
    assert message in refusal(capsys, "campaign", "--device", "cpu", *arguments, silent=False)
    assert state(tmp_path) == before


@pytest.mark.slow
def test_a_short_campaign_on_a_processor_ends_in_time_with_a_readable_report(
    path: Path,
) -> None:
    start = time.perf_counter()
    chosen = ["--part", "environment", "copy", "checks", "--minutes", "2", "--out", str(path)]
    assert in_a_process("perf", "campaign", "--device", "cpu", *chosen).returncode == 0
    assert time.perf_counter() - start < 130
    rows = schema.read(path)
    assert (rows[rows.status == "ok"].workload == "copy").any()
    assert set(rows.status) <= {"ok", "unsupported"}


def test_check_says_who_is_right(capsys: Printed) -> None:
    assert main(["check", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert all(line.startswith("unsupported") for line in lines)
