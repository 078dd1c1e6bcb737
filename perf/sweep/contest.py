"""One case: every provider is built, checked against the oracle, then timed against the others.

A pass is a kernel that streams branches, as it is launched, or a copy beside it. What the kernel
computes is judged by a training step of `sk_fuse_select` at the same sizes, in the same process.
"""

import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sknet_triton as skt
from perf.peers import digits
from perf.rows import env, one_line
from perf.rows.schema import Case, Result, counts_call_to_call
from perf.static.bytes import saved
from perf.sweep import gate, measure, workloads
from perf.sweep.gate import Oracle
from perf.sweep.providers import PASSES_OF, PROVIDERS, Call, Provider, Results, evaluate, settings
from perf.sweep.workloads import Source


@dataclass(frozen=True)
class Conditions:
    """What is the same for every case of a sweep."""

    device: torch.device
    seed: int  # draws parameters and inputs
    seconds: float  # sampling time of each provider of a case
    rounds: int  # how many turns that time is cut into


class BudgetSpentError(BaseException):
    """The time is up. Not an Exception, so that no failing case can pass for it or catch it."""


class DeviceLostError(Exception):
    """An error after which the device answers nothing more in this process."""


@dataclass(frozen=True)
class Entry:
    """A provider that passed the gate, and what is known of it before it is timed."""

    provider: Provider
    result: Result
    run: Callable[[], object]  # one call, as it is or in a graph
    call: Call | None = None  # none of a pass, which is a launch alone


def measure_case(
    case: Case, providers: tuple[Provider, ...], conditions: Conditions
) -> dict[str, Result]:
    """Carries ``case`` out by every provider; what goes wrong is a result like any other.

    Where the budget is spent while providers are built and checked, those that are ready are still
    timed, and the others have no result. A device that is lost is a DeviceLostError.
    """
    contest = Contest(case, conditions)
    return contest.judge(providers) | contest.time()


def judge_case(
    case: Case, providers: tuple[Provider, ...], conditions: Conditions
) -> dict[str, Result]:
    """Carries ``case`` out once by every provider and judges it; no clock runs."""
    return Contest(case, conditions).judge(providers)


def failure(error: Exception, device: torch.device) -> Result:
    """Returns the row of a provider that raised ``error``; DeviceLostError where that is it."""
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
    errors = 0
    for _ in range(2 if device.type == "cuda" else 0):
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:  # which the first call may report of an error that is over with it
            errors += 1
    return errors == 2


@functools.cache
def _judged_step(step: Case, conditions: Conditions) -> Result:
    """Judges the training step that passes are part of, once for all of them."""
    return judge_case(step, (PROVIDERS[PASSES_OF],), conditions)[PASSES_OF]


class Contest:
    """The providers of one case, with the parameters and the oracle that they share."""

    def __init__(self, case: Case, conditions: Conditions) -> None:
        self.case = case
        self.conditions = conditions
        self.device = conditions.device
        self._entries: dict[str, Entry] = {}
        self._masters: dict[Source, nn.Module] = {}
        # What an oracle failed with is kept like an answer.
        self._oracles: dict[tuple[Source, int], Oracle | Result] = {}
        self._flops: dict[Source, int] = {}

    def judge(self, providers: tuple[Provider, ...]) -> dict[str, Result]:
        """Returns a result for every provider; those that pass the gate can be timed.

        A budget that is spent meanwhile leaves out the providers that are not done.
        """
        # Dynamo keeps what it compiled by code object: an old case would count as a recompilation.
        torch.compiler.reset()
        nobody = workloads.unsupported(self.case, self.device)
        results: dict[str, Result] = {}
        for provider in providers:
            reason = nobody or provider.unavailable(self.case, self.device)
            try:
                results[provider.name] = (
                    Result("unsupported", reason) if reason else self._admitted(provider)
                )
            except BudgetSpentError:
                break
            except Exception as error:
                results[provider.name] = failure(error, self.device)
        return results

    def _admitted(self, provider: Provider) -> Result:
        """Builds ``provider`` and compares it with the oracle; one that is right is an entry."""
        if self.case.level == "pass":
            return self._admitted_pass(provider)
        oracle = self._oracle(provider.oracle, 0)
        if isinstance(oracle, Result):
            return oracle
        module = self._module(provider.source, self.case)
        net, seed = provider.wrapped(module), self.conditions.seed
        call = Call(self.case, module, net, self._inputs(0), seed)
        with self._context(provider), _cold_compilation():
            start = time.perf_counter()
            run = provider.prepared(call)
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            first_call = time.perf_counter() - start
        result = self._judged(provider, call, run)
        result = replace(result, compile_s=first_call if provider.compiles else None)
        if result.status == "ok":
            self._entries[provider.name] = Entry(provider, result, run, call)
        return result

    def _admitted_pass(self, provider: Provider) -> Result:
        step = replace(self.case, level="op", workload="sk_fuse_select", mode="train")
        copies = self.case.workload == "copy"
        result = Result("ok") if copies else _judged_step(step, self.conditions)
        if result.status == "ok":
            run = workloads.pass_of(self.case, self.device)
            self._entries[provider.name] = Entry(provider, result, run)
        return result

    def _judged(self, provider: Provider, call: Call, run: Callable[[], Results]) -> Result:
        """Compares with the oracle; a gradient may be judged on several draws (see `gate`)."""
        for draw in range(gate.DRAWS):
            oracle = self._oracle(provider.oracle, draw)
            if isinstance(oracle, Result):
                return oracle
            with self._context(provider):
                if draw:
                    call.load(self._inputs(draw), self.conditions.seed + draw)
                verdict = oracle.judge(evaluate(call, run))
            if verdict.passed or not verdict.out_passed:
                break
        return Result(
            "ok" if verdict.passed else "unverified",
            "" if verdict.passed else verdict.reason,
            judged_batch=workloads.judged(self.case).B,
            **asdict(verdict),
        )

    def time(self) -> dict[str, Result]:
        """Times the entries and returns their complete results."""
        finish: dict[str, Callable[[Entry], Result]] = dict.fromkeys(self._entries, self._learned)
        failed: dict[str, Exception] = {}
        if self.case.level != "workload":
            times, failed = measure.interleaved(
                {name: entry.run for name, entry in self._entries.items()},
                lambda name: self._context(self._entries[name].provider),
                self.device,
                self.conditions.seconds,
                self.conditions.rounds,
            )
            finish = {name: partial(self._timed, taken) for name, taken in times.items()}
        results = {name: failure(error, self.device) for name, error in failed.items()}
        for name, complete in finish.items():
            entry = self._entries[name]
            try:
                with self._context(entry.provider):
                    results[name] = complete(entry)
            except Exception as error:
                results[name] = failure(error, self.device)
        return results

    def _learned(self, entry: Entry) -> Result:
        """Trains on the digits from the start and returns the result with its accuracy."""
        assert entry.call is not None
        net, module = entry.call.net, entry.call.module
        step_ms, accuracy = digits.train(
            net, module, batch=self.case.B, seed=self.conditions.seed, device=self.device
        )
        times = measure.Times(env.switches(), step_ms)
        return replace(self._with_times(entry, times), accuracy=accuracy)

    def _timed(self, times: measure.Times, entry: Entry) -> Result:
        graphed = entry.provider.graphed
        return replace(
            self._with_times(entry, times),
            launches=measure.launches(entry.run, self.device),
            peak_mb=None if graphed else measure.peak_memory_mb(entry.run, self.device),
        )

    def _with_times(self, entry: Entry, times: measure.Times) -> Result:
        """Returns the entry's result with its times and all that follows from them."""
        p20, p50, p80 = measure.quantiles(times.ms)
        known: dict[str, Any] = {"ms_p50": p50, "ms_p20": p20, "ms_p80": p80, "n": len(times.ms)}
        counted = p50
        if times.call_ms:
            call_p20, call_p50, call_p80 = measure.quantiles(times.call_ms)
            known |= {"call_ms_p50": call_p50, "call_ms_p20": call_p20, "call_ms_p80": call_p80}
            counted = call_p50 if counts_call_to_call(self.case.B, call_p50) else p50
        if self.case.level not in ("op", "pass"):
            known["images_per_s"] = 1e3 * self.case.B / counted
        needed = workloads.bytes_needed(self.case)
        if needed is None:
            flops = self._count_flops(entry.provider.oracle)
            known |= {"gflops": flops / 1e9, "tflops_per_s": flops / p50 / 1e9}
        else:
            copied = measure.copy_gbps(self.device)
            known |= {"bytes_needed": needed, "copy_gbps": copied}
            if needed:
                gbps = needed / p50 / 1e6
                known |= {"gbps": gbps, "pct_copy": 100 * gbps / copied}
        if self.case.differentiates and (call := entry.call):
            kept = saved(call.forward, call.module, call.inputs)
            known |= {"saved_mb": kept.mb, "saved_own_mb": kept.own_mb}
        return replace(entry.result, **known, **asdict(times.switches))

    def _count_flops(self, source: Source) -> int:
        if source not in self._flops:
            module = self._module(source, self.case)
            self._flops[source] = measure.flops(module, self._inputs(0), self.case.mode)
        return self._flops[source]

    def _oracle(self, source: Source, draw: int) -> Oracle | Result:
        """Returns the oracle, asked once, or what it failed with, which is no provider's fault."""
        if (source, draw) not in self._oracles:
            judged, seed = workloads.judged(self.case), self.conditions.seed + draw
            inputs = workloads.inputs(judged, seed, self.device)
            oracle: Oracle | Result
            try:
                oracle = gate.consult(lambda case: self._module(source, case), judged, inputs, seed)
            except Exception as error:
                failed = failure(error, self.device)
                oracle = replace(failed, reason=f"the check of {judged.B} images: {failed.reason}")
            self._oracles[source, draw] = oracle
        return self._oracles[source, draw]

    def _module(self, source: Source, case: Case) -> nn.Module:
        if source not in self._masters:
            self._masters[source] = workloads.parameters(self.case, source, self.conditions.seed)
        master = copy.deepcopy(self._masters[source])
        return workloads.place_module(master, case, self.device)

    def _inputs(self, draw: int) -> tuple[Tensor, ...]:
        return workloads.inputs(self.case, self.conditions.seed + draw, self.device)

    @contextmanager
    def _context(self, provider: Provider) -> Iterator[None]:
        with settings(self.case), skt.use_backend(provider.backend):
            yield


@contextmanager
def _cold_compilation() -> Iterator[None]:
    """A context in which a compilation takes nothing from caches that an earlier run filled."""
    config = torch.compiler.config
    with config.patch(force_disable_caches=True), warnings.catch_warnings():  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield
