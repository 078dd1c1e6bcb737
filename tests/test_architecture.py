"""The shape of the project: imports run downwards, importing does nothing, documents are true."""

import ast
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_python

# From the lowest floor up. A module may import its own floor's package and whatever lies below.
FLOORS = (
    {"sknet_kernels"},
    {"sknet_triton.backend", "sknet_triton.reference"},
    {"sknet_triton.checks"},
    {"sknet_triton.ops"},
    {"sknet_triton.fused"},
    {"sknet_triton.functional"},
    {"sknet_triton.layers", "sknet_triton.hf_kernel"},
    {"sknet_triton.models"},
    {
        "sknet_triton.acceleration",
        "sknet_triton.checkpoints",
        "sknet_triton.inference",
    },
    {"sknet_triton.timm"},
    {"sknet_triton"},
    {"sknet_triton.analysis"},
    {"perf.rows"},
    {"perf.peers"},
    {"perf.static"},
    {"perf.sweep"},
    {"perf.report"},
    {"perf.commands"},
    {"perf", "tests"},
)
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names}
# The mathematics in plain PyTorch stands on nothing of ours, and the kernels neither; of these it
# takes the records that both are given.
STANDS_ALONE = {"sknet_triton.backend", "sknet_triton.reference", "sknet_kernels"}
RECORDS = "sknet_kernels.norms"
PACKAGES = ("sknet_triton", "kernels/sknet_kernels", "perf", "tests")


def sources() -> Iterator[tuple[str, Path]]:
    """Yields every module of ours: its dotted name and its file."""
    for package in PACKAGES:
        top = ROOT / package
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def owner(module: str) -> str | None:
    """Returns the entry of FLOORS that ``module`` belongs to, None for one not ours."""
    while module and module not in FLOOR_OF:
        module = module.rpartition(".")[0]
    return module or None


def is_module(name: str) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for module in MODULES)


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Yields what a file imports, anywhere in it, and the line: the module, not its members."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield (member if is_module(member) else node.module), node.lineno


MODULES = dict(sources())


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("tests")])
def test_imports_run_downwards_and_triton_is_the_kernels(module: str) -> None:
    here = owner(module)
    assert here is not None
    for name, line in imported(MODULES[module]):
        there, what = owner(name), f"{MODULES[module]}:{line}: {module} imports {name}"
        if there not in (None, here):
            assert FLOOR_OF[there] < FLOOR_OF[here], f"{what}, which is not below"
            assert here not in STANDS_ALONE or name == RECORDS, f"{what}, and stands alone"
        elif name.partition(".")[0] == "triton":
            assert here == "sknet_kernels" or module.startswith("perf"), what


def test_every_module_of_the_package_and_room_of_the_harness_has_a_floor_of_its_own() -> None:
    rooms = {
        ".".join(m.split(".")[:2]) for m in MODULES if m.startswith(("sknet_triton.", "perf."))
    }
    missing = rooms - {"perf.__main__"} - FLOOR_OF.keys()
    assert not missing, f"name the floor of {missing} in FLOORS"
    assert set(map(owner, MODULES)) == FLOOR_OF.keys(), "a floor is empty"


def test_a_name_stands_for_one_thing_on_all_floors() -> None:
    names = Counter(
        path.stem
        for module, path in MODULES.items()
        if not module.startswith("tests") and not path.stem.startswith("__")
    )
    shared = {name for name, count in names.items() if count > 1}
    # A stage by itself, and the steps of `sk_fuse_select`.
    assert shared <= {"sk_fuse", "sk_select", "steps"}


def test_the_check_sees_an_import_that_runs_upwards(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "def f():\n    from sknet_triton import layers, use_backend\nimport triton.jit\n"
    )
    seen = [("sknet_triton", 2), ("sknet_triton.layers", 2), ("triton.jit", 3)]
    assert sorted(imported(path)) == seen
    owners = "sknet_triton.layers", "sknet_triton", None
    assert tuple(map(owner, ("sknet_triton.layers.sk_conv", "sknet_triton.new", "torch"))) == owners


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [p.name for p in (ROOT / "kernels").iterdir() if (p / "__init__.py").exists()] == [
        "sknet_kernels"
    ]


# What an import does

PROBE = """
import builtins, os, sys, warnings

warnings.simplefilter("error")
import torch  # whatever torch does at its own import is not ours
sys.stderr = sys.stdout  # a word there is no JSON

read = []
class Spy(dict):
    def __getitem__(self, key): read.append(key); return super().__getitem__(key)
    def get(self, key, default=None): read.append(key); return super().get(key, default)
    def __contains__(self, key): read.append(key); return super().__contains__(key)
os.environ = Spy(os.environ)
os.getenv = lambda key, default=None: (read.append(key), os.environ.get(key, default))[1]
asked = []
for name in ("is_available", "device_count", "current_device", "get_device_properties",
             "get_device_capability"):
    setattr(torch.cuda, name, lambda *a, name=name: asked.append(name))
before = set(sys.modules)
import sknet_triton
loaded = sorted({m.split(".")[0] for m in set(sys.modules) - before})
import json
triton = "triton" in sys.modules
import sknet_triton.analysis, sknet_triton.checkpoints
extras = {"huggingface_hub", "matplotlib", "safetensors", "timm", "torch._dynamo"}
print(json.dumps({"read": read, "asked": asked, "loaded": loaded, "triton": triton,
                  "extras": sorted(extras & set(sys.modules))}))
"""


def test_importing_reads_no_environment_asks_no_device_and_loads_no_triton() -> None:
    # That backend is refused where it is used.
    seen = json.loads(run_python("-c", PROBE, SKNET_TRITON_BACKEND="gpu", TRITON_INTERPRET="0"))
    assert seen["triton"] is False
    # Dynamo takes as long to import as torch itself, and brings triton along.
    assert seen["extras"] == []
    assert seen["asked"] == []
    ours = [key for key in seen["read"] if key.startswith(("SKNET", "TRITON", "CUDA"))]
    assert ours == []
    assert "pandas" not in seen["loaded"]


HUB = r"checkpoints\.hub needs huggingface_hub and safetensors: .*'sknet-triton\[hub\]'"


@pytest.mark.parametrize(
    ("module", "missing", "message"),
    [
        ("timm", "timm", r"needs timm: pip install 'sknet-triton\[timm\]'"),
        ("checkpoints.hub", "huggingface_hub", HUB),
        ("checkpoints.hub", "safetensors", HUB),
    ],
)
def test_without_its_extra_an_import_names_it(
    module: str, missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"sknet_triton.{module}", raising=False)
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"sknet_triton.{module}")


# Environment variables and documents


READS = re.compile(r"os\.(?:environ(?:\.get|\.setdefault)?|getenv)[(\[]\s*(\"?)(\w+)")


def environment_variables() -> Iterator[tuple[str, Path]]:
    """Yields the environment variables that the code reads, and where."""
    for module, path in MODULES.items():
        text = "" if module.startswith("tests") else path.read_text()
        for quote, name in READS.findall(text):
            # Without quotes it is the name of a constant.
            constant = None if quote else re.search(rf'^{name} = "(\w+)"', text, re.MULTILINE)
            yield (constant[1] if constant else name), path


def test_every_environment_variable_has_a_row_in_the_readme() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    read = dict(environment_variables())
    assert "SKNET_TRITON_BACKEND" in read
    missing = {name: where for name, where in read.items() if name not in rows}
    assert not missing


DOCUMENTS = sorted(
    path
    for folder in ("", "kernels/**/", "perf/**/", "sknet_triton/**/", "tests/**/")
    for path in ROOT.glob(f"{folder}*.md")
)


def mentioned(text: str) -> Iterator[str]:
    """Yields what a document presents as a path of this repository."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            yield target
    # In backticks: something with a slash or a known ending, and no placeholder in it.
    for token in re.findall(r"`([^`\s]+)`", text):
        if re.search(r"[<>*{}=()$|:]", token) or token.startswith(("-", ".venv", "/", "http")):
            continue
        if "/" in token.strip("/") or token.endswith((".py", ".md", ".toml", ".txt", ".csv", "/")):
            yield token


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_mention_only_paths_that_exist(path: Path) -> None:
    for mention in mentioned(path.read_text()):
        found = (path.parent / mention).exists() or (ROOT / mention).exists()
        assert found, f"{path.relative_to(ROOT)} mentions {mention}"


def test_the_check_of_documents_sees_a_path() -> None:
    text = "`perf/gone.py`, `README.md`, `[B, C]`, [x](docs/y.md#z), `n/32`, `a` <https://x.y/z>"
    assert list(mentioned(text)) == ["docs/y.md", "perf/gone.py", "README.md", "n/32"]
