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

from perf.peers import digits
from perf.rows import env, one_line
from perf.rows.schema import Case, Result, counts_call_to_call
from perf.static.bytes import saved
from perf.sweep import gate, measure, workloads
from perf.sweep.calls import Call, Results, evaluate, settings
from perf.sweep.gate import Oracle, Verdict
from perf.sweep.providers import Provider
from perf.sweep.workloads import Source


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


class BudgetSpentError(BaseException):
    """The time is up. Not an Exception, so that no failing case can pass for it or catch it."""


class DeviceLostError(Exception):
    """An error after which the device answers nothing more in this process."""


class UnjudgedError(Exception):
    """The oracle failed, which is no provider's fault."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.reason)
        self.result = result


@dataclass(frozen=True)
class Entry:
    """A provider that passed the gate, and what is known of it before it is timed.

    Attributes:
        provider: who.
        call: what one call of it computes.
        run: how that is carried out: as it is, or in a graph.
        result: its verdict.
    """

    provider: Provider
    call: Call
    run: Callable[[], Results]
    result: Result


def measure_case(
    case: Case, providers: tuple[Provider, ...], conditions: Conditions
) -> dict[str, Result]:
    """Carries ``case`` out by every provider; what goes wrong is a result like any other.

    Where the budget is spent while providers are built and checked, those that are ready are still
    timed, and the others have no result.

    Raises:
        DeviceLostError: the device does not answer any more; the case has no results.
    """
    contest = Contest(case, conditions)
    results, entries = contest.admit_all(providers)
    return results | contest.run(entries)


def judge_case(
    case: Case, providers: tuple[Provider, ...], conditions: Conditions
) -> dict[str, Result]:
    """Carries ``case`` out once by every provider and judges it; no clock runs.

    Raises:
        DeviceLostError: the device does not answer any more.
    """
    return Contest(case, conditions).admit_all(providers)[0]


def failure(error: Exception, device: torch.device) -> Result:
    """Returns the row of a provider that raised ``error``.

    Raises:
        DeviceLostError: the device is lost with it.
    """
    if isinstance(error, UnjudgedError):
        return error.result
    reason = one_line(f"{type(error).__name__}: {error}")
    if isinstance(error, DeviceLostError) or is_lost(device):
        raise DeviceLostError(reason) from error
    # Out of memory on a CPU is a plain RuntimeError from the allocator.
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if out_of_memory and device.type == "cuda":
        torch.cuda.empty_cache()
    if out_of_memory:
        return Result("oom", reason)
    # PyTorch names it wherever a graph cannot run backward twice, which only mode bwd asks for.
    return Result("unsupported" if "retain_graph" in str(error) else "error", reason)


def is_lost(device: torch.device) -> bool:
    """Tells whether ``device`` fails whatever it is asked, as after an illegal memory access."""
    if device.type != "cuda":
        return False
    # The first call may report an error that is over with it.
    for _ in range(2):
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            continue
        return False
    return True


def timed(result: Result, times: measure.Times) -> Result:
    """Returns ``result`` with its times and what they were taken under."""
    p20, p50, p80 = measure.quantiles(times.ms)
    result = replace(
        result, ms_p50=p50, ms_p20=p20, ms_p80=p80, n=len(times.ms), **asdict(times.switches)
    )
    if not times.call_ms:
        return result
    p20, p50, p80 = measure.quantiles(times.call_ms)
    return replace(result, call_ms_p50=p50, call_ms_p20=p20, call_ms_p80=p80)


def streamed(result: Result, needed: int, device: torch.device) -> Result:
    """Returns a timed ``result`` with its bandwidth for ``needed`` bytes, beside a copy's."""
    copy = measure.copy_gbps(device)
    result = replace(result, bytes_needed=needed, copy_gbps=copy)
    if needed == 0:
        return result
    assert result.ms_p50 is not None
    gbps = needed / result.ms_p50 / 1e6
    return replace(result, gbps=gbps, pct_copy=100 * gbps / copy)


class Contest:
    """The providers of one case, with the parameters and the oracle that they share."""

    def __init__(self, case: Case, conditions: Conditions) -> None:
        self.case = case
        self.conditions = conditions
        self._masters: dict[Source, nn.Module] = {}
        self._oracles: dict[tuple[Source, int], Oracle | Result] = {}
        self._flops: dict[Source, int] = {}

    def admit_all(
        self, providers: tuple[Provider, ...]
    ) -> tuple[dict[str, Result], dict[str, Entry]]:
        """Returns a result for every provider, and an entry for each that passed the gate.

        A budget that is spent meanwhile leaves out the providers that are not done.
        """
        # Dynamo keeps what it compiled by code object: an old case would count as a recompilation.
        torch.compiler.reset()
        device = self.conditions.device
        nobody = workloads.unsupported(self.case, device)
        results: dict[str, Result] = {}
        entries: dict[str, Entry] = {}
        for provider in providers:
            reason = nobody or provider.unavailable(self.case, device)
            if reason:
                results[provider.name] = Result("unsupported", reason)
                continue
            try:
                entry = self.admit(provider)
            except BudgetSpentError:
                break
            except Exception as error:
                results[provider.name] = failure(error, device)
                continue
            results[provider.name] = entry.result
            if entry.result.status == "ok":
                entries[provider.name] = entry
        return results, entries

    def admit(self, provider: Provider) -> Entry:
        """Builds ``provider`` and compares it with the oracle; a wrong one gets its verdict."""
        self._oracle(provider.oracle, 0)
        module = self._module(provider.source, self.case)
        call = Call(self.case, module, provider.wrapped(module), self._inputs(0), self._seed(0))
        with self._context(provider), _cold_compilation():
            start = time.perf_counter()
            run = provider.prepared(call)
            run()
            self._synchronize()
            first_call = time.perf_counter() - start
        verdict = self._judge(provider, call, run)
        result = Result(
            "ok" if verdict.passed else "unverified",
            "" if verdict.passed else verdict.reason,
            compile_s=first_call if provider.compiles else None,
            judged_batch=workloads.judged(self.case).B,
            **asdict(verdict),
        )
        return Entry(provider, call, run, result)

    def run(self, entries: dict[str, Entry]) -> dict[str, Result]:
        """Times the entries and returns their complete results."""
        if self.case.level == "workload":
            return {name: self._guarded(self._learn, entry) for name, entry in entries.items()}
        failed: dict[str, Result] = {}
        times: dict[str, measure.Times] = {}
        runs: dict[str, measure.Run] = {name: entry.run for name, entry in entries.items()}
        while runs and not times:
            try:
                times = self._interleave(runs, entries)
            except measure.RunError as error:
                failed[error.name] = failure(error.cause, self.conditions.device)
                del runs[error.name]
        counted = {
            name: self._guarded(partial(self._timed, times[name]), entries[name]) for name in runs
        }
        return failed | counted

    def _interleave(
        self, runs: dict[str, measure.Run], entries: dict[str, Entry]
    ) -> dict[str, measure.Times]:
        return measure.interleaved(
            runs,
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
            return failure(error, self.conditions.device)

    def _timed(self, times: measure.Times, entry: Entry) -> Result:
        """Returns the entry's result with its times and all that follows from them."""
        device = self.conditions.device
        graphed = entry.provider.graphed
        return replace(
            self._with_saved(entry, self._with_times(entry, times)),
            launches=measure.launches(entry.run, device),
            peak_mb=None if graphed else measure.peak_memory_mb(entry.run, device),
        )

    def _learn(self, entry: Entry) -> Result:
        """Trains on the digits from the start and returns the result with its accuracy."""
        training = digits.train(
            entry.call.net,
            entry.call.module,
            batch=self.case.B,
            seed=self.conditions.seed,
            device=self.conditions.device,
        )
        times = measure.Times(env.switches(), training.step_ms)
        return replace(
            self._with_saved(entry, self._with_times(entry, times)),
            accuracy=training.accuracy,
        )

    def _with_times(self, entry: Entry, times: measure.Times) -> Result:
        result = timed(entry.result, times)
        assert result.ms_p50 is not None
        seconds = result.ms_p50 / 1e3
        if self.case.level != "op":
            small = counts_call_to_call(self.case.B, result.call_ms_p50)
            counted = result.call_ms_p50 if small else result.ms_p50
            assert counted is not None
            result = replace(result, images_per_s=1e3 * self.case.B / counted)
        needed = workloads.bytes_needed(self.case)
        if needed is not None:
            return streamed(result, needed, self.conditions.device)
        flops = self._count_flops(entry.provider)
        return replace(result, gflops=flops / 1e9, tflops_per_s=flops / seconds / 1e12)

    def _judge(self, provider: Provider, call: Call, run: Callable[[], Results]) -> Verdict:
        """Compares with the oracle; a gradient may be judged on several draws (see `gate`)."""
        for draw in range(gate.DRAWS):
            oracle = self._oracle(provider.oracle, draw)
            with self._context(provider):
                if draw:
                    call.load(self._inputs(draw), self._seed(draw))
                verdict = oracle.judge(evaluate(call, run))
            if verdict.passed or not verdict.out_passed:
                break
        return verdict

    def _with_saved(self, entry: Entry, result: Result) -> Result:
        """Returns ``result`` with what is kept for the backward pass, where there is one."""
        if not self.case.differentiates:
            return result
        call = entry.call
        kept = saved(call.forward, call.module, call.inputs)
        return replace(result, saved_mb=kept.mb, saved_own_mb=kept.own_mb)

    def _count_flops(self, provider: Provider) -> int:
        if provider.oracle not in self._flops:
            module = self._module(provider.oracle, self.case)
            self._flops[provider.oracle] = measure.flops(module, self._inputs(0), self.case.mode)
        return self._flops[provider.oracle]

    def _oracle(self, source: Source, draw: int) -> Oracle:
        """Returns the oracle, asked once; what it failed with is kept like an answer.

        Raises:
            UnjudgedError: it failed.
        """
        if (source, draw) not in self._oracles:
            self._oracles[source, draw] = self._consult(source, draw)
        known = self._oracles[source, draw]
        if isinstance(known, Result):
            raise UnjudgedError(known)
        return known

    def _consult(self, source: Source, draw: int) -> Oracle | Result:
        judged = workloads.judged(self.case)
        inputs = workloads.inputs(judged, self._seed(draw), self.conditions.device)
        try:
            return gate.consult(
                lambda case: self._module(source, case), judged, inputs, self._seed(draw)
            )
        except Exception as error:
            result = failure(error, self.conditions.device)
            return replace(result, reason=f"the check of {judged.B} images: {result.reason}")

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
        stack.enter_context(settings(self.case))
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
