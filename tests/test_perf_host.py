"""`python -m perf host` and its driver: kernels are compiled and launched, and nothing runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf.rows.host import SCHEMA
from perf.static import null_driver
from tests.helpers import source_environment

ROOT = Path(__file__).parent.parent
COMPILED = source_environment(TRITON_INTERPRET="0")

LAUNCH_SELECT = """
import json, torch, sknet_triton as skt
from perf.static import null_driver
launches = null_driver.install()
xs, logits = [torch.randn(2, 16, 7, 7) for _ in range(3)], torch.randn(2, 3, 16)
with skt.use_backend("triton"):
    for _ in range(2):
        skt.functional.sk_select(xs, logits)
print(json.dumps([[launch.kernel, launch.programs] for launch in launches]))
"""


def test_launches_are_listed_with_their_kernel_and_programs() -> None:
    out = subprocess.run(
        [sys.executable, "-c", LAUNCH_SELECT],
        env=COMPILED,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    first, again = json.loads(out)
    assert first == again
    assert first[0] == "_sk_select_fwd_kernel"
    assert first[1] >= 2


def test_it_refuses_a_process_that_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: nothing is launched where it is 1"):
        null_driver.install()


@pytest.mark.slow
def test_the_command_times_both_sides_and_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "host.csv"
    subprocess.run(
        [sys.executable, "-m", "perf", "host", "--rounds", "2", "--out", str(path)],
        env=COMPILED,
        cwd=ROOT,
        check=True,
    )
    report = SCHEMA.read(path)
    assert list(zip(report.M, report["mode"], strict=True)) == [
        (2, "infer"),
        (2, "train"),
        (3, "infer"),
        (3, "train"),
    ]
    assert (report[["ours_us", "plain_us", "ratio"]] > 0).all(axis=None)
    # With two rounds both percentiles lie outside of the median's two.
    assert (report.ratio_p20 <= report.ratio).all()
    assert (report.ratio <= report.ratio_p80).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "interpret", "line"),
    [
        (["host", "--rounds", "1"], "0", "--rounds: expected at least 2, got 1"),
        (["host"], "1", "TRITON_INTERPRET: nothing is launched where it is 1; unset it"),
    ],
    ids=["rounds", "interpreter"],
)
def test_wrong_arguments_are_one_line_and_exit_2(
    arguments: list[str], interpret: str, line: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perf", *arguments],
        env=source_environment(TRITON_INTERPRET=interpret),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
