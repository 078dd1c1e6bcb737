"""Every kernel compiles for every architecture, without spills and with wide accesses."""

import subprocess

import pandas as pd
import pytest

from tests.helpers import source_environment
from tests.launchers import kernel_names
from tests.sweeps import in_a_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """What is at risk of the table of ``python -m perf kernels``; children do not interpret."""
    path = tmp_path_factory.mktemp("aot") / "kernels.csv"
    options = {"env": source_environment(TRITON_INTERPRET="0"), "stdout": subprocess.DEVNULL}
    done = in_a_process("perf", "kernels", "--at-risk", "--out", str(path), **options)
    found = pd.read_csv(path)
    assert done.returncode == int((found.spill_bytes + found.stack_bytes).any())
    return found


def test_every_kernel_was_compiled_for_every_target(table: pd.DataFrame) -> None:
    assert set(table.target) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    compiled = table.groupby("kernel").target.nunique()
    assert {f"_{name}_kernel" for name in compiled.index} == kernel_names()
    assert (compiled == 4).all()


def test_nothing_spills(table: pd.DataFrame) -> None:
    assert set(table.M) == {2, 3, 8}
    kept = table[(table.spill_bytes + table.stack_bytes) > 0]
    assert kept.empty, kept.to_string()


def test_no_product_rounds_its_factors(table: pd.DataFrame) -> None:
    """Triton 3.6 makes tf32 products of a multiplication whose result is summed."""
    rounded = table[table.tf32]
    assert rounded.empty, rounded.to_string()


def test_fast_layouts_move_16_bytes_at_a_time(table: pd.DataFrame) -> None:
    fast = table[table.fast & table.streaming]
    assert len(fast) >= 4 * 2 * 6
    assert (fast.load_bytes >= 16).all(), fast.to_string()
    assert (fast[fast.writes].store_bytes >= 16).all(), fast.to_string()
    assert set(fast.writes) == {True, False}


def test_rows_of_odd_length_are_read_by_8_bytes_and_more(table: pd.DataFrame) -> None:
    rows = table[(table.layout == "contiguous") & table.streaming & (table.dtype == "bfloat16")]
    for S, reading, width in ((196, "rows", 8), (49, "shifted", 16)):
        odd = rows[(rows.S == S) & (rows.M == 2)]
        assert set(odd.reading) == {reading}
        assert (odd.load_bytes >= width).all(), odd.to_string()


# What the model of perf/static/model.py allows for at least, in TB/s: what an H100 copies, and in
# the two stages that move most, at a large batch, what an H200 copies. Modelled, not measured.
LEAST, LEAST_FULL = 3.0, 4.3


@pytest.mark.parametrize(("M", "dtype"), [(2, "bfloat16"), (3, "bfloat16"), (2, "float32")])
def test_every_kernel_can_ask_for_what_a_copy_moves(
    table: pd.DataFrame, M: int, dtype: str
) -> None:
    # The five kernels of `sk_fuse_select` that read branches, at the network's stages.
    branches = table.tb_s.notna() & table.norm & (table.kernel != "sk_select_bwd") & (table.S > 1)
    rows = table[branches & (table.M == M) & (table.dtype == dtype)]
    rows = rows.drop_duplicates(["kernel", "layout", "B", "C", "S"])
    assert len(rows) == 5 * 2 * 4 * rows.B.nunique()
    assert rows.B.max() == 128
    full = rows[(rows.B == 128) & (rows.C <= 256)]
    low = pd.concat([rows[rows.tb_s < LEAST], full[full.tb_s < LEAST_FULL]])
    assert low.empty, low.to_string()
