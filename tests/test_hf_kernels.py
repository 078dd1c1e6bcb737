"""The kernel repository of sknet_triton.hf_kernel, as Hugging Face `kernels` loads it, offline.

Loading happens in processes of its own. The functions called ``child_...`` are handed to them as
text, so nothing that runs there leans on this process.
"""

import ast
import importlib.util
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import torch

from sknet_triton.hf_kernel import __main__ as builder
from sknet_triton.hf_kernel.__main__ import PACKAGES, VARIANT, build_repository, collect, rewrite
from tests.helpers import ROOT, SITE, run_alone

# Without a file of its own, what was found is this checkout's folder of that name.
needs_kernels = pytest.mark.skipif(
    getattr(importlib.util.find_spec("kernels"), "origin", None) is None,
    reason="kernels is in the extra dev, which is not installed",
)

# Where this package is installed itself, None refuses its import.
ALONE = "sys.modules.update(sknet_triton=None, sknet_kernels=None)"
CHILD = """
{first}
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
torch._C._set_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
{source}
{name}(*{arguments})
print("done")
"""


def in_a_child(
    child: Callable[..., None], *arguments: str, tmp_path: Path, beside: bool = False
) -> None:
    """Runs ``child(*arguments)`` in a fresh process, alone or with the checkout on its path."""
    code = CHILD.format(
        first="" if beside else ALONE,
        source=inspect.getsource(child),
        name=child.__name__,
        arguments=arguments,
    )
    out = run_alone(
        code,
        *([ROOT, ROOT / "kernels"] if beside else []),
        *SITE,
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hf"),
        TRITON_INTERPRET="1",  # the tensors are on the CPU, here and beside a GPU
    )
    assert out.endswith("done\n")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    build_repository(folder)
    return folder


# What a loaded kernel does


def child_alone(repository: str, checkout: str, *names: str) -> None:
    import copy
    import importlib
    import sys
    from functools import partial
    from pathlib import Path
    from typing import Any, cast

    import torch
    from torch import Tensor, nn

    # By name: to a type checker "kernels" is this checkout's folder.
    hf = importlib.import_module("kernels")
    kernel = hf.get_local_kernel(Path(repository))
    (loaded,) = hf.get_loaded_kernels()
    M, B, C, d = 3, 2, 6, 4
    draw = partial(torch.randn, dtype=torch.float64, requires_grad=True)
    branches, logits = [draw(B, C, 4, 5) for _ in range(M)], draw(B, M, C)
    norms = [kernel.BatchNormArgs(draw(C), draw(C)) for _ in range(M)]
    fc1, norm, fc2 = draw(d, C), kernel.BatchNormArgs(draw(d), draw(d)), draw(M * C, d)
    inputs = [*branches, logits, fc1, fc2, *(t for n in (*norms, norm) for t in (n.weight, n.bias))]

    @hf.use_kernel_forward_from_hub("Fuse")
    class Fuse(nn.Module):
        def forward(self, branches: list[Tensor]) -> Tensor:
            return torch.stack(branches).sum(0).mean((2, 3))

    @hf.use_kernel_forward_from_hub("Select")
    class Select(nn.Module):
        def forward(self, branches: list[Tensor], logits: Tensor) -> Tensor:
            return torch.einsum("mbchw,bmc->bchw", torch.stack(branches), logits.softmax(1))

    plain = nn.ModuleDict({"fuse": Fuse(), "select": Select()})
    layered = copy.deepcopy(plain)
    mapping = {
        name: {"cpu": hf.LocalLayerRepository(Path(repository), layer_name=f"SK{name}")}
        for name in ("Fuse", "Select")
    }
    with hf.use_kernel_mapping(mapping):
        mode = hf.Mode.TRAINING | hf.Mode.TORCH_COMPILE
        hf.kernelize(layered, mode=mode, device="cpu", use_fallback=False)
    of_layers = hf.get_loaded_kernels()[-1].module
    layers = of_layers.layers
    assert cast(Any, layered["fuse"].forward).__func__ is layers.SKFuse.forward
    assert cast(Any, layered["select"].forward).__func__ is layers.SKSelect.forward

    def results(stages: Any, compiled: bool) -> list[Tensor]:
        fuse, select, fuse_select = stages["fuse"], stages["select"], kernel.sk_fuse_select
        if compiled:
            graph = partial(torch.compile, fullgraph=True, backend="aot_eager")
            fuse, select, fuse_select = graph(fuse), graph(select), graph(fuse_select)
        outs = [fuse(branches), select(branches, logits)]
        outs.append(fuse_select(branches, norms, fc1, norm, fc2).out)
        return [*outs, *torch.autograd.grad([out.square().sum() for out in outs], inputs)]

    functions = {"fuse": kernel.sk_fuse, "select": kernel.sk_select}
    expected = results(plain, compiled=False)
    for backend in ("reference", "triton"):
        for stages in (functions, layered):
            for compiled in (False, True):
                with kernel.use_backend(backend), of_layers.use_backend(backend):
                    actual = results(stages, compiled)
                # float64 on both sides: 40 additions in another order are 1e-14 of magnitudes
                # around 1, which the batch norms' gradients raise to some tens.
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
                torch._dynamo.reset()

    operators = {n for n in torch._C._dispatch_get_all_op_names() if "::sk_" in n}
    assert operators == {f"{loaded.metadata.id}::{name}" for name in names}, operators
    assert sys.modules["sknet_triton"] is None
    files = {str(getattr(m, "__file__", None)) for m in sys.modules.values()}
    ours = tuple(f"{checkout}/{folder}/" for folder in ("sknet_triton", "kernels"))
    assert not {file for file in files if file.startswith(ours)}


@pytest.mark.slow
@needs_kernels
def test_a_loaded_kernel_and_its_layers_equal_plain_pytorch_without_this_package(
    repository: Path, tmp_path: Path
) -> None:
    names = [n.split("::") for n in torch._C._dispatch_get_all_op_names()]
    ours = [name for namespace, name in names if namespace == "sknet_triton"]
    in_a_child(child_alone, str(repository), str(ROOT), *ours, tmp_path=tmp_path)


def child_beside(*repositories: str) -> None:
    import importlib
    from pathlib import Path

    import torch

    import sknet_triton
    from sknet_triton.backend import current_backend

    hf = importlib.import_module("kernels")
    branches = [torch.randn(2, 6, 4, 5) for _ in range(3)]

    with sknet_triton.use_backend("triton"):
        expected = sknet_triton.functional.sk_fuse(branches)
    for repository in repositories:
        kernel = hf.get_local_kernel(Path(repository))
        with kernel.use_backend("triton"):
            assert current_backend() == "auto"
            assert torch.equal(kernel.sk_fuse(branches), expected)
    with sknet_triton.use_backend("triton"):
        assert torch.equal(sknet_triton.functional.sk_fuse(branches), expected)

    names = torch._C._dispatch_get_all_op_names()
    namespaces = {name.split("::")[0] for name in names if name.endswith("::sk_fuse")}
    ids = {loaded.metadata.id for loaded in hf.get_loaded_kernels()}
    assert len(hf.get_loaded_kernels()) == 3
    assert len(ids) == 2
    assert namespaces == {"sknet_triton", *ids}


@pytest.mark.slow
@needs_kernels
def test_kernels_live_beside_the_package_another_version_and_a_copy(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other, copy = (tmp_path / name for name in ("source", "other", "copy"))
    for name, package in PACKAGES.items():
        shutil.copytree(package, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", source)
    with (source / "sknet_kernels" / "layout.py").open("a") as file:
        file.write("# another version\n")
    monkeypatch.setattr(builder, "PACKAGES", {name: source / name for name in PACKAGES})
    build_repository(other)
    shutil.copytree(repository, copy)
    paths = [str(path) for path in (repository, other, copy)]
    in_a_child(child_beside, *paths, tmp_path=tmp_path, beside=True)


# What the builder writes


def test_only_imports_and_the_namespace_differ_and_what_is_imported_is_there(
    repository: Path,
) -> None:
    build = repository / "build" / VARIANT
    changed = re.compile(
        rf"\s*from \.+({'|'.join(PACKAGES)})[.\w]* import .*|NAMESPACE = .*|.*torch\.ops\._sknet.*"
    )
    for path, source in collect().items():
        text = (build / path).read_text()
        pairs = zip(text.splitlines(), source.splitlines(), strict=True)
        different = [line for line, original in pairs if line != original]
        assert all(changed.fullmatch(line) for line in different), path
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            assert not [name for name in names if name.split(".")[0] in PACKAGES], path
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                module = build.joinpath(*str(node.module).split("."))
                assert module.is_dir() or module.with_suffix(".py").is_file(), (path, node.module)


def test_rewriting_touches_no_other_name() -> None:
    text = "from sknet_triton_x import a\ns = 'from sknet_triton import a'  # torch.ops.sknet_x"
    assert rewrite(PurePosixPath("sknet_triton/ops/x.py"), text, "new") == text


def test_a_folder_with_a_build_is_refused(repository: Path) -> None:
    with pytest.raises(ValueError, match="folder: expected one without build/torch-universal, got"):
        build_repository(repository)
