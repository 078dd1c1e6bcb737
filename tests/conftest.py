"""Without a GPU the kernels run in Triton's interpreter, chosen before triton is imported."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import distributions
from pathlib import Path
from platform import python_version
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from tests.interpreter import patch_the_language_once_a_launch
from tests.processes import fill_fresh_memory_with_nan

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    # The tensors are small: threads, also of child processes, would only wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    # Inductor would start a process that compiles for GPUs.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # A CUDA build of torch that finds a compiler would write to stderr that there is no device.
    os.environ.setdefault("CUDA_PATH", "")
    patch_the_language_once_a_launch()
# A file stays in one worker: what begins late and takes long would leave the others idle.
LONGEST = (
    *("test_aot", "test_compile", "test_properties", "test_export"),
    *("test_ops", "test_distributed", "test_module_contract", "test_promises"),
    *("test_perf_campaign", "test_perf_store", "test_sk_fuse_select", "test_sync_batchnorm"),
)
# What is compared with float64 is computed in the dtype that it claims, and repeatably.
torch.backends.cudnn.allow_tf32 = False
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _from_the_same_state() -> None:
    torch.manual_seed(0)
    fill_fresh_memory_with_nan()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a shared machine would make a test crawl."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Forgets what was compiled, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of gloo's that holds this process alone."""
    dist.init_process_group("gloo", store=cast(Any, dist).HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a report can be written; there is none yet."""
    return tmp_path / "a.csv"


@pytest.fixture
def on_the_device() -> Iterator[None]:
    """Makes tensors and modules where kernels run, in tests that do not say where."""
    with nullcontext() if INTERPRETED else torch.device("cuda"):
        yield


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Starts no worker for one file, whose tests stay together."""
    files = {name.split("::")[0] for name in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and skips what needs a GPU or the interpreter in vain."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    needless, reason = (
        ("gpu", "needs a CUDA or ROCm device")
        if INTERPRETED
        else ("interpreter", "needs Triton's interpreter, which is not used beside a GPU")
    )
    for item in items:
        if needless in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says last with what was tested, how many tests were skipped, and why."""
    installed = {d.name: d.version for d in distributions()}
    versions = [f"{name} {installed.get(name, 'absent')}" for name in ("torch", "triton", "timm")]
    where = "in Triton's interpreter" if INTERPRETED else f"on {torch.cuda.get_device_name()}"
    terminalreporter.write_line(
        f"tested with {', '.join(versions)}, Python {python_version()}, {where}"
    )
    skipped = terminalreporter.stats.get("skipped", [])
    for reason, count in Counter(report.longrepr[2] for report in skipped).most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
