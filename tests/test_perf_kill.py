"""A sweep that is killed and resumed, alone or shared over ranks, ends with the same rows."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf.__main__ import main
from perf.rows import schema
from perf.rows.cases import Case
from perf.rows.schema import Result
from perf.sweep import sweep
from perf.sweep.contest import Conditions
from perf.sweep.providers import Provider
from perf.sweep.ranks import Rank, part_of, parts_of
from tests.helpers import ROOT
from tests.sweeps import write_report

pytestmark = pytest.mark.slow

SWEEP = [
    "run",
    "--level",
    "op",
    "--batch",
    "1:40:1",
    "--provider",
    "plain-eager",
    "ours-pytorch-eager",
]
KILLS = 10


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(
        case: Case, providers: tuple[Provider, ...], conditions: Conditions
    ) -> dict[str, Result]:
        time.sleep(0.001)
        return {provider.name: Result("ok", ms_p50=1.0) for provider in providers}

    monkeypatch.setattr(sweep, "measure_case", made_up)


def sorted_keys(path: Path) -> list[tuple[object, ...]]:
    frame = schema.read(path)
    return sorted(frame[list(schema.KEY_COLUMNS)].itertuples(index=False, name=None))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_killed_ten_times_and_resumed_is_the_undisturbed_run(
    instant: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, killed = tmp_path / "undisturbed.csv", tmp_path / "killed.csv"
    assert main([*SWEEP, "--out", str(undisturbed)]) == 0
    arguments = [*SWEEP, "--out", str(killed), "--resume"]
    moments = random.Random(0)
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            main(arguments)
            os._exit(0)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert main(arguments) == 0
    assert sorted_keys(killed) == sorted_keys(undisturbed)
    assert len(sorted_keys(killed)) == len(set(sorted_keys(killed))) == 480


def test_parts_of_a_rank_that_died_are_collected_on_resume(
    instant: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert main([*SWEEP, "--out", str(whole)]) == 0
    lines = whole.read_text().splitlines(keepends=True)
    ranks = [Rank(index, index, 2) for index in range(2)]
    write_report(out, [])
    part_of(out, ranks[0]).write_text("".join(lines[:50]))
    part_of(out, ranks[1]).write_text(lines[0] + "".join(lines[40:90]) + lines[90][:30])
    with pytest.raises(SystemExit) as stopped:
        main([*SWEEP, "--out", str(out)])
    assert stopped.value.code == 2
    assert main([*SWEEP, "--out", str(out), "--resume"]) == 0
    assert sorted_keys(out) == sorted_keys(whole)
    assert out.read_text().splitlines(keepends=True)[:90] == lines[:90]
    assert parts_of(out) == []


def test_two_ranks_share_the_cases_and_merge_their_parts(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    axes = ["--level", "op", "--batch", "1", "2", "--resolution", "32", "--mode", "infer"]
    done = subprocess.run(
        [
            *torchrun,
            "-m",
            "perf",
            "run",
            *axes,
            "--provider",
            "ours-pytorch-eager",
            "--out",
            str(out),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    assert done.stdout.count("% of copy") == 1
    frame = schema.read(out)
    assert len(frame) == 6
    assert set(frame.ranks) == {2}
    assert set(frame.status) == {"ok"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
