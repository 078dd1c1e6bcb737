"""Times the host's share of a call: tiny tensors, and Triton's launches go into nothing.

Ours beside the plain modules, in turn. Both sides run PyTorch's own operators on a CPU; neither
pays what a GPU's driver takes for a launch.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sknet_triton as skt
from perf.peers.baseline import with_plain_convs
from perf.peers.ours import SKFuseSelect
from perf.rows.host import Host

_SHAPE = (2, 32, 4, 4)
_CALLS = 50


@dataclass(frozen=True)
class _Pair:
    """The same computation by our modules and by plain ones, on so many inputs."""

    workload: str
    ours: nn.Module
    plain: nn.Module
    inputs: int


def host(rounds: int) -> Iterator[Host]:
    """Yields a row for every workload, M = 2 and 3, training and inference.

    `perf.static.null_driver` is installed. ``rounds`` is how often the two sides take turns.
    """
    for M in (2, 3):
        for pair in _pairs(M):
            for mode in ("infer", "train"):
                with skt.use_backend("triton"):
                    yield _row(pair, M, mode, rounds)


def _pairs(M: int) -> tuple[_Pair, _Pair]:
    section = SKFuseSelect(_SHAPE[1], M)
    conv = skt.SKConv(_SHAPE[1], _SHAPE[1], M=M)
    plain_conv = with_plain_convs(conv)
    return (
        _Pair("sk_fuse_select", section, section.plain(), M),
        _Pair("sk_conv", _without_convs(conv), _without_convs(plain_conv), 1),
    )


def _without_convs(module: nn.Module) -> nn.Module:
    """Takes the branches' convolutions away: both sides call the same ones."""
    for branch in module.get_submodule("branches").children():
        branch.conv = nn.Identity()
    return module


def _row(pair: _Pair, M: int, mode: str, rounds: int) -> Host:
    inputs = [torch.randn(_SHAPE).requires_grad_(mode == "train") for _ in range(pair.inputs)]
    calls = [_call(module, inputs, mode) for module in (pair.ours, pair.plain)]
    for call in calls:
        _seconds(call)
    times: list[list[float]] = [[], []]
    for i in range(rounds):
        for side in (0, 1) if i % 2 else (1, 0):
            times[side].append(_seconds(calls[side]))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    p20, *_, p80 = statistics.quantiles(ratios, n=5)
    ours, plain = (statistics.median(side) * 1e6 for side in times)
    return Host(pair.workload, M, mode, ours, plain, statistics.median(ratios), p20, p80)


def _call(module: nn.Module, inputs: list[Tensor], mode: str) -> Callable[[], None]:
    module.train(mode == "train")
    dout = torch.randn(_SHAPE)
    leaves = [*inputs, *module.parameters()]

    def infer() -> None:
        with torch.no_grad():
            module(*inputs)

    def train() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(module(*inputs), dout)

    return train if mode == "train" else infer


def _seconds(call: Callable[[], None]) -> float:
    """Returns the CPU time of one call, the mean of many: neighbours on the machine cost none."""
    start = time.process_time()
    for _ in range(_CALLS):
        call()
    return (time.process_time() - start) / _CALLS
