"""Finds 32-bit arithmetic in the addresses of compiled kernels, where the interpreter shows none.

``python -m tests.address_arithmetic`` compiles every kernel for a GPU that is not there and prints
a line for each offset that passes through a 32-bit sum or product. It runs in a process of its own,
without ``TRITON_INTERPRET``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ASSIGNMENT = re.compile(r"^\s*(?P<results>%[\w.#:, %]+?) = (?P<op>[\w.]+)(?P<rest>.*)$")
_LOOP = re.compile(r"scf\.for %(\S+) = %(\S+) to %\S+ step %(\S+)(?: iter_args\((.*?)\))?")
_NAME = re.compile(r"%([\w.]+)")
_NARROW = re.compile(r": (?:tensor<[\dx]+x)?i32\b")
_GROWING = ("arith.addi", "arith.muli", "arith.subi", "arith.shli")
# A remainder or a quotient is no larger than what is divided.
_BOUNDED = ("arith.divsi", "arith.remsi", "arith.divui", "arith.remui", "tt.load", "tt.make_range")


@dataclass(frozen=True)
class Operation:
    """One line of Triton's IR: what it is, the names it reads, whether its result has 32 bits."""

    op: str
    operands: tuple[str, ...]
    narrow: bool
    line: str


@dataclass
class Kernel:
    """The operations of one kernel by the names of their results; an argument has none."""

    operations: dict[str, Operation] = field(default_factory=dict)
    # What a loop's variable is before the loop and after each turn.
    carried: dict[str, list[str]] = field(default_factory=dict)
    # The operand of every ``tt.addptr`` that is added to a pointer.
    offsets: list[str] = field(default_factory=list)


def narrow_offsets(ttir: str) -> list[str]:
    """Returns the 32-bit sums and products that offsets of pointers are made of."""
    kernel = _parsed(ttir)
    found: dict[str, None] = {}
    seen: set[str] = set()
    waiting = list(kernel.offsets)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        waiting += kernel.carried.get(name, [])
        made = kernel.operations.get(name)
        if made is None or made.op in _BOUNDED:
            continue
        if made.op in _GROWING and made.narrow and not _rounds_down(made, kernel):
            found[made.line] = None
        waiting += made.operands
    return list(found)


def _rounds_down(made: Operation, kernel: Kernel) -> bool:
    """Tells whether the product is n // a * a, as `known_multiple` writes it."""
    if made.op != "arith.muli":
        return False
    quotient = kernel.operations.get(made.operands[0])
    return (
        quotient is not None
        and quotient.op == "arith.divsi"
        and quotient.operands[1] == made.operands[1]
    )


def _parsed(ttir: str) -> Kernel:
    kernel = Kernel()
    regions: list[tuple[list[str], list[str]]] = []  # variables, and the name of the results
    for line in ttir.splitlines():
        text, region = line.split(" loc(")[0], None
        if line.lstrip().startswith("}"):
            region = regions.pop()
        if line.rstrip().endswith("{"):
            regions.append(region or _open_region(text, kernel))
        elif "scf.yield" in text:
            variables, results = regions[-1]
            values = _NAME.findall(text.split(" : ")[0])
            for variable, value in zip(variables, values, strict=bool(variables)):
                kernel.carried[variable].append(value)
            for result in results:
                kernel.carried[result] = kernel.carried.get(result, []) + values
        else:
            _add(text, kernel)
    return kernel


def _open_region(text: str, kernel: Kernel) -> tuple[list[str], list[str]]:
    """Returns the variables and the results of the loop or branch that ``text`` opens."""
    if "scf.while" in text:
        raise ValueError(f"ttir: expected no loop but scf.for, got {text.strip()!r}")
    loop = _LOOP.search(text)
    if loop is not None:
        return _open_loop(text, loop, kernel)
    if "scf.if" in text:
        return [], _NAME.findall(text.split("scf.if")[0])
    _add(text, kernel)
    return [], []


def _open_loop(text: str, loop: re.Match[str], kernel: Kernel) -> tuple[list[str], list[str]]:
    counter, start, step, arguments = loop.groups()
    kernel.carried[counter] = [start, step]
    pairs = re.findall(r"%([\w.]+) = %([\w.]+)", arguments or "")
    kernel.carried |= {variable: [before] for variable, before in pairs}
    # `%x:3 = scf.for` has the results %x#0, %x#1 and %x#2, which `_NAME` reads as x.
    return [variable for variable, _ in pairs], _NAME.findall(text.split("scf.for")[0])


def _add(text: str, kernel: Kernel) -> None:
    found = _ASSIGNMENT.match(text)
    if found is None:
        return
    operands = tuple(_NAME.findall(found["rest"].split(" : ")[0]))
    made = Operation(found["op"], operands, bool(_NARROW.search(found["rest"])), text.strip())
    for result in _NAME.findall(found["results"]):
        kernel.operations[result] = made
    if made.op == "tt.addptr":
        kernel.offsets.append(operands[1])


def _compiled() -> Iterator[tuple[str, str]]:
    """Yields name and IR of every kernel with three branches, in every way to read them."""
    import torch

    from perf.static.aot import TARGETS, compile_launch
    from perf.static.specialisations import FAST_SHAPE, LAYOUTS, Setting

    target = TARGETS["sm_90"]
    settings = [Setting(3, layout, torch.bfloat16, FAST_SHAPE) for layout in LAYOUTS]
    settings.append(Setting(3, "contiguous", torch.bfloat16, (128, 1024, 49)))
    for setting in settings:
        for launch in setting.launches(target.facts):
            yield launch.kernel.__name__, compile_launch(launch, target).ttir


def main() -> None:
    """Prints ``kernel: line`` for every find, and ``kernel`` for every kernel looked at."""
    for name, ttir in _compiled():
        print(name)
        for line in narrow_offsets(ttir):
            print(f"{name}: {line}")


if __name__ == "__main__":
    main()
