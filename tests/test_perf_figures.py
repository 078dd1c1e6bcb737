"""Figures and the Markdown summary come from the CSV alone."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.__main__ import main
from perf.report.figures import explained, growths, look, traffic_figure
from perf.rows import schema
from perf.rows.typed_csv import Values
from perf.sweep.providers import PROVIDERS
from perf.sweep.workloads import make_case
from tests.sweeps import ENV, REPORTS, Printed, refusal, row, write_report

TRAFFIC = REPORTS / "traffic-cpu-torch2.13.0.csv"


ABSENT: dict[str, Any] = {"status": "unsupported", "reason": "no GPU", "ms_p50": None}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report of two batches and two resolutions, with a provider that is not supported."""
    path = tmp_path / "report.csv"
    rows: list[Values] = []
    for batch in (1, 8):
        for resolution in (64, 224):
            case = make_case("sk_fuse", "infer", batch=batch, resolution=resolution)
            for i, name in enumerate(("plain-eager", "ours-pytorch-eager"), start=1):
                ms = batch * resolution / 1e3 / i
                times = {"ms_p50": ms, "ms_p20": 0.9 * ms, "ms_p80": 1.1 * ms}
                bytes_ = {"bytes_needed": 10**6, "copy_gbps": 10.0, "pct_copy": 40.0 * i}
                rows.append(row(name, case, **times, **bytes_))
            rows.append(row("ours-triton-eager", case, **ABSENT))
    write_report(path, [{**row, "git_sha": "0123456789abcdef"} for row in rows])
    return path


@pytest.mark.slow
def test_every_figure_is_a_png_and_an_svg(report: Path, tmp_path: Path, capsys: Printed) -> None:
    assert main(["plot", str(report), "--out", str(tmp_path / "figures")]) == 0
    names = ("speedup", "bandwidth", "passes", "growth-sk_fuse-infer")
    assert figures_said(capsys) == {f"report-{name}" for name in names}


def figures_said(capsys: Printed) -> set[str]:
    """Returns the names of the figures that a command says it drew, in two formats each."""
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    for png, svg in zip(paths[::2], paths[1::2], strict=True):
        assert png.read_bytes().startswith(b"\x89PNG\r\n")
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    return {path.stem for path in paths}


def growth_of(frame: pd.DataFrame) -> dict[str, Figure]:
    return dict(growths(frame[frame.status == "ok"]))


def drawn(panel: Axes) -> dict[str, list[tuple[float, float]]]:
    """Returns the points of every line in a panel, by the first line of its name."""
    return {
        str(line.get_label()).partition("\n")[0]: [(x, y) for x, y in np.asarray(line.get_xydata())]
        for line in panel.get_lines()
    }


def test_growth_is_time_over_batch_and_over_image_size_above_a_copy(report: Path) -> None:
    figure = growth_of(schema.read(report))["growth-sk_fuse-infer"]
    over_batch, over_size = map(drawn, figure.axes)
    # Of the largest images and the largest batch; a copy of 10^6 bytes at 10 GB/s takes 0.1 ms.
    least = "bytes that must move"
    assert over_batch == {
        "plain-eager": [(1, 0.224), (8, 1.792)],
        "ours-pytorch-eager": [(1, 0.112), (8, 0.896)],
        least: [(1, 0.1), (8, 0.1)],
    }
    assert over_size == {
        "plain-eager": [(64, 0.512), (224, 1.792)],
        "ours-pytorch-eager": [(64, 0.256), (224, 0.896)],
        least: [(64, 0.1), (224, 0.1)],
    }
    assert [panel.get_xlabel() for panel in figure.axes] == [
        "batch size, images of 224 x 224 px",
        "side of an image in px, batch size 8",
    ]
    (legend,) = figure.legends
    names = [text.get_text().partition("\n")[0] for text in legend.get_texts()]
    assert names == ["plain-eager", "ours-pytorch-eager", least]


@pytest.mark.parametrize("workload", ["sk_fuse", "sk_select", "sk_fuse_select"])
def test_nothing_of_growth_is_cut_off(workload: str, report: Path) -> None:
    frame = schema.read(report)
    frame = frame.assign(workload=workload, cpu="AMD EPYC 9654 96-Core Processor", threads=16)
    for figure in growth_of(frame).values():
        figure.draw_without_rendering()
        drawn_in = figure.get_window_extent()
        for part in (*figure.texts, *figure.legends, *figure.axes):
            extent = part.get_window_extent()
            assert 0 <= extent.x0 <= extent.x1 <= drawn_in.width
            assert 0 <= extent.y0 <= extent.y1 <= drawn_in.height


def test_growth_takes_the_fastest_copy_of_all_runs(report: Path) -> None:
    frame = schema.read(report)
    frame.loc[frame.B == 1, "copy_gbps"] = 5.0
    figure = growth_of(frame)["growth-sk_fuse-infer"]
    assert {y for _, y in drawn(figure.axes[0])["bytes that must move"]} == {0.1}


def test_growth_has_a_panel_for_each_axis_that_grows(report: Path) -> None:
    frame = schema.read(report)
    (figure,) = growth_of(frame[frame.B == 8]).values()
    assert [panel.get_xlabel() for panel in figure.axes] == ["side of an image in px, batch size 8"]
    (figure,) = growth_of(frame.assign(bytes_needed=float("nan"))).values()
    measured = {"plain-eager", "ours-pytorch-eager"}
    assert [set(drawn(panel)) for panel in figure.axes] == [measured] * 2
    assert growth_of(frame[(frame.B == 8) & (frame.resolution == 64)]) == {}


def test_growth_is_one_figure_for_each_set_of_cases_under_a_name_of_its_own(report: Path) -> None:
    frame = schema.read(report)
    both = pd.concat([frame, frame.assign(layout="channels_last")], ignore_index=True)
    layouts = ("nchw", "channels_last")
    assert set(growth_of(both)) == {f"growth-sk_fuse-infer-{layout}" for layout in layouts}


def test_what_has_no_measured_row_is_refused(tmp_path: Path, capsys: Printed) -> None:
    path = tmp_path / "a.csv"
    write_report(path, [row(**ABSENT)])
    refusal(capsys, "plot", str(path))
    path.write_text(TRAFFIC.read_text().partition("\n")[0] + "\n")
    refusal(capsys, "plot", str(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_traffic_is_drawn_for_every_plan_beside_the_minimum(
    tmp_path: Path, capsys: Printed
) -> None:
    assert main(["plot", str(TRAFFIC), "--out", str(tmp_path)]) == 0
    assert len(figures_said(capsys)) == 1
    table = pd.read_csv(TRAFFIC)
    training = traffic_figure(table).axes[0]
    minimum, *plans = training.get_legend_handles_labels()[1]
    assert (minimum, plans) == ("the mathematics", list(table.provider.unique()))
    assert len(training.patches) == len(table)


def test_providers_look_different() -> None:
    looks = [look(name) for name in PROVIDERS]
    assert len(set(looks)) == len(looks)
    assert len({explained(name).partition("\n")[2] for name in PROVIDERS}) == len(PROVIDERS)


def test_summary_is_markdown_with_its_environment(report: Path, capsys: Printed) -> None:
    assert main(["summary", str(report)]) == 0
    first, _, header, rule, *rows = capsys.readouterr().out.splitlines()
    assert ENV.torch in first
    assert "commit 0123456789" in first
    assert header.startswith("| case")
    assert set(rule) <= set("|-:")
    assert len([row for row in rows if row.startswith("|")]) == 8
    assert rows[-1] == "unsupported: ours-triton-eager (4 rows): no GPU"
