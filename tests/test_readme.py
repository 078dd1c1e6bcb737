"""The documents for users: their code prints what stands below it, their commands are whole."""

import argparse
import contextlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from perf.commands import COMMANDS
from sknet_triton import backend
from sknet_triton.acceleration import family
from tests.helpers import ROOT

README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "sknet_triton").rglob("README.md")))


@dataclass(frozen=True)
class Example:
    """A block of code, and the text block after it if nothing but blank lines stands between."""

    name: str
    code: str
    printed: str


def examples(document: Path) -> Iterator[Example]:
    text = document.read_text()
    found = re.finditer(r"```python\n(.*?)```\n(?:\s*```text\n(.*?)```)?", text, re.DOTALL)
    for match in found:
        heading = re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)[-1]
        name = f"{document.parent.name}-{heading}".replace(" ", "-")
        yield Example(name, match[1], match[2] or "")


EXAMPLES = [example for document in DOCUMENTS for example in examples(document)]


@pytest.fixture(autouse=True)
def _the_package_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_process", None)
    monkeypatch.setattr(family, "_known", dict(family._known))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_code_prints_what_the_document_says(example: Example) -> None:
    code = example.code
    if "torch.compile" in code and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor compiles for the CPU with a C++ compiler, and there is none")
    if "import timm" in code:
        pytest.importorskip("timm", reason="timm cannot be imported")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, example.name, "exec"), {"__name__": "__main__"})
    assert out.getvalue() == example.printed


def test_every_printing_example_shows_its_result() -> None:
    assert len(EXAMPLES) == sum(path.read_text().count("```python") for path in DOCUMENTS)
    for example in EXAMPLES:
        assert ("print(" in example.code) == bool(example.printed), example.code


def test_the_commands_start_from_a_bare_python() -> None:
    commands = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(commands) == 2
    for command, last in zip(commands, ("perf run --preset quick", "pytest"), strict=True):
        assert command.startswith("python3 -m venv .venv &&\n")
        assert command.rstrip().endswith(f".venv/bin/python -m {last}")
        # One command: a step that fails ends it.
        assert all(line.endswith("&&") for line in command.rstrip().splitlines()[:-1])
        assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0


def test_the_harness_takes_the_commands_that_are_shown() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    subparsers = parser.add_subparsers(required=True)
    for command, add_arguments in COMMANDS.items():
        subparser = subparsers.add_parser(command.__name__)
        if add_arguments:
            add_arguments(subparser)
    text = "".join(path.read_text() for path in (*DOCUMENTS, *(ROOT / "perf").rglob("*.md")))
    shown = re.findall(r"python -m perf (\w[^`\n#]*)", text)
    assert len(shown) >= 10
    for line in shown:
        if not line.endswith("--help"):
            parser.parse_args(shlex.split(line))
