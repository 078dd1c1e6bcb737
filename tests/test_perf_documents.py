"""The tables of the READMEs say what the committed reports say, and publish makes them say it."""

import re
import shutil
from pathlib import Path

import pytest

from perf.__main__ import main
from perf.report.documents import REPORTS, TABLES, Table, published
from perf.rows import env
from tests.helpers import ROOT
from tests.sweeps import Patch, Printed, refusal

# Between markers, but not from a report.
OTHERS = {"test-command", "versions"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A checkout with nothing but the documents and their reports."""
    for name in {table.document for table in TABLES} | {f"{REPORTS}/{t.report}" for t in TABLES}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(env, "CHECKOUT", tmp_path)
    return tmp_path


def test_documents_show_what_the_committed_reports_say() -> None:
    for path, text in published(ROOT).items():
        assert path.read_text() == text, "python -m perf publish writes it"


def test_every_table_between_markers_is_published() -> None:
    documents = [path for path in ROOT.rglob("*.md") if ".venv" not in str(path)]
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in documents
        for name in re.findall(r"<!-- ([\w-]+): begin -->", path.read_text())
        if name not in OTHERS
    }
    assert found == {(table.document, table.name) for table in TABLES}


def test_publish_puts_a_wrong_cell_right_and_leaves_the_rest(
    checkout: Path, capsys: Printed
) -> None:
    assert main(["publish"]) == 0
    assert capsys.readouterr().out == ""
    for name in {table.document for table in TABLES}:
        document = checkout / name
        right = document.read_text()
        before, marker, rest = right.rpartition(": begin -->\n")
        document.write_text(f"{before}{marker}{rest.replace('1', '2', 1)}| gone |\n")
        assert main(["publish"]) == 0
        assert capsys.readouterr().out == f"{name}\n"
        assert document.read_text() == f"{right}| gone |\n"


@pytest.mark.parametrize("side", ["begin", "end"])
def test_markers_stand_once_and_in_order(side: str, checkout: Path, capsys: Printed) -> None:
    table = TABLES[-1]
    name, document = table.name, checkout / table.document
    text, marker = document.read_text(), f"<!-- {name}: {side} -->\n"
    for wrong in (text.replace(marker, ""), text + marker, text.replace(marker, marker * 2)):
        document.write_text(wrong)
        assert f"{table.document}: expected" in refusal(capsys, "publish")
        assert document.read_text() == wrong


def without(checkout: Path, name: str, marked: str) -> tuple[Table, str]:
    """Takes the ``marked`` lines from a table's report; returns the table and the whole report."""
    table = next(table for table in TABLES if table.name == name)
    report = checkout / REPORTS / table.report
    whole = report.read_text()
    report.write_text("".join(s for s in whole.splitlines(keepends=True) if marked not in s))
    return table, whole


def test_report_that_lacks_a_row_is_named(checkout: Path, capsys: Printed) -> None:
    for name, marked in (("traffic", "ours-triton-eager"), ("families", "mirnet_skff,train")):
        table, whole = without(checkout, name, marked)
        said = refusal(capsys, "publish")
        assert f"{table.report}: no row of" in said
        assert marked.partition(",")[0] in said
        (checkout / REPORTS / table.report).write_text(whole)


def test_a_family_that_nobody_has_measured_has_no_line_yet(checkout: Path) -> None:
    table, _ = without(checkout, "families", "mirnet_skff")
    lines = table.lines(ROOT)
    assert table.lines(checkout) == [line for line in lines if "mirnet_skff" not in line]
