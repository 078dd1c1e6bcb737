"""The environment that a row was measured in."""

import functools
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import sknet_triton

# A driver in trouble lets nvidia-smi wait for ever.
ANSWER_SECONDS = 10.0
# Says which commit a copy without .git is of.
COMMIT_VARIABLE = "SKNET_TRITON_COMMIT"

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """Where, when and by which versions a row was measured; the last columns of the CSV.

    What a machine does not have is an empty string, or 0 for the clock. ``git_dirty`` tells
    whether a Python file differed from the commit; a copy without ``.git`` takes the commit that
    the environment variable ``SKNET_TRITON_COMMIT`` names, at its word. ``ranks`` is how many
    processes shared the sweep, possibly on one machine.
    """

    gpu: str
    sm_clock_mhz: int
    driver: str
    cuda: str
    cpu: str
    cores: int
    threads: int
    ranks: int
    os: str
    python: str
    torch: str
    triton: str
    sknet_triton: str
    git_sha: str
    git_dirty: bool
    seed: int
    timestamp_utc: str


@dataclass(frozen=True)
class Switches:
    """What PyTorch is set to, as columns of a row: read while its provider is timed."""

    cudnn: bool
    cudnn_benchmark: bool  # whether it chooses its algorithms by timing them
    cudnn_deterministic: bool
    cudnn_tf32: bool  # whether convolutions in float32 may compute in TF32
    matmul_tf32: bool  # whether products of matrices in float32 may
    deterministic: bool  # whether PyTorch is to use repeatable algorithms only
    timed_threads: int


def switches() -> Switches:
    """Returns the switches as they are now."""
    cudnn = torch.backends.cudnn
    return Switches(
        cudnn=cudnn.enabled,
        cudnn_benchmark=cudnn.benchmark,
        cudnn_deterministic=cudnn.deterministic,
        cudnn_tf32=cudnn.allow_tf32,
        matmul_tf32=torch.get_float32_matmul_precision() != "highest",
        deterministic=torch.are_deterministic_algorithms_enabled(),
        timed_threads=torch.get_num_threads(),
    )


def snapshot(device: torch.device, seed: int, ranks: int) -> Environment:
    """Returns the environment as it is now; the clock and the time are this moment's."""
    sha, dirty = _git_state()
    on_a_gpu = device.type == "cuda"
    return Environment(
        gpu=gpu_name(device),
        sm_clock_mhz=_sm_clock_mhz(device) if on_a_gpu else 0,
        driver=_driver() if on_a_gpu else "",
        cuda=(torch.version.cuda or torch.version.hip or "") if on_a_gpu else "",
        cpu=_cpu_model(),
        cores=os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        ranks=ranks,
        os=platform.platform(terse=True),
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=_version("triton"),
        sknet_triton=sknet_triton.__version__,
        git_sha=sha,
        git_dirty=dirty,
        seed=seed,
        timestamp_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def default_device(local_rank: int) -> torch.device:
    """Returns this process's GPU where there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def gpu_name(device: torch.device) -> str:
    """Returns the name of the GPU, or an empty string for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@functools.cache
def _git_state() -> tuple[str, bool]:
    if not (CHECKOUT / ".git").exists():
        # A repository around the copy is another one.
        return os.environ.get(COMMIT_VARIABLE, ""), False
    sha = _output("git", "-C", str(CHECKOUT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(CHECKOUT), "status", "--porcelain", "--", "*.py")
    return sha, bool(changes)


@functools.cache
def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


@functools.cache
def _driver() -> str:
    # All GPUs of a machine have one driver, and one may not be asked for by its id.
    return _nvidia_smi("driver_version")


def _sm_clock_mhz(device: torch.device) -> int:
    """Returns the clock of the multiprocessors; 0 where none is told, as of a part of a GPU."""
    uuid = torch.cuda.get_device_properties(device).uuid
    clock = _nvidia_smi("clocks.sm", f"--id=GPU-{uuid}")
    return int(clock) if clock.isdecimal() else 0


def _nvidia_smi(field: str, *options: str) -> str:
    """Returns the first answer of nvidia-smi; empty where it says in brackets that it has none."""
    query = (f"--query-gpu={field}", "--format=csv,noheader,nounits")
    answer = _output("nvidia-smi", *options, *query).partition("\n")[0].strip()
    return "" if answer.startswith("[") else answer


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """Returns what ``command`` prints; nothing where it is not installed, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
