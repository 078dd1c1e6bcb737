"""Writes the kernel repository of this package, which Hugging Face `kernels` loads.

``python -m sknet_triton.hf_kernel FOLDER`` writes FOLDER/build/torch-universal: sknet_triton's
hf_kernel, and whatever of sknet_triton and sknet_kernels it imports, at the same paths. Equal
sources give equal bytes.

A loaded kernel is one package under a name that `kernels` gives it, so imports have to be relative
and operators need a namespace of their own. Both are edited in the text, at the places that the
syntax tree names; comments, strings and layout stay. A place where the text differs is an error.
"""

import argparse
import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
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
        ValueError: a name of ours does not stand where the syntax tree has it.
    """
    lines = text.encode().splitlines(keepends=True)  # the tree counts columns in bytes
    # From the end, so that an edit moves no other.
    for line, column, old, new in sorted(_edits(path, text, namespace), reverse=True):
        head, tail = lines[line - 1][:column], lines[line - 1][column:]
        if not tail.startswith(old.encode()):
            raise ValueError(
                f"{path}: expected names of ours unbroken on their statement's first line, "
                f"got line {line} without {old!r}"
            )
        lines[line - 1] = head + new.encode() + tail.removeprefix(old.encode())
    return b"".join(lines).decode()


def _edits(path: PurePosixPath, text: str, namespace: str) -> Iterator[tuple[int, int, str, str]]:
    """Yields line, column, what stands there and what is to."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_ours(node.module):
            # One dot is the file's own folder; the kernel's root lies len(parts) - 1 above it.
            dots = "." * len(path.parts)
            old, new = f"from {node.module}", f"from {dots}{node.module}"
            yield node.lineno, node.col_offset, old, new
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == f"torch.ops.{OWN}":
            yield node.lineno, node.col_offset, f"torch.ops.{OWN}", f"torch.ops.{namespace}"
        elif isinstance(node, ast.Assign) and ast.unparse(node) == f"NAMESPACE = {OWN!r}":
            yield node.value.lineno, node.value.col_offset, f'"{OWN}"', f'"{namespace}"'


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
