"""One call of a case, on tensors that stay where they are: judged, captured and timed alike."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from perf.rows.schema import Case
from perf.sweep import workloads
from perf.sweep.workloads import Net

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

    Args:
        case: the case.
        module: holds the parameters that are differentiated.
        net: computes with them.
        inputs: become the call's own, at fixed addresses.
        seed: draws the gradient that arrives.
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
        self._autocast = case.dtype == "autocast" and inputs[0].dtype != torch.float64
        self._wanted = list(self.tensors.values())
        self._seed = seed
        self._dout: Tensor | None = None
        self._out: Tensor | None = None

    def forward(self) -> Tensor:
        """Returns the output, under autocast where the case says so: as a user does."""
        if not self._autocast:
            return self.net(*self.inputs)
        with torch.autocast(self.inputs[0].device.type, torch.bfloat16):
            return self.net(*self.inputs)

    def __call__(self) -> Results:
        """Returns the output and the gradients of `tensors`."""
        alone = self.case.mode == "bwd"
        if self._out is None:
            out = self.forward()
            self._out = out if alone else None
        else:
            out = self._out
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


class Captured:
    """A call in a CUDA graph, replayed on the tensors that it captured."""

    def __init__(self, call: Call) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CALLS_BEFORE_CAPTURE):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = call()

    def __call__(self) -> Results:
        """Replays the graph and returns its results, which the next call overwrites."""
        self._graph.replay()
        return self._results


class Recorded:
    """A compiled call that torch.compile replays in CUDA graphs of its own.

    Its inputs are said to stay where they are, so that no replay copies them first.
    """

    def __init__(self, call: Call) -> None:
        for x in call.inputs:
            torch._dynamo.mark_static_address(x)
        self._call = call

    def __call__(self) -> Results:
        """Replays, or records where nothing is recorded yet; the next call overwrites it."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # the same
        return self._call()


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


def settings(case: Case, *, benchmark: bool = True) -> ExitStack:
    """Returns a context that computes as the case says: TF32 or not, with gradients or without.

    Args:
        case: the case.
        benchmark: whether cuDNN times its algorithms at first, which pays for what is repeated.
    """
    stack = ExitStack()
    tf32 = case.dtype == "tf32"
    stack.enter_context(
        torch.backends.cudnn.flags(
            enabled=True, benchmark=benchmark, deterministic=False, allow_tf32=tf32
        )
    )
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    stack.callback(torch.set_float32_matmul_precision, previous)
    stack.enter_context(torch.set_grad_enabled(case.differentiates))
    if case.mode == "bwd":
        # torch.compile would let the backward pass overwrite what the forward pass saved.
        stack.enter_context(functorch_config.patch(donated_buffer=False))
    return stack
