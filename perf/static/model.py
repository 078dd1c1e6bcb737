"""How near a streaming kernel can come to the memory's speed: modelled, not measured.

The model reads the machine code that is compiled for an H100 (sm_90) and assumes:

- 132 multiprocessors at 1.7 GHz, four schedulers each, that issue one instruction a cycle;
- a load takes 1,100 cycles, whatever lies on its way; any other result 4;
- as many programs are resident as registers, shared memory and warps allow, and no more than there
  are; they run the kernel's longest loop that loads, always;
- a warp goes through that loop in order and waits for what it reads. Asynchronous copies of a loop
  of n stages are waited for once in n - 1 turns, or once where there are fewer turns;
- writes wait for nothing, caches give nothing, and the lanes of a tile that overshoot the tensor
  move nothing but cost their instructions.

By Little's law, bytes under way over time is the bandwidth that the resident programs can ask for;
the issue slots limit it, too. Expect plus or minus 30 %: what the model finds is orders of
magnitude. To compare with: a copy moves about 3.0 TB/s on an H100 and 4.3 TB/s on an H200.
"""

import itertools
import re
from dataclasses import dataclass

from perf.static.aot import MODELLED, TARGETS, Compiled, Resources
from perf.static.specialisations import Setting
from sknet_kernels.config import StreamingKernel, cdiv
from sknet_kernels.launch import Launch
from sknet_kernels.small import SmallConfig, SmallKernel, SmallProblem

COPY_TB_S = {"H100": 3.0, "H200": 4.3}

_MULTIPROCESSORS = TARGETS[MODELLED].facts.multiprocessors
_GHZ = 1.7
_SCHEDULERS = 4
_LOAD_CYCLES, _OTHER_CYCLES = 1100, 4
_REGISTERS, _REGISTER_UNIT = 65536, 256
_SHARED_BYTES, _SHARED_OVERHEAD = 228 * 1024, 1024
_MOST_WARPS, _MOST_PROGRAMS, _LANES = 64, 32, 32

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\*")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)?0x([0-9a-f]+)")
_PREDICATE = re.compile(r"^@!?U?P\d+\s+")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")


@dataclass(frozen=True)
class Ceiling:
    """What the model makes of one launch.

    Attributes:
        programs: of the launch.
        resident: programs that a multiprocessor holds at once.
        waves: how many times the machine is filled.
        load_groups: how often a turn of the loop waits for memory.
        asynchronous: whether loads are asynchronous copies.
        flight_kb: KiB under way a multiprocessor, at each of these waits.
        tb_s: the ceiling in TB/s, of bytes that count as passes.
    """

    programs: int
    resident: int
    waves: float
    load_groups: int
    asynchronous: bool
    flight_kb: float
    tb_s: float


def ceiling(
    setting: Setting, kernel: StreamingKernel, launch: Launch, compiled: Compiled
) -> Ceiling:
    """Returns the modelled ceiling of ``launch`` on ``setting``, compiled for an H100."""
    resident = _resident(compiled.resources, launch.num_warps)
    a_multiprocessor = min(resident, launch.programs / _MULTIPROCESSORS)
    body = _loop(compiled.sass)
    cycles, groups = _played(body)
    asynchronous = any("LDGSTS" in text for text in body)
    turns = launch.scalars["tiles"]
    if asynchronous:
        overlapping = max(1, min(launch.constants["TILE"].num_stages - 1, turns))
        cycles = max(cycles, _LOAD_CYCLES // overlapping)
    issued = len(body) * launch.num_warps * a_multiprocessor / _SCHEDULERS
    tile = _tile_bytes(setting, kernel, launch)
    reads, beside = kernel.reads
    flight = a_multiprocessor * (reads * setting.M + beside) * tile / groups
    rate = a_multiprocessor * kernel.passes(setting.M) * tile / max(cycles, issued, 1)
    return Ceiling(
        programs=launch.programs,
        resident=resident,
        waves=launch.programs / _MULTIPROCESSORS / max(resident, 1),
        load_groups=groups,
        asynchronous=asynchronous,
        flight_kb=flight / 1024,
        tb_s=rate * _GHZ * _MULTIPROCESSORS / 1000,
    )


@dataclass(frozen=True)
class Reading:
    """What the model makes of one launch of a small kernel.

    Attributes:
        programs: of the launch.
        resident: programs that a multiprocessor holds at once.
        waves: how many times the machine is filled.
        read_kb: KiB that the multiprocessor with the most programs reads.
    """

    programs: int
    resident: int
    waves: float
    read_kb: float


def reading(
    kernel: SmallKernel, problem: SmallProblem, config: SmallConfig, compiled: Compiled
) -> Reading:
    """Returns what a launch of a small kernel reads on an H100, as `SmallKernel` counts it."""
    facts = TARGETS[MODELLED].facts
    programs = kernel.programs(problem, config)
    resident = _resident(compiled.resources, config.num_warps)
    return Reading(
        programs=programs,
        resident=resident,
        waves=programs / _MULTIPROCESSORS / max(resident, 1),
        read_kb=kernel.busiest(problem, config, facts) * problem.itemsize / 1024,
    )


def _tile_bytes(setting: Setting, kernel: StreamingKernel, launch: Launch) -> float:
    """Bytes of a branch in a tile, on average over the tiles that programs walk."""
    B, C, S = setting.shape
    images = 1 if kernel.joins_images else B
    tiles = int(launch.scalars["tiles"]) * int(launch.scalars["splits"]) * images
    rows = cdiv(C, launch.constants["TILE"].block_c)
    return B * C * S * setting.dtype.itemsize / max(1, tiles * rows)


def _resident(used: Resources, warps: int) -> int:
    a_warp = cdiv(used.registers * _LANES, _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // a_warp // warps
    by_shared = _SHARED_BYTES // (used.shared_bytes + _SHARED_OVERHEAD)
    return min(by_registers, by_shared, _MOST_WARPS // warps, _MOST_PROGRAMS)


def _loop(sass: str) -> list[str]:
    """The longest loop that loads from global memory, or all of the code where there is none."""
    code = [(int(m[1], 16), m[2].strip()) for m in map(_LINE.match, sass.splitlines()) if m]
    loops = []
    for end, text in code:
        back = _BRANCH.search(text)
        if back and int(back[1], 16) < end - 16:
            body = [t for address, t in code if int(back[1], 16) <= address <= end]
            if any("LDG" in t for t in body):
                loops.append(body)
    return max(loops, key=len, default=[text for _, text in code])


def _played(body: list[str]) -> tuple[int, int]:
    """Cycles of one turn, in order, and how often it waits for memory."""
    ready: dict[int, int] = {}
    now, loads = 0, []
    for text in body:
        name, _, rest = _PREDICATE.sub("", text).partition(" ")
        operands = [x.strip() for x in rest.split(",")] if rest else []
        returns_nothing = name.startswith(("STG", "STS", "BRA", "EXIT", "BAR"))
        read = operands if returns_nothing else operands[1:]
        now = max([now, *(ready.get(r, 0) for x in read for r in _registers(x))]) + 1
        if name.startswith("LDG"):
            loads.append(now)
        target = re.match(r"R(\d+)", operands[0]) if operands and not returns_nothing else None
        if target and name.startswith("LDGSTS"):
            continue
        if target:
            width = 4 if ".128" in name else 2 if ".64" in name else 1
            is_load = name.startswith("LDG")
            for register in range(int(target[1]), int(target[1]) + (width if is_load else 1)):
                ready[register] = now + (_LOAD_CYCLES if is_load else _OTHER_CYCLES)
    pauses = (b - a > _LOAD_CYCLES / 2 for a, b in itertools.pairwise(loads))
    return now, 1 + sum(pauses)


def _registers(operand: str) -> list[int]:
    return [
        int(found[1]) + i
        for found in _REGISTER.finditer(operand)
        for i in range(2 if found[2] else 1)
    ]
