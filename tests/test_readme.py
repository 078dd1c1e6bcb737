"""The README: its code prints what stands below it, and its commands are whole."""

import contextlib
import io
import re
import shutil
import subprocess

import pytest

from sknet_triton import backend
from sknet_triton.acceleration import family
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()

# A python block, and the text block after it if nothing but blank lines stands between.
EXAMPLES = re.findall(r"```python\n(.*?)```\n(?:\s*```text\n(.*?)```)?", README, re.DOTALL)


def heading_of(code: str) -> str:
    before = README[: README.index(code)]
    headings: list[str] = re.findall(r"^#+ (.*)$", before, re.MULTILINE)
    return headings[-1].replace(" ", "-")


@pytest.fixture(autouse=True)
def _the_package_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_process", None)
    monkeypatch.setattr(family, "_known", dict(family._known))


@pytest.mark.slow
@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=[heading_of(c) for c, _ in EXAMPLES])
def test_the_code_prints_what_the_readme_says(code: str, printed: str) -> None:
    if "torch.compile" in code and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor compiles for the CPU with a C++ compiler, and there is none")
    if "import timm" in code:
        pytest.importorskip("timm", reason="timm cannot be imported")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert out.getvalue() == printed


def test_every_printing_example_shows_its_result() -> None:
    assert len(EXAMPLES) == README.count("```python")
    for code, printed in EXAMPLES:
        assert ("print(" in code) == bool(printed), code


def test_the_commands_start_from_a_bare_python() -> None:
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    for command, last in zip(commands, ("perf run --preset quick", "pytest"), strict=True):
        assert command.startswith("python3 -m venv .venv &&\n")
        assert command.rstrip().endswith(f".venv/bin/python -m {last}")
        # One command: a step that fails ends it.
        assert all(line.endswith("&&") for line in command.rstrip().splitlines()[:-1])
        assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0
