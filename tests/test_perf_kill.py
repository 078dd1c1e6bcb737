"""A sweep that is killed, raced or starved and resumed ends as the undisturbed one."""

import contextlib
import io
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from perf.__main__ import IO_ERROR, main
from perf.rows import schema
from perf.sweep import sweep
from perf.sweep.sweep import Rank, part_of, parts_of
from tests.helpers import ROOT
from tests.sweeps import MadeUp, Patch, Printed, make_up, perf, refusal, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

PROVIDERS = ("plain-eager", "ours-pytorch-eager")
SWEEP = ["run", "--level", "op", "--batch", "1:40:1", "--provider", *PROVIDERS]
ROWS = 480
KILLS = 10
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def made_up(monkeypatch: Patch) -> MadeUp:
    """Lets cases take a millisecond, and puts back where ranks meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    return make_up(monkeypatch, seconds=0.001)


def start(
    arguments: list[str],
    folder: Path,
    room: int | None = None,
    most: int | None = None,
    rank: str = "",
) -> BaseProcess:
    """Starts a run whose files cannot grow beyond ``room`` bytes, or that stops at ``most`` cases.

    What stops so is still running when it is killed, however late that is. The process has the name
    of the file in which it says what goes wrong.
    """

    def run() -> None:
        if rank:
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        vars(sweep)["measure_case"].most = most
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with errors.open("w") as sys.stderr:
            sys.exit(main(arguments))

    errors = folder / f"{time.monotonic_ns()}.err"
    child = multiprocessing.get_context("fork").Process(target=run, name=str(errors))
    child.start()
    return child


def status(child: BaseProcess) -> int | None:
    """Returns the exit status, or the signal's number below zero."""
    child.join()
    return child.exitcode


def start_ranks(
    arguments: list[str], folder: Path, room: int | None = None, most: int | None = None
) -> list[BaseProcess]:
    """Starts two ranks of one sweep, the second with ``room`` or ``most``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    first = start(arguments, folder, rank="0")
    return [first, start(arguments, folder, room, most, rank="1")]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)


def wait_for_lines(path: Path, count: int) -> None:
    wait_for(lambda: lines_in(path) >= count)


def sorted_keys(path: Path) -> list[tuple[object, ...]]:
    frame = schema.read(path)
    return sorted(frame[list(schema.KEY_COLUMNS)].itertuples(index=False, name=None))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an undisturbed run."""
    path = tmp_path_factory.mktemp("whole") / "whole.csv"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        make_up(patch)
        assert main([*SWEEP, "--out", str(path)]) == 0
    assert lines_in(path) == 1 + ROWS
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where runs write what they say."""
    (tmp_path / "said").mkdir()
    return tmp_path / "said"


def test_two_writers_a_full_disk_and_kills_still_leave_the_undisturbed_run(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "h100[2] тест.csv"
    arguments = [*SWEEP, "--out", str(out), "--resume"]
    moments = random.Random(1)
    for _ in range(KILLS):
        # Room for a few rows, and part of one more.
        rows = moments.randint(1, 20)
        room = (out.stat().st_size if out.exists() else 1000) + 400 * rows
        assert status(start(arguments, folder, room=room)) == IO_ERROR
        writing = start(arguments, folder, most=rows // 2 + 1)
        wait_for_lines(out, lines_in(out) + rows)
        assert status(start(arguments, folder)) == 2
        writing.kill()
        assert status(writing) == -signal.SIGKILL
    assert 1 + KILLS <= lines_in(out) < 1 + ROWS
    assert main(arguments) == 0
    assert sorted_keys(out) == sorted_keys(whole)
    for said in folder.iterdir():
        assert said.read_text().count("\n") <= 1


def test_ranks_write_one_report_whatever_it_is_called(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for out in (Path("h100[2] *?.csv"), Path.cwd() / "測定 (1).csv"):
        ranks = start_ranks([*SWEEP, "--out", str(out)], folder)
        assert list(map(status, ranks)) == [0, 0]
        assert [path.name for path in Path().iterdir()] == [out.name]
        assert sorted_keys(out) == sorted_keys(whole)
        assert set(schema.read(out).ranks) == {2}
        out.unlink()


@pytest.mark.parametrize("limit", [{"most": 20}, {"room": 10_000}], ids=["killed", "full"])
def test_rank_that_dies_ends_the_other_and_its_rows_are_collected(
    limit: dict[str, int], whole: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    parts = [part_of(out, Rank(index, index, 2)) for index in range(2)]
    first, second = start_ranks([*SWEEP, "--out", str(out)], folder, **limit)
    wait_for_lines(parts[1], 5)
    if "most" in limit:
        second.kill()
    assert status(first) == IO_ERROR
    assert status(second) == (-signal.SIGKILL if "most" in limit else IO_ERROR)
    assert "another rank is gone; --resume collects" in Path(first.name).read_text()
    done = sum(lines_in(part) - 1 for part in parts)
    assert ROWS // 2 < done < ROWS
    assert main([*SWEEP, "--out", str(out), "--resume"]) == 0
    assert sorted_keys(out) == sorted_keys(whole)
    assert parts_of(out) == []


@pytest.mark.parametrize(
    ("name", "said"), [("in", "in is a folder"), ("x" * 250, "File name too long")]
)
def test_mistake_under_ranks_is_said_once_and_leaves_nothing(
    name: str, said: str, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "in"
    place.mkdir()
    out = tmp_path / name if name == "in" else place / name
    ranks = start_ranks([*SWEEP, "--out", str(out)], folder)
    assert list(map(status, ranks)) == [2, 2]
    errors = "".join(Path(rank.name).read_text() for rank in ranks)
    assert said in errors
    assert errors.count("\n") == 1
    assert list(place.iterdir()) == []


def test_parts_of_a_rank_that_died_are_collected_on_resume(
    whole: Path, tmp_path: Path, capsys: Printed
) -> None:
    out = tmp_path / "out.csv"
    lines = whole.read_text().splitlines(keepends=True)
    ranks = [Rank(index, index, 2) for index in range(2)]
    write_report(out, [])
    part_of(out, ranks[0]).write_text("".join(lines[:50]))
    part_of(out, ranks[1]).write_text(lines[0] + "".join(lines[40:90]) + lines[90][:30])
    refusal(capsys, *SWEEP, "--out", str(out))
    assert main([*SWEEP, "--out", str(out), "--resume"]) == 0
    assert sorted_keys(out) == sorted_keys(whole)
    assert out.read_text().splitlines(keepends=True)[:90] == lines[:90]
    assert parts_of(out) == []


def test_torchrun_shares_the_cases_of_a_sweep(tmp_path: Path) -> None:
    out = tmp_path / "h100[2].csv"
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "perf", "run"]
    axes = ["--level", "op", "--batch", "1", "2", "--resolution", "32", "--mode", "infer"]
    chosen = [*axes, "--provider", "ours-pytorch-eager", "--out", str(out)]
    done = perf(*torchrun, *chosen, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    assert done.stdout.count("% of copy") == 1
    frame = schema.read(out)
    assert len(frame) == 6
    assert set(frame.ranks) == {2}
    assert set(frame.status) == {"ok"}
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def children_of(pid: int) -> set[int]:
    """Returns the processes that ``pid`` has started and that live."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return set(map(int, children.read_text().split())) if children.exists() else set()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's processes")
def test_killed_compilation_leaves_no_process() -> None:
    command = [sys.executable, "-m", "perf", "kernels", "--target", "sm_80"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    silent = subprocess.DEVNULL
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=silent, stderr=silent)
    wait_for(lambda: run.poll() is None and len(children_of(run.pid)) >= 2)  # one keeps resources
    time.sleep(2.0)  # they are importing, or compile
    children = children_of(run.pid)
    run.kill()
    run.wait()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
