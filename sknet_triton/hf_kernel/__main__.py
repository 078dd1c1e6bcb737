"""Writes the kernel repository of this package, which Hugging Face `kernels` loads.

``python -m sknet_triton.hf_kernel FOLDER`` writes FOLDER/build/torch-universal: what fuse and
select need of sknet_triton and sknet_kernels, at the same paths. Equal sources give equal bytes.

A loaded kernel is one package under a name that `kernels` gives it, so imports have to be relative
and operators need a namespace of their own. Both are edited in the text.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path, PurePosixPath

import sknet_kernels

# The one name by which kernels takes a build for every device, version of torch and system.
VARIANT = "torch-universal"

OWN = "sknet_triton"
# Where the sources lie, in a checkout and where a wheel put them.
PACKAGES = {
    OWN: Path(__file__).resolve().parents[1],
    "sknet_kernels": Path(sknet_kernels.__path__[0]).resolve(),
}
# What the kernel takes of each: no layers, no networks and no commands.
TAKEN = {
    OWN: ("backend.py", "checks.py", "functional.py", "fused.py", "ops", "reference", "hf_kernel"),
    "sknet_kernels": (".",),
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


def build_repository(folder: Path) -> Path:
    """Writes the kernel repository into ``folder``, which is made if it is not there.

    Returns:
        The folder of the build, which holds ``__init__.py`` and ``metadata.json``.

    Raises:
        ValueError: ``folder`` holds a build already.
    """
    build = folder / "build" / VARIANT
    if build.exists():
        raise ValueError(f"folder: expected one without build/{VARIANT}, got {folder}")
    files = collect()
    # Named after its contents: other contents can be loaded beside it.
    digest = hashlib.sha256(json.dumps([(str(p), t) for p, t in files.items()]).encode())
    namespace = f"_{OWN}_{digest.hexdigest()[:12]}"
    metadata = json.dumps({"id": namespace, **METADATA}, indent=2) + "\n"
    _write(build / "metadata.json", metadata)
    for path, text in files.items():
        _write(build / path, rewrite(path, text, namespace))
    _write(folder / "LICENSE", _license(PACKAGES[OWN]))
    return build


def collect() -> dict[PurePosixPath, str]:
    """Returns the texts of the kernel's files by their paths in it."""
    files = {PurePosixPath("__init__.py"): ENTRANCE, PurePosixPath(OWN, "__init__.py"): OWN_INIT}
    for package, top in PACKAGES.items():
        for taken in TAKEN[package]:
            found = (top / taken).rglob("*.py") if (top / taken).is_dir() else [top / taken]
            for file in found:
                if file.name != "__main__.py":
                    path = PurePosixPath(package, file.relative_to(top).as_posix())
                    files[path] = file.read_text(encoding="utf-8")
    return dict(sorted(files.items()))


def rewrite(path: PurePosixPath, text: str, namespace: str) -> str:
    """Returns ``text`` with imports relative to ``path`` and operators in ``namespace``."""
    # One dot is the file's own folder; the kernel's root lies len(parts) - 1 above it.
    dots = "." * len(path.parts)
    text = re.sub(rf"(?m)^( *from )({'|'.join(PACKAGES)})(?=[. ])", rf"\g<1>{dots}\2", text)
    text = re.sub(rf"\btorch\.ops\.{OWN}\b", f"torch.ops.{namespace}", text)
    return text.replace(f'NAMESPACE = "{OWN}"', f'NAMESPACE = "{namespace}"')


def _license(own: Path) -> str:
    """Returns the licence: a wheel installs it with the metadata, a checkout has it at its top."""
    installed = own.parent.glob(f"{OWN}-*.dist-info/licenses/LICENSE")
    return next(installed, own.parent / "LICENSE").read_text(encoding="utf-8")


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
