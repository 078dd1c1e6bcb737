"""One case: every provider is built, checked against the oracle, then timed against the others."""

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from perf.peers import digits
from perf.rows.cases import Case
from perf.rows.schema import Result, one_line
from perf.static.saved import saved
from perf.sweep import gate, measure, workloads
from perf.sweep.gate import Oracle, Verdict
from perf.sweep.providers import Provider
from perf.sweep.workloads import Call, Source


@dataclass(frozen=True)
class Conditions:
    """What is the same for every case of a sweep.

    Attributes:
        device: where the cases run.
        seed: draws parameters and inputs.
        seconds: sampling time of each provider of a case.
        rounds: how many turns that time is cut into.
    """

    device: torch.device
    seed: int
    seconds: float
    rounds: int


@dataclass(frozen=True)
class Entry:
    """A provider that passed the gate, and what is known of it before it is timed."""

    provider: Provider
    module: nn.Module
    call: Call
    result: Result


def measure_case(
    case: Case, providers: tuple[Provider, ...], conditions: Conditions
) -> dict[str, Result]:
    """Carries ``case`` out by every provider; what goes wrong is a result like any other."""
    # Dynamo keeps what it compiled by code object: an old case would count as a recompilation.
    torch.compiler.reset()
    contest = Contest(case, conditions)
    nobody = workloads.unsupported(case, conditions.device)
    results: dict[str, Result] = {}
    entries: dict[str, Entry] = {}
    for provider in providers:
        reason = nobody or provider.unavailable(case, conditions.device)
        if reason:
            results[provider.name] = Result("unsupported", reason)
            continue
        try:
            entry = contest.admit(provider)
        except Exception as error:
            results[provider.name] = failure(error)
            continue
        results[provider.name] = entry.result
        if entry.result.status == "ok":
            entries[provider.name] = entry
    return results | contest.run(entries)


def failure(error: Exception) -> Result:
    """Returns the row of a provider that raised ``error``."""
    # Out of memory on a CPU is a plain RuntimeError from the allocator.
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if out_of_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    reason = one_line(f"{type(error).__name__}: {error}")
    if out_of_memory:
        return Result("oom", reason)
    # PyTorch names it wherever a graph cannot run backward twice, which only mode bwd asks for.
    return Result("unsupported" if "retain_graph" in str(error) else "error", reason)


class Contest:
    """The providers of one case, with the parameters and the oracle that they share."""

    def __init__(self, case: Case, conditions: Conditions) -> None:
        self.case = case
        self.conditions = conditions
        self._masters: dict[Source, nn.Module] = {}
        self._oracles: dict[tuple[Source, int], Oracle] = {}
        self._flops: dict[Source, int] = {}

    def admit(self, provider: Provider) -> Entry:
        """Builds ``provider`` and compares it with the oracle; a wrong one gets its verdict."""
        module = self._module(provider.source, self.case)
        inputs = self._inputs(0)
        with self._context(provider), _cold_compilation():
            call = provider.wrapped(module, gate.differentiated(module, self.case, inputs).inputs)
            start = time.perf_counter()
            self._evaluate(call, module, draw=0)
            self._synchronize()
            first_call = time.perf_counter() - start
        verdict = self._judge(provider, call, module)
        result = Result(
            "ok" if verdict.passed else "unverified",
            "" if verdict.passed else verdict.reason,
            compile_s=first_call if provider.compiles else None,
            **asdict(verdict),
        )
        return Entry(provider, module, call, result)

    def run(self, entries: dict[str, Entry]) -> dict[str, Result]:
        """Times the entries and returns their complete results."""
        if self.case.level == "workload":
            return {name: self._guarded(self._learn, entry) for name, entry in entries.items()}
        failed: dict[str, Result] = {}
        times: dict[str, list[float]] = {}
        steps: dict[str, measure.Step] = {}
        for name, entry in entries.items():
            try:
                steps[name] = self._step(entry)
            except Exception as error:
                failed[name] = failure(error)
        while steps and not times:
            try:
                times = self._interleave(steps, entries)
            except measure.StepError as error:
                failed[error.name] = failure(error.cause)
                del steps[error.name]
        counted = {
            name: self._guarded(partial(self._timed, times[name], step), entries[name])
            for name, step in steps.items()
        }
        return failed | counted

    def _interleave(
        self, steps: dict[str, measure.Step], entries: dict[str, Entry]
    ) -> dict[str, list[float]]:
        return measure.interleaved(
            steps,
            lambda name: self._context(entries[name].provider),
            self.conditions.device,
            self.conditions.seconds,
            self.conditions.rounds,
        )

    def _guarded(self, finish: Callable[[Entry], Result], entry: Entry) -> Result:
        try:
            with self._context(entry.provider):
                return finish(entry)
        except Exception as error:
            return failure(error)

    def _timed(self, times: list[float], step: measure.Step, entry: Entry) -> Result:
        """Returns the entry's result with its times and all that follows from them."""
        device = self.conditions.device
        return replace(
            self._with_saved(entry, self._with_times(entry, times)),
            launches=measure.launches(step, device),
            peak_mb=measure.peak_memory_mb(step, device),
        )

    def _learn(self, entry: Entry) -> Result:
        """Trains on the digits from the start and returns the result with its accuracy."""
        training = digits.train(
            entry.call,
            entry.module,
            batch=self.case.B,
            seed=self.conditions.seed,
            device=self.conditions.device,
        )
        return replace(
            self._with_saved(entry, self._with_times(entry, training.step_ms)),
            accuracy=training.accuracy,
        )

    def _with_times(self, entry: Entry, times: list[float]) -> Result:
        p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        seconds = p50 / 1e3
        images = None if self.case.level == "op" else self.case.B / seconds
        result = replace(
            entry.result, ms_p50=p50, ms_p20=p20, ms_p80=p80, n=len(times), images_per_s=images
        )
        needed = workloads.bytes_needed(self.case)
        if needed is not None:
            copy = measure.copy_gbps(self.conditions.device)
            result = replace(result, bytes_needed=needed, copy_gbps=copy)
            if needed == 0:
                return result
            gbps = needed / seconds / 1e9
            return replace(result, gbps=gbps, pct_copy=100 * gbps / copy)
        flops = self._count_flops(entry.provider)
        return replace(result, gflops=flops / 1e9, tflops_per_s=flops / seconds / 1e12)

    def _judge(self, provider: Provider, call: Call, module: nn.Module) -> Verdict:
        """Compares with the oracle; a gradient may be judged on several draws (see `gate`)."""
        for draw in range(gate.DRAWS):
            with self._context(provider):
                evaluation = self._evaluate(call, module, draw)
            verdict = self._oracle(provider.oracle, draw).judge(evaluation)
            if verdict.passed or not verdict.out_passed:
                break
        return verdict

    def _step(self, entry: Entry) -> measure.Step:
        """Returns what is timed: the forward pass, the backward pass or both, as the mode says."""
        wanted = gate.differentiated(entry.module, self.case, self._inputs(0))
        if not self.case.differentiates:
            return lambda: entry.call(*wanted.inputs)
        tensors = list(wanted.tensors.values())
        with self._context(entry.provider):
            out = entry.call(*wanted.inputs)
        dout = gate.arriving_gradient(out, self.case, self._seed(0))
        if self.case.mode == "bwd":
            return lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)
        return lambda: torch.autograd.grad(entry.call(*wanted.inputs), tensors, dout)

    def _with_saved(self, entry: Entry, result: Result) -> Result:
        """Returns ``result`` with what is kept for the backward pass, where there is one."""
        if not self.case.differentiates:
            return result
        inputs = gate.differentiated(entry.module, self.case, self._inputs(0)).inputs
        kept = saved(lambda: entry.call(*inputs), entry.module, inputs)
        return replace(result, saved_mb=kept.mb, saved_own_mb=kept.own_mb)

    def _count_flops(self, provider: Provider) -> int:
        if provider.oracle not in self._flops:
            module = self._module(provider.oracle, self.case)
            self._flops[provider.oracle] = measure.flops(module, self._inputs(0), self.case.mode)
        return self._flops[provider.oracle]

    def _evaluate(self, call: Call, module: nn.Module, draw: int) -> gate.Evaluation:
        return gate.evaluate(call, module, self.case, self._inputs(draw), self._seed(draw))

    def _oracle(self, source: Source, draw: int) -> Oracle:
        if (source, draw) not in self._oracles:
            self._oracles[source, draw] = gate.consult(
                lambda case: self._module(source, case),
                self.case,
                self._inputs(draw),
                self._seed(draw),
            )
        return self._oracles[source, draw]

    def _module(self, source: Source, case: Case) -> nn.Module:
        if source not in self._masters:
            self._masters[source] = workloads.parameters(self.case, source, self.conditions.seed)
        master = copy.deepcopy(self._masters[source])
        return workloads.place_module(master, case, self.conditions.device)

    def _inputs(self, draw: int) -> tuple[Tensor, ...]:
        return workloads.inputs(self.case, self._seed(draw), self.conditions.device)

    def _seed(self, draw: int) -> int:
        return self.conditions.seed + draw

    def _context(self, provider: Provider) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(provider.active())
        stack.enter_context(workloads.precision(self.case, self.conditions.device))
        stack.enter_context(torch.set_grad_enabled(self.case.differentiates))
        if self.case.mode == "bwd":
            # torch.compile would let the backward pass overwrite what the forward pass saved.
            stack.enter_context(functorch_config.patch(donated_buffer=False))
        return stack

    def _synchronize(self) -> None:
        if self.conditions.device.type == "cuda":
            torch.cuda.synchronize(self.conditions.device)


@contextmanager
def _cold_compilation() -> Iterator[None]:
    """A context in which a compilation takes nothing from caches that an earlier run filled."""
    config = torch.compiler.config
    with config.patch(force_disable_caches=True), warnings.catch_warnings():  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield
