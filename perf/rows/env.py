"""The environment that a row was measured in."""

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import sknet_triton

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """Where, when and by which versions a row was measured; the last columns of the CSV.

    What a machine does not have is an empty string, or 0 for the clock. ``git_dirty`` tells
    whether a Python file differed from the commit. ``ranks`` is how many processes shared the
    sweep, possibly on one machine.
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


def snapshot(device: torch.device, seed: int, ranks: int) -> Environment:
    """Returns the environment as it is now; the clock and the time are this moment's."""
    sha, dirty = _git_state()
    return Environment(
        gpu=gpu_name(device),
        sm_clock_mhz=int(_nvidia_smi("clocks.sm", device) or 0),
        driver=_driver(device),
        cuda=(torch.version.cuda or torch.version.hip or "") if device.type == "cuda" else "",
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
    sha = _output("git", "-C", str(CHECKOUT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(CHECKOUT), "status", "--porcelain", "--", "*.py")
    return sha, bool(changes)


@functools.cache
def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@functools.cache
def _driver(device: torch.device) -> str:
    return _nvidia_smi("driver_version", device)


def _nvidia_smi(field: str, device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return _output(
        "nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={field}", "--format=csv,noheader,nounits"
    )


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """Returns what ``command`` prints; nothing where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
