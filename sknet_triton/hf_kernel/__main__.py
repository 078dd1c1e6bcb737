"""Writes the kernel repository of this package, which Hugging Face `kernels` loads.

``python -m sknet_triton.hf_kernel FOLDER`` writes FOLDER/build/torch-universal: sknet_triton's
hf_kernel, and whatever of sknet_triton and sknet_kernels it imports, at the same paths. Equal
sources give equal bytes.

A loaded kernel is one package under a name that `kernels` gives it, so imports have to be relative
and operators need a namespace of their own. Both are edited in the text, at the places that the
syntax tree names; comments, strings and layout stay. The tree of the edited text must equal the
edited tree, so an edit that missed its place is an error and never a file.
"""

import argparse
import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

import sknet_kernels

# The one name by which kernels takes a build for every device, version of torch and system.
VARIANT = "torch-universal"

OWN = "sknet_triton"
# Where the sources lie, in a checkout and where a wheel put them.
PACKAGES = {
    OWN: Path(__file__).resolve().parents[1],
    "sknet_kernels": Path(sknet_kernels.__path__[0]).resolve(),
}
ENTRANCE = '''"""Fuse and select of selective-kernel networks, loaded by Hugging Face `kernels`."""

from sknet_triton.hf_kernel import *
from sknet_triton.hf_kernel import __all__
'''
# In place of the package's own, which would bring the layers and the models along.
OWN_INIT = '"""What the kernel takes of sknet_triton."""\n'

METADATA = {
    "name": "sknet-triton",
    "version": 1,
    "license": "Apache-2.0",
    # kernels knows neither torch nor triton as a dependency: the first is given, and the second
    # is imported when a tensor on a GPU needs it.
    "python-depends": [],
    # One type has to be named, though a universal build is loaded wherever torch runs.
    "backend": {"type": "cuda"},
}


def build_repository(folder: Path, packages: Mapping[str, Path] = PACKAGES) -> Path:
    """Writes the kernel repository into ``folder``.

    Args:
        folder: where to; made if it is not there.
        packages: the folders of sknet_triton and sknet_kernels by name.

    Returns:
        The folder of the build, which holds ``__init__.py`` and ``metadata.json``.

    Raises:
        ValueError: ``folder`` holds a build already, or a file imports what the kernel cannot have.
    """
    build = folder / "build" / VARIANT
    if build.exists():
        raise ValueError(f"folder: expected one without build/{VARIANT}, got {folder}")
    files = collect(packages)
    namespace = _namespace(files)
    rewritten = {path: rewrite(path, text, namespace) for path, text in files.items()}
    rewritten[PurePosixPath("metadata.json")] = (
        json.dumps({"id": namespace, **METADATA}, indent=2) + "\n"
    )
    for path, text in rewritten.items():
        _write(build / path, text)
    _write(folder / "LICENSE", _license(packages[OWN]))
    return build


def collect(packages: Mapping[str, Path] = PACKAGES) -> dict[PurePosixPath, str]:
    """Returns the texts of the kernel's entrance and of all that it imports of ours, by path.

    Raises:
        ValueError: an import has no relative form, or leads to no file.
    """
    files = {PurePosixPath("__init__.py"): ENTRANCE}
    pending = list(files.items())
    while pending:
        importer, text = pending.pop()
        for module in _imported(importer, text, packages):
            path, file = _located(module, packages)
            if path not in files:
                files[path] = OWN_INIT if module == OWN else _read(file)
                pending.append((path, files[path]))
    return dict(sorted(files.items()))


def rewrite(path: PurePosixPath, text: str, namespace: str) -> str:
    """Returns ``text`` with imports relative to ``path`` and operators in ``namespace``.

    Raises:
        ValueError: an import has no relative form, or an edit does not give the tree it should.
    """
    tree = ast.parse(text)
    rewriter = _Rewriter(path, namespace)
    rewriter.visit(tree)
    lines = text.encode().splitlines(keepends=True)
    # From the end, so that an edit moves no other.
    for edit in sorted(rewriter.edits, key=lambda edit: (edit.line, edit.column), reverse=True):
        line = lines[edit.line - 1]
        # The tree counts columns in bytes.
        head, tail = line[: edit.column], line[edit.column :]
        lines[edit.line - 1] = head + tail.replace(edit.old.encode(), edit.new.encode(), 1)
    result = b"".join(lines).decode()
    if ast.dump(ast.parse(result)) != ast.dump(tree):
        raise ValueError(f"{path}: expected names of ours unbroken on their statement's first line")
    return result


@dataclass(frozen=True)
class _Edit:
    """The first ``old`` from a place on becomes ``new``."""

    line: int
    column: int
    old: str
    new: str


class _Rewriter(ast.NodeTransformer):
    """Edits a tree, and notes the same edits for its text."""

    def __init__(self, path: PurePosixPath, namespace: str) -> None:
        self.path = path
        self.namespace = namespace
        self.edits: list[_Edit] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.level == 0 and _is_ours(node.module):
            # One dot is the file's own folder; the kernel's root lies len(parts) - 1 above it.
            node.level = len(self.path.parts)
            self._note(node, str(node.module), "." * node.level + str(node.module))
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.unparse(node) == f"torch.ops.{OWN}":
            node.attr = self.namespace
            self._note(node, OWN, self.namespace)
            return node
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.value, ast.Constant) and ast.unparse(node.targets[0]) == "NAMESPACE":
            node.value.value = self.namespace
            self._note(node.value, OWN, self.namespace)
            return node
        return self.generic_visit(node)

    def _note(self, node: ast.stmt | ast.expr, old: str, new: str) -> None:
        self.edits.append(_Edit(node.lineno, node.col_offset, old, new))


def _imported(importer: PurePosixPath, text: str, packages: Mapping[str, Path]) -> Iterator[str]:
    """Yields the modules of ours that a file imports, with the packages that they lie in."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name):
                    _refuse(importer, node, f"'import {alias.name}', which has no relative form")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and _is_ours(node.module):
            module = str(node.module)
            yield from _with_parents(module)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                if _located(inner, packages)[1].exists():
                    yield inner
                elif module == OWN:
                    _refuse(importer, node, f"{alias.name} from {OWN} itself")


def _refuse(importer: PurePosixPath, node: ast.stmt, got: str) -> NoReturn:
    raise ValueError(
        f"{importer}:{node.lineno}: expected imports from modules of {' and '.join(PACKAGES)}, "
        f"got {got}"
    )


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in PACKAGES


def _with_parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _located(module: str, packages: Mapping[str, Path]) -> tuple[PurePosixPath, Path]:
    """Returns where a module lies in the kernel and in the sources, if there is such a one."""
    package, *inner = module.split(".")
    file = packages[package].joinpath(*inner)
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return PurePosixPath(package, file.relative_to(packages[package]).as_posix()), file


def _license(own: Path) -> str:
    """Returns the licence: a wheel installs it with the metadata, a checkout has it at its top."""
    installed = own.parent.glob(f"{OWN}-*.dist-info/licenses/LICENSE")
    return _read(next(installed, own.parent / "LICENSE"))


def _namespace(files: dict[PurePosixPath, str]) -> str:
    """Names a kernel after its contents: other contents can be loaded beside it."""
    digest = hashlib.sha256(json.dumps([(str(p), t) for p, t in files.items()]).encode())
    return f"_{OWN}_{digest.hexdigest()[:12]}"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {OWN}.hf_kernel",
        description="Writes the kernel repository that Hugging Face kernels loads",
    )
    parser.add_argument("folder", type=Path, help="where to, such as /tmp/sknet-triton")
    try:
        print(build_repository(parser.parse_args().folder))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
