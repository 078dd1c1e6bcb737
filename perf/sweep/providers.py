"""Who carries a case out: whose code, on which backend, wrapped in what; and one call of it.

A call computes on tensors that stay where they are: it is judged, captured and timed alike.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

import sknet_triton as skt
from perf.peers import families
from perf.rows.schema import Case
from perf.sweep import workloads
from perf.sweep.workloads import Net, Source

Wrap = Literal[
    "eager", "compile", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "cudagraph"
]
# Calls before a capture, in which libraries choose their algorithms and kernels are compiled.
CALLS_BEFORE_CAPTURE = 3

Results = tuple[Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Evaluation:
    """The output of one call and, where the case has a backward pass, its gradients by name."""

    out: Tensor
    grads: Mapping[str, Tensor]


class Call:
    """What one call of a case computes: the forward pass, the backward pass, or both.

    ``net`` computes with the parameters of ``module``, which are differentiated. The inputs become
    the call's own, at fixed addresses. ``seed`` draws the gradient that arrives.
    """

    def __init__(
        self, case: Case, module: nn.Module, net: Net, inputs: tuple[Tensor, ...], seed: int
    ) -> None:
        self.case = case
        self.module = module
        self.net = net
        self.tensors: dict[str, Tensor] = {}
        if case.differentiates:
            self.tensors |= dict(module.named_parameters())
        if case.differentiates and workloads.WORKLOADS[case.workload].input_grads:
            inputs = tuple(x.detach().requires_grad_() for x in inputs)
            self.tensors |= {f"input {i}": x for i, x in enumerate(inputs)}
        self.inputs = inputs
        self._wanted = list(self.tensors.values())
        self._seed = seed
        self._dout: Tensor | None = None
        self._out: Tensor | None = None

    def forward(self) -> Tensor:
        """Returns the output, under autocast where the case says so: as a user does."""
        x = self.inputs[0]
        enabled = self.case.dtype == "autocast" and x.dtype != torch.float64
        with torch.autocast(x.device.type, torch.bfloat16) if enabled else nullcontext():
            return self.net(*self.inputs)

    def __call__(self) -> Results:
        """Returns the output and the gradients of `tensors`."""
        alone = self.case.mode == "bwd"
        out = self.forward() if self._out is None else self._out
        self._out = out if alone else None
        if not self.case.differentiates:
            return out, ()
        if self._dout is None:
            self._dout = arriving_gradient(out, self.case, self._seed)
        return out, torch.autograd.grad(out, self._wanted, self._dout, retain_graph=alone)

    def load(self, inputs: tuple[Tensor, ...], seed: int) -> None:
        """Writes other values where the inputs and the arriving gradient lie."""
        with torch.no_grad():
            for own, drawn in zip(self.inputs, inputs, strict=True):
                own.copy_(drawn)
            if self._dout is not None:
                self._dout.copy_(arriving_gradient(self._dout, self.case, seed))
        self._seed = seed
        self._out = None


def captured(call: Call) -> Callable[[], Results]:
    """Returns ``call`` in a CUDA graph, on the tensors that it captured.

    The next call overwrites the results.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CALLS_BEFORE_CAPTURE):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def run() -> Results:
        graph.replay()
        return results

    return run


def recorded(call: Call) -> Callable[[], Results]:
    """Returns a compiled call that torch.compile replays in CUDA graphs of its own.

    Its inputs are said to stay where they are, so that no replay copies them first. The next call
    overwrites the results.
    """
    for x in call.inputs:
        torch._dynamo.mark_static_address(x)

    def run() -> Results:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return call()

    return run


def evaluate(call: Call, run: Callable[[], Results]) -> Evaluation:
    """Returns what ``run`` computes, which carries ``call`` out, as tensors of its own."""
    if call.case.mode == "bwd":
        # What is timed comes after other backward passes over the same graph, so the judged one
        # does, too.
        run()
    out, grads = run()
    return Evaluation(
        out.detach().clone(),
        {name: grad.clone() for name, grad in zip(call.tensors, grads, strict=True)},
    )


def arriving_gradient(out: Tensor, case: Case, seed: int) -> Tensor:
    """Draws the gradient of ``out``, in the case's layout as from a layer of the same network.

    The same numbers in every dtype, rounded to the case's, and as often as the inputs repeat.
    """
    generator = torch.Generator(out.device).manual_seed(seed + 2)
    images = workloads.judged(case).B
    drawn = torch.randn((images, *out.shape[1:]), generator=generator, device=out.device)
    drawn = drawn.to(workloads.DTYPE_OF[case.dtype]).to(out.dtype)
    return workloads.laid_out(workloads.repeated(drawn, len(out)), case)


@contextmanager
def settings(case: Case, *, benchmark: bool = True) -> Iterator[None]:
    """A context that computes as the case says: TF32 or not, with gradients or without.

    With ``benchmark`` cuDNN times its algorithms at first, which pays for what is repeated.
    """
    tf32 = case.dtype == "tf32"
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.flags(
        enabled=True, benchmark=benchmark, deterministic=False, allow_tf32=tf32
    )
    # torch.compile would let the backward pass overwrite what the forward pass saved.
    donated = {"donated_buffer": False} if case.mode == "bwd" else {}
    with cudnn, torch.set_grad_enabled(case.differentiates), functorch_config.patch(donated):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Provider:
    """One way to carry a case out: whose module, called how, on which backend of ours."""

    source: Source
    wrap: Wrap = "eager"
    backend: skt.Backend = "reference"

    @property
    def code(self) -> str:
        """Whose code runs: plain, port, ours-pytorch (no Triton), ours-triton, timm's."""
        ours = "ours-triton" if self.backend == "triton" else "ours-pytorch"
        return ours if self.source == "ours" else self.source

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
        owner = BASELINE if case.workload == "copy" else PASSES_OF
        if case.level == "pass" and self.name != owner:
            return f"{case.workload} is a pass of {owner}"
        if self.source in ("timm-sk", "timm-se"):
            return families.timm_unavailable(self.source, case)
        if self.source == "port" and case.level in ("op", "family"):
            return "a port is a layer or a whole network"
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        on_a_gpu = self.backend == "triton" or self.wrap not in ("eager", "compile")
        if on_a_gpu and device.type != "cuda":
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
        if not self.graphed:
            return call
        return captured(call) if self.wrap == "cudagraph" else recorded(call)


_WRAPS: dict[tuple[Source, skt.Backend], tuple[Wrap, ...]] = {
    ("plain", "reference"): get_args(Wrap),
    ("port", "reference"): ("eager", "compile"),
    ("ours", "reference"): ("eager", "compile"),
    ("ours", "triton"): ("eager", "compile", "cudagraph"),
    ("timm-sk", "reference"): ("eager", "compile"),
    ("timm-se", "reference"): ("eager", "compile"),
}
PROVIDERS = {
    provider.name: provider
    for (source, backend), wraps in _WRAPS.items()
    for provider in (Provider(source, wrap, backend) for wrap in wraps)
}
BASELINE = Provider("plain").name
# Whose kernels the passes are, all but copies.
PASSES_OF = Provider("ours", backend="triton").name

# The plain module that is called as a provider of ours calls ours.
BEFORE = {p.name: Provider("plain", p.wrap).name for p in PROVIDERS.values() if p.source == "ours"}
