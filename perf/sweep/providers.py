"""Who carries a case out: whose code, on which backend, wrapped in what."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import sknet_triton as skt
from perf.peers import families
from perf.rows.schema import Case
from perf.sweep.calls import Call, Captured, Recorded, Results
from perf.sweep.workloads import Net, Source

Wrap = Literal[
    "eager",
    "compile",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
    "cudagraph",
]


@dataclass(frozen=True)
class Provider:
    """One way to carry a case out.

    Attributes:
        source: whose module it is.
        wrap: how it is called; eager is as it is.
        backend: what carries out the stages of our modules.
    """

    source: Source
    wrap: Wrap = "eager"
    backend: skt.Backend = "reference"

    @property
    def code(self) -> str:
        """Whose code runs: plain, port, ours-pytorch (no Triton), ours-triton, timm's."""
        if self.source != "ours":
            return self.source
        return "ours-triton" if self.backend == "triton" else "ours-pytorch"

    @property
    def name(self) -> str:
        """Whose code runs and how, as the CSV, the command line and the figures say it."""
        return f"{self.code}-{self.wrap}"

    @property
    def oracle(self) -> Source:
        """Whose module in float64 says what is right: plain's where the parameters are ours."""
        return "plain" if self.source in ("ours", "port") else self.source

    @property
    def compiles(self) -> bool:
        """Whether the first call is a compilation."""
        return self.wrap not in ("eager", "cudagraph")

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Tells why this provider cannot carry out ``case`` on ``device``; None where it can."""
        if self.source == "timm-sk" or self.source == "timm-se":
            return families.timm_unavailable(self.source, case)
        if self.source == "port" and case.level in ("op", "family"):
            return "a port is a layer or a whole network"
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if (self.backend == "triton" or self.wrap not in ("eager", "compile")) and (
            device.type != "cuda"
        ):
            return f"{self.name} needs a GPU, and there is none"
        if self.graphed and case.mode == "bwd":
            # Replaying the backward pass alone would read memory that it has already reused.
            return "a CUDA graph replays one backward pass after each forward pass"
        if self.wrap == "cudagraph" and case.level == "workload":
            return "a graph replays one fixed batch and cannot learn the digits"
        return None

    @property
    def graphed(self) -> bool:
        """Whether calls replay a CUDA graph."""
        return self.wrap in ("reduce-overhead", "max-autotune", "cudagraph")

    def wrapped(self, module: nn.Module) -> Net:
        """Returns ``module`` as this provider calls it."""
        if not self.compiles:
            return module
        mode = None if self.wrap == "compile" else self.wrap
        return torch.compile(module, mode=mode, fullgraph=True, dynamic=False)

    def prepared(self, call: Call) -> Callable[[], Results]:
        """Returns ``call`` as this provider repeats it, on the very tensors of the call."""
        match self.wrap:
            case "cudagraph":
                return Captured(call)
            case "reduce-overhead" | "max-autotune":
                return Recorded(call)
            case _:
                return call

    def active(self) -> skt.use_backend:
        """Returns a context in which our modules take this provider's backend."""
        return skt.use_backend(self.backend)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("plain"),
        Provider("plain", "compile"),
        Provider("plain", "reduce-overhead"),
        Provider("plain", "max-autotune"),
        Provider("plain", "max-autotune-no-cudagraphs"),
        Provider("plain", "cudagraph"),
        Provider("port"),
        Provider("port", "compile"),
        Provider("ours"),
        Provider("ours", "compile"),
        Provider("ours", backend="triton"),
        Provider("ours", "compile", backend="triton"),
        Provider("ours", "cudagraph", backend="triton"),
        Provider("timm-sk"),
        Provider("timm-sk", "compile"),
        Provider("timm-se"),
        Provider("timm-se", "compile"),
    )
}
BASELINE = Provider("plain").name

# The plain module that is called as a provider of ours calls ours.
BEFORE = {
    after.name: before.name
    for after in PROVIDERS.values()
    for before in PROVIDERS.values()
    if (after.source, before.source) == ("ours", "plain") and after.wrap == before.wrap
}
