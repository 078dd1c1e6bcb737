"""No row is lost, torn, doubled or unreadable: odd values, full disks, two writers, kills."""

import contextlib
import errno
import io
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import Mock

import pytest

from perf.__main__ import IO_ERROR, main
from perf.rows import StopError, UsageError, schema
from perf.rows.store import Store, collect, open_store
from perf.rows.typed_csv import Key, Values
from perf.sweep import sweep
from perf.sweep.sweep import Rank, part_of, parts_of
from tests.helpers import ROOT
from tests.sweeps import (
    OURS,
    PLAIN,
    TINY,
    Patch,
    Printed,
    in_a_process,
    lines_in,
    make_up,
    refusal,
    row,
    wait_for,
    write_report,
)

SWEEP = ["run", "--level", "op", "--batch", "1:8:1", "--provider", PLAIN.name, OURS.name]


def rows_of(count: int) -> list[Values]:
    return [{**row(ms_p20=1.4, ms_p80=1.6), "B": B} for B in range(1, count + 1)]


FIRST, SECOND = rows_of(1), rows_of(2)[1:]


def keys_in(path: Path) -> list[Key]:
    return sorted(schema.SCHEMA.rows(path.read_bytes(), path))


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """A new report with the first row."""
    with open_store(path, resume=False) as opened:
        opened.append(FIRST)
        yield opened


# Values


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf"), 1.7e308, 5e-324, -0.0, 0.1 + 0.2, 1e20]
)
def test_any_number_is_written_and_read_back(value: float, path: Path) -> None:
    written = row(out_err=value, grad_err_bound=value)
    (read,) = write_report(path, [written]).itertuples()
    expected = pytest.approx(value, rel=1e-5, nan_ok=True)
    assert read.out_err == expected
    assert read.grad_err_bound == expected
    with open_store(path, resume=True) as store:
        assert store.keys == {schema.SCHEMA.key_of(written)}


@pytest.mark.parametrize(
    "text",
    [
        *("a\nb", "a\rb", "a\r\nb", "a\x00b", "a\x0bb\x1cb", "a\x85b\u2028b", "\udcffbytes"),
        *('he said "no", twice', "=1+1", "NA", "nan", "Übersetzer: 编译失败", " a ", "a\tb"),
        "x" * 200_000,
    ],
)
def test_any_text_is_one_field_of_one_line(text: str, path: Path) -> None:
    failed = {**row(status="error", reason=text), "gpu": text}
    reason = write_report(path, [failed, *SECOND]).reason[0]
    assert lines_in(path) == 3
    assert reason.isprintable()
    assert (reason == text) == (text.isprintable() and len(text) < 1000)
    with open_store(path, resume=True) as store:
        assert len(store.keys) == 2


def test_what_a_column_cannot_hold_is_an_error_before_it_is_written(path: Path) -> None:
    with open_store(path, resume=False) as store:
        for name, value in (("n", 2**63), ("launches", float("nan")), ("status", "bad")):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                store.append([*FIRST, {**row(), name: value}])
        assert store.keys == set()
    assert schema.read(path).empty


# Full disks


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """A context in which no file grows beyond ``size`` bytes: the last write falls short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def append_one_by_one(store: Store, rows: list[Values]) -> None:
    for values in rows:
        store.append([values])


def test_disk_that_is_full_at_any_byte_leaves_whole_rows_to_resume(
    path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # this disk keeps its power
    rows = rows_of(3)
    write_report(path, rows)
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for size in range(start, len(whole)):
        path.write_bytes(whole[:start])
        with open_store(path, resume=True) as store:
            with full_after(size), pytest.raises(StopError, match="File too large"):
                append_one_by_one(store, rows)
            before = whole[:size].count(b"\n")
            assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:before])
            # The next row does not stick to what was half written.
            append_one_by_one(store, rows[before - 1 :])
        assert path.read_bytes() == whole


def test_disk_that_is_full_from_the_start_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    made_up = make_up(monkeypatch)
    with full_after(100):
        assert "File too large" in refusal(capsys, *SWEEP, "--out", str(tmp_path / "a.csv"))
    assert made_up.asked == []
    assert list(tmp_path.iterdir()) == []


def failing(code: int) -> Mock:
    return Mock(side_effect=OSError(code, os.strerror(code)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_failing_write_is_undone_and_said(
    call: str, code: int, store: Store, monkeypatch: Patch
) -> None:
    before = store.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(StopError, match=os.strerror(code)):
            store.append(SECOND)
    assert store.path.read_bytes() == before
    assert len(store.keys) == 1
    store.append(SECOND)
    assert len(schema.read(store.path)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_interrupt_in_the_middle_of_a_write_waits_for_its_end(
    number: signal.Signals, store: Store, monkeypatch: Patch
) -> None:
    write = os.pwrite

    def interrupted(descriptor: int, data: bytes, offset: int) -> int:
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # another thread may take it
        return write(descriptor, data[:7], offset)

    ended = threading.Event()
    threading.Thread(target=ended.wait).start()
    before = signal.signal(number, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.append(SECOND)
    finally:
        signal.signal(number, before)
        ended.set()
    assert len(store.keys) == len(schema.read(store.path)) == 2
    store.append(rows_of(3)[2:])
    assert len(schema.read(store.path)) == 3


def test_write_that_cannot_even_be_undone_is_cut_off_on_resume(
    store: Store, monkeypatch: Patch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", failing(errno.EIO))
        with full_after(store.path.stat().st_size + 10), pytest.raises(StopError):
            store.append(SECOND)
        with pytest.raises(StopError):
            store.append(SECOND)
    store.close()
    with open_store(store.path, resume=True) as resumed:
        resumed.append(SECOND)
    assert len(schema.read(store.path)) == 2


def test_parts_stay_where_their_rows_do_not_fit(path: Path) -> None:
    part = part_of(path, Rank(0, 0, 2))
    write_report(part, rows_of(4))
    before = part.read_bytes()
    with open_store(path, resume=False) as store:
        with full_after(len(before) - 10), pytest.raises(StopError):
            collect(store, parts_of(path))
        assert part.read_bytes() == before
        assert path.read_text() == schema.SCHEMA.header()
        collect(store, parts_of(path))
    assert path.read_bytes() == before
    assert parts_of(path) == []


@pytest.mark.slow
def test_output_that_cannot_be_shown_is_no_verdict(path: Path) -> None:
    write_report(path, rows_of(1))
    with Path("/dev/full").open("w") as full:
        done = in_a_process("perf", "compare", str(path), str(path), stdout=full)
    assert done.returncode == IO_ERROR
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


# Two writers


def test_second_run_on_one_report_is_refused_by_name(
    store: Store, tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    made_up = make_up(monkeypatch)
    link = tmp_path / "link.csv"
    (tmp_path / "b").mkdir()
    link.symlink_to(store.path)
    for spelling in (store.path, tmp_path / "b" / ".." / "a.csv", link):
        said = refusal(capsys, *SWEEP, "--out", str(spelling), "--resume")
        assert f"{spelling}: another run is writing it" in said
    assert made_up.asked == []
    store.append(SECOND)
    store.close()
    assert len(schema.read(store.path)) == 2
    assert main([*SWEEP, "--out", str(store.path), "--resume"]) == 0


def replace_it(path: Path) -> None:
    other = path.with_name("other.csv")
    other.write_text(path.read_text())
    other.replace(path)


def add_to_it(path: Path) -> None:
    with path.open("a") as file:
        file.write("mine\n")


@pytest.mark.parametrize("change", [Path.unlink, replace_it, add_to_it])
def test_report_that_is_removed_replaced_or_changed_meanwhile_ends_the_run(
    change: Callable[[Path], None], store: Store
) -> None:
    path = store.path
    change(path)
    found = path.read_bytes() if path.exists() else None
    with pytest.raises(StopError, match="during the run"):
        store.append(SECOND)
    assert (path.read_bytes() if path.exists() else None) == found


def test_report_that_somebody_else_put_there_before_the_first_row_stays(path: Path) -> None:
    theirs = path.with_name("theirs.csv")
    theirs.write_text("theirs\n")
    opened = open_store(path, resume=False)
    theirs.replace(path)
    with pytest.raises(StopError), opened:
        opened.append(FIRST)
    assert path.read_text() == "theirs\n"


def test_mistake_removes_no_report_that_was_there(path: Path) -> None:
    write_report(path, [])
    with pytest.raises(UsageError), open_store(path, resume=True):
        raise UsageError("a mistake")
    assert schema.read(path).empty


def test_damaged_part_leaves_no_report(path: Path, capsys: Printed) -> None:
    part = part_of(path, Rank(0, 0, 2))
    part.write_text("damaged\n")
    assert f"{part}:1: " in refusal(capsys, *TINY, "--out", str(path), "--resume")
    assert list(path.parent.iterdir()) == [part]


def test_part_that_another_run_still_writes_is_not_collected(store: Store) -> None:
    with open_store(part_of(store.path, Rank(1, 1, 2)), resume=False) as part:
        part.append(FIRST)
        with pytest.raises(UsageError, match="another run is writing it"):
            collect(store, parts_of(store.path))
    assert parts_of(store.path) == [part.path]


# Paths

NAMES = [
    *("h100[2].csv", "a*.csv", " .csv", "zürich-測定-тест.csv", "a.csv.part0", "-a.csv", ".hidden"),
    *("%s{}$HOME`x`.csv", "quote'\".csv", "new\nline.csv", "bytes\udcff.csv", "x" * 200 + ".csv"),
]


@pytest.mark.parametrize("name", NAMES)
def test_name_of_a_report_is_a_name_and_no_pattern(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    make_up(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path("deep/../deep")):
        (tmp_path / "deep").mkdir(exist_ok=True)
        path = folder / name
        # What other reports leave behind stays theirs.
        others = [folder / other for other in ("h100.csv.part0", "aa.csv.part0", "a.csv.part00x")]
        for other in others:
            other.write_text("not ours")
        for index in (0, 1, 10):
            write_report(part_of(path, Rank(index, index, 11)), rows_of(index + 1))
        assert len(parts_of(path)) == 3
        assert main([*TINY, "--provider", "plain-eager", f"--out={path}", "--resume"]) == 0
        assert parts_of(path) == []
        assert len(schema.read(path)) == 3 + 11
        assert main(["summary", "--", str(path)]) == 0
        assert {other.read_text() for other in others} == {"not ours"}
        path.unlink()


# Kills: a sweep that is killed, raced or starved and resumed ends as the undisturbed one

LONG = ["run", "--level", "op", "--batch", "1:40:1", "--provider", PLAIN.name, OURS.name]
ROWS = 480
KILLS = 10
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def killing(test: Callable[..., None]) -> Callable[..., None]:
    marked: Callable[..., None] = pytest.mark.slow(forks(test))
    return marked


def start(arguments: list[str], folder: Path, rank: str = "", **limit: int) -> BaseProcess:
    """Starts a run whose files cannot grow beyond ``room`` bytes, or that stops at ``most`` cases.

    What stops so is still running when it is killed, however late that is. The process has the name
    of the file in which it says what goes wrong.
    """

    def run() -> None:
        if rank:
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        vars(sweep)["measure_case"].most = limit.get("most")
        if room := limit.get("room"):
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


def start_ranks(arguments: list[str], folder: Path, **limit: int) -> list[BaseProcess]:
    """Starts two ranks of one sweep, the second with a limit of `start`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    return [start(arguments, folder, "0"), start(arguments, folder, "1", **limit)]


def wait_for_lines(path: Path, count: int) -> None:
    wait_for(lambda: lines_in(path) >= count)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an undisturbed run."""
    path = tmp_path_factory.mktemp("whole") / "whole.csv"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        make_up(patch)
        assert main([*LONG, "--out", str(path)]) == 0
    assert lines_in(path) == 1 + ROWS
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Where runs write what they say; cases take no time, and where ranks meet is put back."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    make_up(monkeypatch, seconds=0.001)
    (tmp_path / "said").mkdir()
    return tmp_path / "said"


@killing
def test_two_writers_a_full_disk_and_kills_still_leave_the_undisturbed_run(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "h100[2] тест.csv"
    arguments = [*LONG, "--out", str(out), "--resume"]
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
    assert keys_in(out) == keys_in(whole)
    said = [path.read_text() for path in folder.iterdir()]
    assert max(text.count("\n") for text in said) == 1
    assert sum(f"{out}: File too large" in text for text in said) == KILLS


@killing
def test_ranks_write_one_report_whatever_it_is_called(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for out in (Path("h100[2] *?.csv"), Path.cwd() / "測定 (1).csv"):
        ranks = start_ranks([*LONG, "--out", str(out)], folder)
        assert list(map(status, ranks)) == [0, 0]
        assert [path.name for path in Path().iterdir()] == [out.name]
        assert keys_in(out) == keys_in(whole)
        assert set(schema.read(out).ranks) == {2}
        out.unlink()


@killing
@pytest.mark.parametrize("limit", [{"most": 20}, {"room": 10_000}], ids=["killed", "full"])
def test_rank_that_dies_ends_the_other_and_its_rows_are_collected(
    limit: dict[str, int], whole: Path, folder: Path, path: Path
) -> None:
    parts = [part_of(path, Rank(index, index, 2)) for index in range(2)]
    first, second = start_ranks([*LONG, "--out", str(path)], folder, **limit)
    wait_for_lines(parts[1], 5)
    if "most" in limit:
        second.kill()
    assert status(first) == IO_ERROR
    assert status(second) == (-signal.SIGKILL if "most" in limit else IO_ERROR)
    assert "another rank is gone; --resume collects" in Path(first.name).read_text()
    done = sum(lines_in(part) - 1 for part in parts)
    assert ROWS // 2 < done < ROWS
    assert main([*LONG, "--out", str(path), "--resume"]) == 0
    assert keys_in(path) == keys_in(whole)
    assert parts_of(path) == []


@killing
@pytest.mark.parametrize(
    ("name", "said"), [("in", "in is a folder"), ("x" * 250, "File name too long")]
)
def test_mistake_under_ranks_is_said_once_and_leaves_nothing(
    name: str, said: str, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "in"
    place.mkdir()
    out = tmp_path / name if name == "in" else place / name
    ranks = start_ranks([*LONG, "--out", str(out)], folder)
    assert list(map(status, ranks)) == [2, 2]
    errors = "".join(Path(rank.name).read_text() for rank in ranks)
    assert said in errors
    assert errors.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_torchrun_shares_the_cases_of_a_sweep(tmp_path: Path) -> None:
    out = tmp_path / "h100[2].csv"
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "perf", "run"]
    chosen = [*TINY[1:], "--provider", OURS.name, "--out", str(out)]
    done = in_a_process(*torchrun, *chosen, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    assert done.stdout.count("% of copy") == 1
    frame = schema.read(out)
    assert len(frame) == 3
    assert set(frame.ranks) == {2}
    assert set(frame.status) == {"ok"}
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def children_of(pid: int) -> set[int]:
    """Returns the processes that ``pid`` has started and that live."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return set(map(int, children.read_text().split())) if children.exists() else set()


@pytest.mark.slow
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


@killing
def test_writers_that_start_at_once_leave_each_row_once(folder: Path, path: Path) -> None:
    for _ in range(5):
        runs = [start([*SWEEP, "--out", str(path), "--resume"], folder) for _ in range(3)]
        codes = set(map(status, runs))
        assert 0 in codes
        assert codes <= {0, 2}
        assert len(keys_in(path)) == 96
        path.unlink()
