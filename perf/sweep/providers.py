"""Who carries a case out: whose code, on which backend, wrapped in what."""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import sknet_triton as skt
from perf.peers import competitors
from perf.rows.cases import Case
from perf.sweep.workloads import Call, Source

Wrap = Literal["eager", "compile", "max-autotune", "cudagraph"]


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
        """Whose code runs: plain, ours-pytorch (without Triton), ours-triton, or a competitor's."""
        if self.source != "ours":
            return self.source
        return "ours-triton" if self.backend == "triton" else "ours-pytorch"

    @property
    def name(self) -> str:
        """Whose code runs and how, as the CSV, the command line and the figures say it."""
        return f"{self.code}-{self.wrap}"

    @property
    def oracle(self) -> Source:
        """Whose module in float64 says what is right: plain PyTorch's for ours."""
        return "plain" if self.source == "ours" else self.source

    @property
    def compiles(self) -> bool:
        """Whether the first call is a compilation."""
        return self.wrap in ("compile", "max-autotune")

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Tells why this provider cannot carry out ``case`` on ``device``; None where it can."""
        if self.source == "timm-sk" or self.source == "timm-se":
            return competitors.unavailable(self.source, case)
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if (self.backend == "triton" or self.wrap not in ("eager", "compile")) and (
            device.type != "cuda"
        ):
            return f"{self.name} needs a GPU, and there is none"
        if self.wrap in ("max-autotune", "cudagraph") and case.mode == "bwd":
            # Replaying the backward pass alone would read memory that it has already reused.
            return "a CUDA graph replays one backward pass after each forward pass"
        if self.wrap == "cudagraph" and case.level == "workload":
            return "a graph replays one fixed batch and cannot learn the digits"
        return None

    def wrapped(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
        """Returns ``module`` as this provider calls it."""
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        match self.wrap:
            case "eager":
                return module
            case "compile":
                return torch.compile(module, **options)
            case "max-autotune":
                return torch.compile(module, mode="max-autotune", **options)
            case "cudagraph":
                return cast(Call, torch.cuda.make_graphed_callables(module, inputs))

    def active(self) -> skt.use_backend:
        """Returns a context in which our modules take this provider's backend."""
        return skt.use_backend(self.backend)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("plain"),
        Provider("plain", "compile"),
        Provider("plain", "max-autotune"),
        Provider("ours"),
        Provider("ours", "compile"),
        Provider("ours", backend="triton"),
        Provider("ours", "compile", backend="triton"),
        Provider("ours", "cudagraph", backend="triton"),
        Provider("timm-sk"),
        Provider("timm-se"),
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
