"""No row is lost, torn, doubled or unreadable: odd values, full disks, two writers, odd paths."""

import errno
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from perf.__main__ import IO_ERROR, main
from perf.rows import StopError, UsageError, env, schema
from perf.rows.schema import Result
from perf.rows.store import Store, collect, open_store
from perf.rows.typed_csv import Values, values_of
from perf.sweep.sweep import Rank, part_of, parts_of
from perf.sweep.workloads import make_case
from tests.sweeps import Patch, Printed, make_up, perf, refusal, write_report

ENV = env.snapshot(torch.device("cpu"), seed=0, ranks=1)
CASE = make_case("sk_conv", "train", batch=8, resolution=64)
PROVIDER = "ours-pytorch-eager"
TINY = ["run", "--level", "op", "--batch", "2", "--resolution", "32", "--mode", "infer"]
SWEEP = ["run", "--level", "op", "--batch", "1:8:1", "--provider", "plain-eager", PROVIDER]


def rows_of(count: int) -> list[Values]:
    result = Result("ok", ms_p50=1.0, ms_p20=0.9, ms_p80=1.1)
    return [row_of(result, B=B) for B in range(1, count + 1)]


def row_of(result: Result, **changes: object) -> Values:
    return {**values_of(CASE, result, ENV, provider=PROVIDER), **changes}


def keys_in(path: Path) -> list[tuple[object, ...]]:
    frame = schema.read(path)
    return sorted(frame[list(schema.KEY_COLUMNS)].itertuples(index=False, name=None))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.csv"


# Values


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf"), 1.7e308, 5e-324, -0.0, 0.1 + 0.2, 1e20]
)
def test_any_number_is_written_and_read_back(value: float, path: Path) -> None:
    row = row_of(Result("unverified", "output off", out_err=value, grad_err_bound=value))
    write_report(path, [row])
    frame = schema.read(path)
    assert frame.out_err.tolist() == pytest.approx([value], rel=1e-5, nan_ok=True)
    assert frame.grad_err_bound.tolist() == pytest.approx([value], rel=1e-5, nan_ok=True)
    with open_store(path, resume=True) as store:
        assert store.keys == {schema.SCHEMA.key_of(row)}


@pytest.mark.parametrize(
    "text",
    [
        *("a\nb", "a\rb", "a\r\nb", "a\x00b", "a\x0bb\x1cb", "a\x85b\u2028b", "\udcffbytes"),
        *('he said "no", twice', "=1+1", "NA", "nan", "Übersetzer: 编译失败", " a ", "a\tb"),
        "x" * 200_000,
    ],
)
def test_any_text_is_one_field_of_one_line(text: str, path: Path) -> None:
    write_report(path, [row_of(Result("error", text), gpu=text), *rows_of(1)])
    assert path.read_bytes().count(b"\n") == 3
    reason = schema.read(path).reason[0]
    assert reason.isprintable()
    assert (reason == text) == (text.isprintable() and len(text) < 1000)
    with open_store(path, resume=True) as store:
        assert len(store.keys) == 2


def test_what_a_column_cannot_hold_is_an_error_before_it_is_written(path: Path) -> None:
    with open_store(path, resume=False) as store:
        for name, value in (("n", 2**63), ("launches", float("nan")), ("status", "bad")):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                store.append([*rows_of(1), row_of(Result("ok"), **{name: value})])
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
    for row in rows:
        store.append([row])


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


def test_full_disk_ends_a_sweep_in_one_line_and_it_resumes(
    tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    make_up(monkeypatch)
    whole, out = tmp_path / "whole.csv", tmp_path / "a.csv"
    assert main([*SWEEP, "--out", str(whole)]) == 0
    sizes = range(
        len(schema.SCHEMA.header()) + 100, whole.stat().st_size, whole.stat().st_size // 10
    )
    capsys.readouterr()
    for size in sizes:
        with full_after(size):
            assert main([*SWEEP, "--out", str(out), "--resume"]) == IO_ERROR
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert f"{out}: File too large" in captured.err
        # Where not even one row fitted, nothing is left.
        done = keys_in(out) if out.exists() else []
        assert done == sorted(set(done) & set(keys_in(whole)))
    assert main([*SWEEP, "--out", str(out), "--resume"]) == 0
    assert keys_in(out) == keys_in(whole)


def test_disk_that_is_full_from_the_start_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    made_up = make_up(monkeypatch)
    with full_after(100):
        assert "File too large" in refusal(capsys, *SWEEP, "--out", str(tmp_path / "a.csv"))
    assert made_up.asked == []
    assert list(tmp_path.iterdir()) == []


Fail = Callable[..., int]


def raising(code: int) -> Fail:
    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def write_little(descriptor: int, data: bytes, offset: int, write: Fail = os.pwrite) -> int:
    return write(descriptor, data[:7], offset)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_failing_write_is_undone_and_said(
    call: str, code: int, path: Path, monkeypatch: Patch
) -> None:
    with open_store(path, resume=False) as store:
        store.append(rows_of(1))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, raising(code))
            with pytest.raises(StopError, match=os.strerror(code)):
                store.append(rows_of(2)[1:])
        assert path.read_bytes() == before
        assert len(store.keys) == 1
        store.append(rows_of(2)[1:])
    assert len(schema.read(path)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_interrupt_in_the_middle_of_a_write_waits_for_its_end(
    number: signal.Signals, path: Path, monkeypatch: Patch
) -> None:
    def interrupted(descriptor: int, data: bytes, offset: int) -> int:
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # another thread may take it
        return write_little(descriptor, data, offset)

    ended = threading.Event()
    threading.Thread(target=ended.wait).start()
    before = signal.signal(number, signal.default_int_handler)
    try:
        with open_store(path, resume=False) as store:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    store.append(rows_of(1))
            assert len(store.keys) == 1
            store.append(rows_of(2)[1:])
    finally:
        signal.signal(number, before)
        ended.set()
    assert len(schema.read(path)) == 2


def test_write_that_cannot_even_be_undone_is_cut_off_on_resume(
    path: Path, monkeypatch: Patch
) -> None:
    with open_store(path, resume=False) as store:
        store.append(rows_of(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", raising(errno.EIO))
            with full_after(path.stat().st_size + 10), pytest.raises(StopError):
                store.append(rows_of(2)[1:])
            with pytest.raises(StopError):
                store.append(rows_of(2)[1:])
    with open_store(path, resume=True) as store:
        store.append(rows_of(2)[1:])
    assert len(schema.read(path)) == 2


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
        done = perf("perf", "compare", str(path), str(path), stdout=full)
    assert done.returncode == IO_ERROR
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


# Two writers


def test_second_run_on_one_report_is_refused_by_name(
    tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    made_up = make_up(monkeypatch)
    path, link = tmp_path / "a.csv", tmp_path / "link.csv"
    (tmp_path / "b").mkdir()
    link.symlink_to(path)
    with open_store(path, resume=False) as store:
        store.append(rows_of(1))
        for spelling in (path, tmp_path / "b" / ".." / "a.csv", link):
            said = refusal(capsys, *SWEEP, "--out", str(spelling), "--resume")
            assert f"{spelling}: another run is writing it" in said
        assert made_up.asked == []
        store.append(rows_of(2)[1:])
    assert len(schema.read(path)) == 2
    assert main([*SWEEP, "--out", str(path), "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_writers_that_start_at_once_leave_each_row_once(
    tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    make_up(monkeypatch, seconds=0.002)
    path = tmp_path / "a.csv"
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        runs = [
            context.Process(target=main, args=([*SWEEP, "--out", str(path), "--resume"],))
            for _ in range(3)
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        # A process returns 0 from main, and 2 as SystemExit.
        assert set(codes := [run.exitcode for run in runs]) <= {0, 2}
        assert 0 in codes
        assert len(keys_in(path)) == len(set(keys_in(path))) == 96
        path.unlink()


def replace_it(path: Path) -> None:
    other = path.with_name("other.csv")
    other.write_text(path.read_text())
    other.replace(path)


def add_to_it(path: Path) -> None:
    with path.open("a") as file:
        file.write("mine\n")


@pytest.mark.parametrize("change", [Path.unlink, replace_it, add_to_it])
def test_report_that_is_removed_replaced_or_changed_meanwhile_ends_the_run(
    change: Callable[[Path], None], path: Path
) -> None:
    with open_store(path, resume=False) as store:
        store.append(rows_of(1))
        change(path)
        found = path.read_bytes() if path.exists() else None
        with pytest.raises(StopError, match="during the run"):
            store.append(rows_of(2)[1:])
        assert (path.read_bytes() if path.exists() else None) == found


def test_report_that_somebody_else_put_there_before_the_first_row_stays(path: Path) -> None:
    theirs = path.with_name("theirs.csv")
    theirs.write_text("theirs\n")
    opened = open_store(path, resume=False)
    theirs.replace(path)
    with pytest.raises(StopError), opened as store:
        store.append(rows_of(1))
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


def test_part_that_another_run_still_writes_is_not_collected(path: Path) -> None:
    with (
        open_store(path, resume=False) as store,
        open_store(part_of(path, Rank(1, 1, 2)), resume=False) as part,
    ):
        part.append(rows_of(1))
        with pytest.raises(UsageError, match="another run is writing it"):
            collect(store, parts_of(path))
    assert parts_of(path) == [part.path]


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
            rows = [{**row, "provider": "plain-eager"} for row in rows_of(index + 1)]
            write_report(part_of(path, Rank(index, index, 11)), rows)
        assert len(parts_of(path)) == 3
        assert main([*TINY, "--provider", "plain-eager", f"--out={path}", "--resume"]) == 0
        assert parts_of(path) == []
        assert len(schema.read(path)) == 3 + 11
        assert main(["summary", "--", str(path)]) == 0
        assert {other.read_text() for other in others} == {"not ours"}
        path.unlink()
