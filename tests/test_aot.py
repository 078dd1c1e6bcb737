"""Every kernel compiles for every architecture, without spills and with wide accesses."""

import os
import subprocess
import sys
from importlib.metadata import version

import pandas as pd
import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.slow


# Specialisations in which a version's compiler keeps one pointer, 8 bytes, outside of the loop:
# stored once before it and loaded once after it.
KEPT = {"3.6": 1, "3.8": 4}.get(version("triton")[:3], 0)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The table of ``python -m perf kernels``, made in a process without the interpreter."""
    path = tmp_path_factory.mktemp("aot") / "kernels.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "perf", "kernels", "--out", str(path)],
        cwd=ROOT,
        env=environment,
        check=False,
        stdout=subprocess.DEVNULL,
    )
    found = pd.read_csv(path)
    assert done.returncode == int(bool((found.spill_bytes + found.stack_bytes).any()))
    return found


def test_every_kernel_was_compiled_for_every_target(table: pd.DataFrame) -> None:
    assert set(table.target) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    compiled = table.groupby("kernel").target.nunique()
    sources = (ROOT / "kernels" / "sknet_kernels").glob("*.py")
    kernels = {
        line.split("(")[0].removeprefix("def _").removesuffix("_kernel")
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert set(compiled.index) == kernels
    assert (compiled == 4).all()


def test_nothing_spills(table: pd.DataFrame) -> None:
    kept = table[table.spill_bytes + table.stack_bytes > 0]
    assert (kept.spill_bytes + kept.stack_bytes <= 8).all(), kept.to_string()
    assert len(kept) <= KEPT, kept.to_string()


def test_fast_layouts_move_16_bytes_at_a_time(table: pd.DataFrame) -> None:
    fast = table[table.fast & table.streaming]
    assert len(fast) >= 4 * 2 * 2 * 3
    narrow = fast[fast.load_bytes < 16]
    assert narrow.empty, narrow.to_string()
    writers = fast[~fast.reduces]
    narrow = writers[writers.store_bytes < 16]
    assert narrow.empty, narrow.to_string()
    assert len(writers) >= 4 * 2 * 2 * 2


def test_rows_of_14_by_14_move_8_bytes_at_a_time(table: pd.DataFrame) -> None:
    rows = table[(table.S == 196) & (table.layout == "contiguous") & table.streaming]
    assert len(rows) >= 4 * 3
    assert (rows.load_bytes >= 8).all(), rows.to_string()
