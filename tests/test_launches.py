"""What a call costs the host: how launches are counted, and `python -m perf host`."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from perf.rows.schema import Launches
from perf.static.launches import install, launching_operators
from tests.helpers import run_python

FOUR_PROVIDERS = """
import itertools, json, torch, sknet_triton as skt
from dataclasses import asdict
from perf.static.launches import install, launches
rows = itertools.islice(launches((2, 8, 6, 6), torch.float32), 4)
rows = [(key, asdict(found)) for key, found in rows]
listed = install().launches
xs, logits = [torch.randn(2, 16, 7, 7) for _ in range(3)], torch.randn(2, 3, 16)
with skt.use_backend("triton"):
    for _ in range(2):
        skt.functional.sk_select(xs, logits)
print(json.dumps([rows, listed]))
"""


def a_training_step() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    torch.autograd.backward(F.linear(x, weight).relu(), torch.ones(2, 4))


CALLS: dict[str, tuple[Callable[[], object], int]] = {
    "views and allocations": (lambda: torch.empty(2, 3).t()[0].view(2, 1).expand(2, 5), 0),
    "a composed operator by its parts": (lambda: F.linear(torch.empty(2, 3), torch.empty(4, 3)), 1),
    "an operator whatever it calls": (lambda: torch.empty(2, 3).mean(1), 1),
    "a copy that might have been a view": (lambda: torch.empty(2, 3).t().reshape(6), 1),
    "a foreach operator once": (lambda: torch._foreach_add_([torch.empty(2)] * 3, 1), 1),
    # Two ones and the weight's, the product, the ReLU; and in the backward the ReLU's and one more.
    "a backward too": (a_training_step, 7),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_that_a_backend_carries_out(name: str) -> None:
    call, expected = CALLS[name]
    assert launching_operators(call) == expected


@pytest.mark.slow
def test_every_provider_is_counted_in_training_and_inference() -> None:
    out = run_python("-c", FOUR_PROVIDERS, TRITON_INTERPRET="0")
    counted, (first, again) = json.loads(out)
    assert first == again == ["_sk_select_fwd_kernel", first[1]]
    assert first[1] >= 2
    rows = {provider: Launches(**found) for (_, _, provider), found in counted}
    assert {name: row.launches_counted for name, row in rows.items()} == {
        "plain-eager": "operators",
        "plain-compile": "Triton plan",
        "ours-pytorch-compile": "CPU plan",
        "ours-triton-eager": "driver",
    }
    for row in rows.values():
        assert row.launches_training is not None
        assert row.launches_inference is not None
        assert row.launches_training > row.launches_inference >= 3
    # Three norms, three ReLUs, two products, stack, sum, mean, softmax, product and sum.
    assert rows["plain-eager"].launches_inference == 14


def test_a_process_that_interprets_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: nothing is launched where it is 1"):
        install()


@pytest.mark.slow
def test_host_times_both_sides_and_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "host.csv"
    host = ("-m", "perf", "host", "--rounds", "2", "--out", path)
    run_python(*host, TRITON_INTERPRET="0")
    report = pd.read_csv(path)
    rows = list(zip(report.M, report["mode"], strict=True))
    assert rows == list(itertools.product((2, 3), ("infer", "train")))
    assert (report[["ours_us", "plain_us", "ratio"]] > 0).all(axis=None)
    # With two rounds both percentiles lie outside of the median's two.
    assert (report.ratio_p20 <= report.ratio).all()
    assert (report.ratio <= report.ratio_p80).all()
