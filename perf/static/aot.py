"""Compiles the package's launches for machines that are not there, and reads what came out.

Triton's own launch path is taken, with a driver that only names a target: specialisation of
arguments, of ones and of multiples of 16 included. Nothing is run.
"""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sknet_kernels.config import DeviceFacts
from sknet_kernels.launch import Launch

_LOAD_STORE_PTX = re.compile(r"\b(ld|st)\.global(?:\.[a-zA-Z0-9_:]+)*?(?:\.v(\d))?\.[a-z](\d+)\b")
_COPY_PTX = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)")
_LOAD_STORE_GCN = re.compile(r"\b(?:global|buffer)_(load|store)_([a-z0-9_]+)")
_GCN_BYTES = {
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "short_d16": 2,
    "short_d16_hi": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, and what launch configurations ask of it."""

    name: str
    arch: int | str
    facts: DeviceFacts


TARGETS = (
    Target("sm_80", 80, DeviceFacts(multiprocessors=108, warp_size=32)),
    Target("sm_90", 90, DeviceFacts(multiprocessors=132, warp_size=32)),
    Target("sm_100", 100, DeviceFacts(multiprocessors=148, warp_size=32)),
    Target("gfx942", "gfx942", DeviceFacts(multiprocessors=304, warp_size=64, backend="hip")),
)


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled: what it takes, Triton's IR, and machine code, None of AMD's."""

    resources: "Resources"
    ttir: str
    cubin: bytes | None

    @functools.cached_property
    def sass(self) -> str:
        """The listing of the machine code, which takes longer to make than the code itself."""
        if self.cubin is None:
            raise ValueError("sass: expected a kernel compiled for a GPU of NVIDIA's, got AMD's")
        return _cuobjdump(self.cubin, "--dump-sass")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of spills, stack and shared memory.

    ``load_bytes`` and ``store_bytes`` are the widest global access of one thread; ``tf32`` says
    whether a matrix product rounds its factors to 10 bits.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int
    tf32: bool


class _TargetOnlyDriver:
    """Stands in for a device driver: it answers what a compilation asks and can launch nothing."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # the key of Triton's in-process kernel cache

    def get_current_stream(self, device: Any) -> int:
        return 0


# By the hash of the compiled kernel: launches of many sizes share one.
_COMPILED: dict[str, Compiled] = {}


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compiles the kernel of ``launch`` for ``target``; its tensors may lie on the meta device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        _TargetOnlyDriver(GPUTarget(target.facts.backend, target.arch, target.facts.warp_size))
    )
    kernel = launch.kernel.warmup(
        **launch.arguments, **launch.constants, **launch.options, grid=(launch.programs,)
    )
    if kernel.hash not in _COMPILED:
        read = _nvidia if target.facts.backend == "cuda" else _amd
        resources = read(kernel.asm, kernel.metadata.shared)
        _COMPILED[kernel.hash] = Compiled(resources, kernel.asm["ttir"], kernel.asm.get("cubin"))
    return _COMPILED[kernel.hash]


def _nvidia(asm: dict[str, Any], shared_bytes: int) -> Resources:
    usage = _cuobjdump(asm["cubin"], "--dump-resource-usage")
    widths = {"ld": 0, "st": 0}
    for kind, lanes, bits in _LOAD_STORE_PTX.findall(asm["ptx"]):
        widths[kind] = max(widths[kind], int(lanes or 1) * int(bits) // 8)
    for copied in _COPY_PTX.findall(asm["ptx"]):  # into shared memory, asynchronously
        widths["ld"] = max(widths["ld"], int(copied, 0))
    spills = re.search(r"LOCAL:(\d+)", usage)
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        spill_bytes=int(spills[1]) if spills else 0,
        stack_bytes=_number(r"STACK:(\d+)", usage),
        shared_bytes=shared_bytes,
        load_bytes=widths["ld"],
        store_bytes=widths["st"],
        tf32=".tf32" in asm["ptx"],
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def _amd(asm: dict[str, Any], shared_bytes: int) -> Resources:
    text = asm["amdgcn"]
    widths = {"load": 0, "store": 0}
    for kind, suffix in _LOAD_STORE_GCN.findall(text):
        widths[kind] = max(widths[kind], _GCN_BYTES[suffix])
    return Resources(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        # Scalar registers spill into lanes of vector registers, and where these are not enough,
        # the stack has them.
        spill_bytes=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        stack_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        shared_bytes=shared_bytes,
        load_bytes=widths["load"],
        store_bytes=widths["store"],
        tf32="_xf32" in text,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the compiler's output")
    return int(found[1])
