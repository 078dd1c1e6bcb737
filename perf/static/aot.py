"""Compiles the package's launches for machines that are not there, and reads what came out.

Triton's own launch path is taken, with a driver that only names a target: specialisation of
arguments, of ones and of multiples of 16 included.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sknet_kernels.config import DeviceFacts
from sknet_kernels.launch import Launch

_LOAD_STORE_PTX = re.compile(r"\b(ld|st)\.global(?:\.[a-zA-Z0-9_:]+)*?(?:\.v(\d))?\.[a-z](\d+)\b")
_COPY_PTX = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)")
_LOAD_STORE_GCN = re.compile(
    r"\b(?:global|buffer)_(load|store)_[us]?(byte|short|dword)(?:x(\d))?(?:_d16\w*)?\b"
)
_GCN_BYTES = {"byte": 1, "short": 2, "dword": 4}


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, and what launch configurations ask of it."""

    arch: int | str
    facts: DeviceFacts


TARGETS = {
    "sm_80": Target(80, DeviceFacts(multiprocessors=108, warp_size=32)),
    "sm_90": Target(90, DeviceFacts(multiprocessors=132, warp_size=32)),
    "sm_100": Target(100, DeviceFacts(multiprocessors=148, warp_size=32)),
    "gfx942": Target("gfx942", DeviceFacts(multiprocessors=304, warp_size=64, backend="hip")),
}
# An H100, whose machine code the model reads.
MODELLED = "sm_90"


@dataclass
class NullDriver:
    """A driver of Triton's without a device: kernels are compiled and bound, and none runs.

    CPU tensors stand for a GPU's; what a launch writes is left as it was.

    Attributes:
        target: that kernels are compiled for.
        launches: that went into nothing: a kernel's name and its programs.
    """

    target: Target
    launches: list[tuple[str, int]] = field(default_factory=list)

    @property
    def utils(self) -> "NullDriver":
        """What Triton's loader asks."""
        return self

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        """Loads nothing: a module and a function, registers, spills and threads of a program."""
        return name, name, 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: Any) -> dict[str, int]:
        """Returns what the loader compares a kernel with."""
        multiprocessors = self.target.facts.multiprocessors
        return {"max_shared_mem": 232_448, "multiprocessor_count": multiprocessors}

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """Returns what launches a kernel."""
        return lambda x, y, z, *_: self.launches.append((metadata.name, x * y * z))

    def get_current_target(self) -> Any:
        """Returns the target as Triton has it."""
        facts = self.target.facts
        return GPUTarget(facts.backend, self.target.arch, facts.warp_size)

    def get_current_device(self) -> str:
        """Returns the key of Triton's in-process cache, which is no device's number."""
        return str(self.target)

    def get_current_stream(self, device: Any = None) -> int:
        """Returns a stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Returns where tensors lie."""
        return torch.device("cpu")


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


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled: what it takes, Triton's IR, and machine code, None of AMD's."""

    resources: Resources
    ttir: str
    cubin: bytes | None

    @functools.cached_property
    def sass(self) -> str:
        """The listing of the machine code, which takes longer to make than the code itself."""
        if self.cubin is None:
            raise ValueError("sass: expected a kernel compiled for a GPU of NVIDIA's, got AMD's")
        return _cuobjdump(self.cubin, "--dump-sass")


# By the hash of the compiled kernel: launches of many sizes share one.
_COMPILED: dict[str, Compiled] = {}


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compiles the kernel of ``launch`` for ``target``; its tensors may lie on the meta device."""
    driver.set_active(NullDriver(target))
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
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        spill_bytes=_number(r"LOCAL:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        shared_bytes=shared_bytes,
        load_bytes=widths["ld"],
        store_bytes=widths["st"],
        tf32=".tf32" in asm["ptx"],
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def _amd(asm: dict[str, Any], shared_bytes: int) -> Resources:
    text = asm["amdgcn"]
    widths = {"load": 0, "store": 0}
    for kind, unit, count in _LOAD_STORE_GCN.findall(text):
        widths[kind] = max(widths[kind], _GCN_BYTES[unit] * int(count or 1))
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
