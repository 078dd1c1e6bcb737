"""How launches are counted: operators of eager PyTorch, kernels of a plan, a driver's launches."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from perf.rows.schema import Launches
from perf.static.launches import launching_operators
from tests.helpers import source_environment

ROOT = Path(__file__).parent.parent

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
    out = subprocess.run(
        [sys.executable, "-c", FOUR_PROVIDERS],
        env=source_environment(TRITON_INTERPRET="0"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
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
