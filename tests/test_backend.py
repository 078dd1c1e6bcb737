"""The choice of the implementation: setter, context manager, environment."""

import os
import subprocess
import sys

import pytest
import torch

from sknet_triton import backend, functional, use_backend

BRANCHES = [torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)]


@pytest.fixture(autouse=True)
def _from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", None)
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)


def test_the_default_is_auto() -> None:
    assert backend.current_backend() == "auto"


def test_the_setter_holds_until_the_next() -> None:
    use_backend("reference")
    assert backend.current_backend() == "reference"
    use_backend("triton")
    assert backend.current_backend() == "triton"


def test_a_block_restores_what_was_set_before() -> None:
    use_backend("triton")
    with use_backend("reference"):
        assert backend.current_backend() == "reference"
    assert backend.current_backend() == "triton"


def test_blocks_nest() -> None:
    with use_backend("reference"):
        with use_backend("triton"):
            with use_backend("auto"):
                assert backend.current_backend() == "auto"
            assert backend.current_backend() == "triton"
        assert backend.current_backend() == "reference"
    assert backend.current_backend() == "auto"


def test_an_exception_restores_and_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert backend.current_backend() == "auto"


def test_an_object_sets_its_backend_each_time_it_is_entered() -> None:
    reference = use_backend("reference")
    use_backend("triton")
    for _ in range(2):
        with reference:
            assert backend.current_backend() == "reference"


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_an_unknown_name_is_refused_and_changes_nothing(name: str | None) -> None:
    use_backend("reference")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        use_backend(name)  # type: ignore[arg-type]
    assert str(caught.value) == f"name: expected one of auto, triton, reference, got {name!r}"
    assert backend.current_backend() == "reference"


def test_the_environment_is_the_default_and_the_setter_overrules_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert backend.current_backend() == "reference"
    with use_backend("auto"):
        assert backend.current_backend() == "auto"
    assert backend.current_backend() == "reference"


def test_an_unknown_name_in_the_environment_is_refused_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        functional.sk_fuse(BRANCHES)
    assert str(caught.value) == (
        "SKNET_TRITON_BACKEND: expected one of auto, triton, reference, got 'gpu'"
    )


def test_triton_on_a_cpu_tensor_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
        functional.sk_fuse(BRANCHES)
    assert str(caught.value) == (
        "backend: 'triton' needs tensors on a GPU (or TRITON_INTERPRET=1), got a tensor on cpu"
    )


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_cpu_tensors_take_plain_pytorch(name: backend.Backend) -> None:
    with use_backend(name):
        assert not backend.takes_triton(BRANCHES[0])
        assert functional.sk_fuse(BRANCHES).tolist() == [[2.0, 2.0]]


class OnAGpu(torch.Tensor):
    """A tensor that says it is on a GPU: the choice asks for nothing else."""

    is_cuda = True


@pytest.mark.parametrize(
    ("name", "taken"), [("auto", True), ("triton", True), ("reference", False)]
)
def test_gpu_tensors_take_triton_unless_told_otherwise(name: backend.Backend, taken: bool) -> None:
    pytest.importorskip("triton", reason="the triton backend is not installed")
    with use_backend(name):
        assert backend.takes_triton(torch.ones(1).as_subclass(OnAGpu)) is taken


def test_without_triton_auto_falls_back_and_triton_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # test_packaging.py does this again where triton is really absent; here the tensor is a GPU's.
    monkeypatch.setattr(backend, "_triton_installed", lambda: False)
    tensor = torch.ones(1).as_subclass(OnAGpu)
    with use_backend("auto"):
        assert not backend.takes_triton(tensor)
    with use_backend("triton"), pytest.raises(ImportError, match="needs the package triton"):
        backend.takes_triton(tensor)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("reference", "reference"),
        ("triton", "triton"),
        ("gpu", "ValueError: SKNET_TRITON_BACKEND: expected one of auto, triton, reference"),
        (None, "auto"),
    ],
)
def test_the_environment_variable_in_a_fresh_process(value: str | None, answer: str) -> None:
    environment = dict(os.environ)
    environment.pop("SKNET_TRITON_BACKEND", None)
    if value is not None:
        environment["SKNET_TRITON_BACKEND"] = value
    # The import itself never looks: it succeeds whatever the variable holds.
    code = (
        "import sknet_triton; print('imported')\n"
        "from sknet_triton.backend import current_backend; print(current_backend())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.startswith("imported\n")
    assert answer in run.stdout + run.stderr
