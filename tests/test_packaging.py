"""The wheel: what it holds, that it installs elsewhere, and that it works without triton."""

import re
import zipfile
from pathlib import Path

import pytest

from sknet_triton.hf_kernel.__main__ import build_repository
from tests.helpers import ROOT, SITE, run_alone, run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("build", "hatchling"):
        pytest.importorskip(needed, reason=f"{needed} is in the extra dev, which is not installed")
    out = tmp_path_factory.mktemp("wheel")
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run_python(*pip, "--target", target, wheel, cwd=target)
    return target


def source_files() -> set[str]:
    """Returns what the two packages hold in the checkout, as the wheel names it."""
    files = set()
    for package in (ROOT / "sknet_triton", ROOT / "kernels" / "sknet_kernels"):
        for path in package.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files.add(path.relative_to(package.parent).as_posix())
    return files


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    (info,) = (folder for folder in folders if folder.endswith(".dist-info"))
    assert folders == {"sknet_triton", "sknet_kernels", info}
    held = {name for name in names if not name.startswith(info)}
    assert held == source_files()
    assert {"sknet_triton/py.typed", "sknet_kernels/py.typed"} <= held
    assert f"{info}/licenses/LICENSE" in names
    # One wheel for every platform: nothing in it is compiled.
    assert wheel.name.endswith("-py3-none-any.whl")


FORWARD_AND_BACKWARD = """
import sys, torch, sknet_triton, sknet_kernels
where = {m.__file__.rsplit("/", 2)[0] for m in (sknet_triton, sknet_kernels)}
assert where == {sys.path[0]}, where
net = sknet_triton.SKNet((sknet_triton.StageSpec(32, 1, 2),), num_classes=3)
net(torch.randn(2, 3, 32, 32)).sum().backward()
assert all(p.grad is not None for p in net.parameters())
print("trained", "triton" in sys.modules)
"""


def test_the_installed_wheel_imports_from_its_own_place(installed: Path) -> None:
    out = run_alone(FORWARD_AND_BACKWARD, installed, *SITE, cwd=installed)
    assert out == "trained False\n"


WRITE_HF_KERNEL = """
import runpy, sys
sys.argv[1:] = ["repository"]
runpy.run_module("sknet_triton.hf_kernel", run_name="__main__", alter_sys=True)
"""


def test_the_installed_wheel_writes_the_kernel_repository_of_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    run_alone(WRITE_HF_KERNEL, installed, *SITE, cwd=tmp_path)
    build_repository(tmp_path / "checkout")
    written, expected = (
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (tmp_path / "repository", tmp_path / "checkout")
    )
    assert written == expected
    assert written[Path("LICENSE")] == (ROOT / "LICENSE").read_bytes()


@pytest.fixture(scope="module")
def without_triton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a link to everything that is installed, except triton and this project."""
    links = tmp_path_factory.mktemp("without_triton")
    for site in SITE:
        for path in Path(site).iterdir():
            ours = path.name.startswith(("triton", "pytorch_triton", "sknet", "_sknet"))
            link = links / path.name
            if not ours and path.suffix != ".pth" and not link.exists():
                link.symlink_to(path, target_is_directory=path.is_dir())
    return links


WITHOUT_TRITON = """
import importlib.util, torch.utils.flop_counter
from sknet_triton import functional, sknet50, use_backend
branches = [torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)]
for name in ("auto", "reference"):
    with use_backend(name):
        assert functional.sk_fuse(branches).tolist() == [[2.0, 2.0]]
with use_backend("triton"):
    try:
        functional.sk_fuse(branches)
    except ImportError as error:
        print(error)
assert sum(p.numel() for p in sknet50(device="meta").parameters()) == 27_479_784
compiled = torch.compile(sknet_triton.SKConv(32, 32), fullgraph=True, backend="aot_eager")
compiled(torch.randn(2, 32, 6, 5)).sum().backward()
print("compiled", importlib.util.find_spec("triton"))
"""


def test_everything_but_the_kernels_works_where_triton_is_absent(
    installed: Path, without_triton: Path
) -> None:
    out = run_alone(FORWARD_AND_BACKWARD + WITHOUT_TRITON, installed, without_triton, cwd=installed)
    assert out == (
        "trained False\n"
        "backend: 'triton' needs the package triton, which is not installed\n"
        "compiled None\n"
    )


def test_constraints_pin_every_requirement_once_and_exactly() -> None:
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert {"torch", "triton", "pandas", "numpy", "pytest"} <= pinned.keys()
    assert all(re.fullmatch(r"[\d.]+(\.post\d+)?", version) for version in pinned.values())
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        name = re.split(r"[ ;<>=\[]", requirement)[0].replace("_", "-")
        assert name == "sknet-triton" or name in pinned, f"constraints.txt does not pin {name}"
