"""Programs taken out of Python: torch.export, AOTInductor, torch.jit.trace."""

import copy
import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from perf.peers.baseline import with_plain_convs
from sknet_triton import (
    Backend,
    SKConv,
    SKNet,
    SKNetFeatures,
    SKUnit,
    StageSpec,
    use_backend,
)
from tests.helpers import (
    BACKENDS,
    EXACT_NETWORK,
    assert_same,
    needs_compiler,
    outcome,
    run_python,
)
from tests.plain_sknet import largest_error, scramble

pytestmark = pytest.mark.usefixtures("on_the_device")

EVERY_SIZE = {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
TINY = (StageSpec(32, 1, 2),)
SMALL = (StageSpec(32, 1, 1), StageSpec(64, 1, 2))


@dataclass(frozen=True)
class Subject:
    """A module to export, the shape it is exported at and others that it must take."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]
    backends: tuple[Backend, ...] = ("reference",)

    def module(self, training: bool = False) -> nn.Module:
        return scramble(self.build()).double().train(training)

    def images(self) -> list[Tensor]:
        shapes = (self.shape, *self.others)
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


CONV = Subject(lambda: SKConv(8, 8, G=4), (4, 8, 6, 5), ((3, 8, 4, 7),), BACKENDS)
# Every image is 0 or 3 modulo 4 high and wide: torch 2.11 guards its max_pool2d against others.
SUBJECTS = {
    "SKConv": CONV,
    "SKConv-M3-stride2": Subject(lambda: SKConv(8, 8, 2, 3, G=4), (4, 8, 9, 6), ((2, 8, 7, 8),)),
    "SKConv-layer": Subject(lambda: SKConv(8, 8, G=4, fc_norm="layer"), (4, 8, 6, 5), ()),
    "SKNet": Subject(lambda: SKNet(SMALL, num_classes=5), (4, 3, 64, 48), ((3, 3, 68, 47),)),
    # Triton's interpreter takes seconds for what torch does in milliseconds.
    "SKNet-tiny": Subject(
        lambda: SKNet(TINY, num_classes=5), (2, 3, 32, 32), ((3, 3, 36, 47),), ("triton",)
    ),
}
every_case = pytest.mark.parametrize(
    ("subject", "backend"),
    [
        pytest.param(subject, backend, id=f"{name}-{backend}")
        for name, subject in SUBJECTS.items()
        for backend in subject.backends
    ],
)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def our_operators(program: ExportedProgram) -> set[str]:
    names = {str(node.target) for node in program.graph.nodes}
    return {name for name in names if name.startswith("sknet_triton.")}


def assert_same_module(actual: nn.Module, expected: nn.Module, images: list[Tensor]) -> None:
    for x in images:
        seen, wanted = outcome(actual, actual, x), outcome(expected, expected, x)
        assert seen["out"].stride() == wanted["out"].stride()
        # A program may drop the buffers that it does not read.
        wanted = {k: t for k, t in wanted.items() if k in seen or "num_batches" not in k}
        assert_same(seen, wanted, EXACT_NETWORK)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_case
def test_a_program_is_the_module_at_any_size_also_after_save_and_load(
    subject: Subject, backend: Backend, training: bool
) -> None:
    module, images = subject.module(training), subject.images()
    with use_backend(backend):
        program = torch.export.export(module, (images[0],), dynamic_shapes=EVERY_SIZE)
        assert bool(our_operators(program)) == (backend == "triton")
        assert_same_module(saved_and_loaded(program).module(), copy.deepcopy(module), images)


def test_a_triton_program_runs_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, images = CONV.module(), CONV.images()

    def exported() -> ExportedProgram:
        return torch.export.export(module, (images[0],), dynamic_shapes=EVERY_SIZE)

    with use_backend("triton"):
        program = exported()
        with torch.no_grad():
            fused = exported()
    stages, steps = ("sk_fuse", "sk_select"), ("sk_hidden", "sk_logits", "sk_out")
    assert our_operators(program) == {f"sknet_triton.{name}.default" for name in stages}
    assert our_operators(fused) == {f"sknet_triton.{name}.default" for name in steps}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("reference"):
        assert_same_module(program.module(), module, images)
        with torch.no_grad():
            for x in images:
                assert largest_error(fused.module()(x), module(x)) < EXACT_NETWORK


def test_a_program_holds_the_batch_norms_that_others_know_how_to_fold() -> None:
    module, (x, _) = CONV.module(), CONV.images()
    program = torch.export.export(module, (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("batch_norm" in name for name in names) == 3
    assert not any("autocast" in name or "set_grad_enabled" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strict_program_has_the_modules_gradients(backend: Backend) -> None:
    module = scramble(SKNet(TINY, num_classes=5)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with use_backend(backend):
        exported = torch.export.export(copy.deepcopy(module), (x,), strict=True).module()
        assert_same_module(exported, module, [x])


def quantised(module: nn.Module, x: Tensor, aware: bool) -> tuple[Tensor, list[str]]:
    """Returns what a program of ``module`` gives in 8 bits, after training or trained for it."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="needs torchao")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=aware))
    program = torch.export.export(module.train(aware), (x,)).module()
    prepared = (pt2e.prepare_qat_pt2e if aware else pt2e.prepare_pt2e)(program, quantizer)
    prepared(x).sum().backward()
    if aware:
        sys.modules["torchao.quantization.pt2e"].move_exported_model_to_eval(prepared)
    converted = pt2e.convert_pt2e(prepared)
    return converted(x), [str(node.target) for node in converted.graph.nodes]


@pytest.mark.slow
@pytest.mark.parametrize("aware", [False, True], ids=["post-training", "quantisation-aware"])
def test_a_program_is_quantised_as_plain_modules_are(aware: bool) -> None:
    module = scramble(SKConv(8, 8, G=4))
    plain = with_plain_convs(module)
    x = torch.randn(4, 8, 12, 10)
    expected, names = quantised(plain, x, False)
    if not any("dequantize_per_channel" in name for name in names):
        pytest.skip("torchao quantises no convolution of this version of torch")
    if aware:
        trained = copy.deepcopy(module)
        trained(x)
        expected = trained.eval()(x)
    actual, names = quantised(module, x, aware)
    for name, count in {"dequantize_per_channel": 4, "conv2d": 4, "batch_norm": 0}.items():
        assert sum(name in target for target in names) == count
    # 8 bits of weights and of maps, one convolution after another: 2**-8, a few times.
    assert largest_error(actual, expected) < 2**-5


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_aot_inductor_packages_and_loads(backend: Backend, tmp_path: Path) -> None:
    module, images = CONV.module(), CONV.images()
    with use_backend(backend), torch.no_grad():
        program = torch.export.export(module, (images[0],), dynamic_shapes=EVERY_SIZE)
        assert bool(our_operators(program)) == (backend == "triton")
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        runner = torch._inductor.aoti_load_package(package)
        for x in images:
            assert largest_error(runner(x), module(x)) < EXACT_NETWORK


def traced(module: nn.Module, x: Tensor) -> Any:
    jit: Any = torch.jit  # torch leaves it untyped
    with warnings.catch_warnings():
        # torch deprecates tracing, and says that the checks of arguments become constants.
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        jit.save(jit.trace(module, x), buffer)
        buffer.seek(0)
        return jit.load(buffer)


@pytest.mark.slow
@every_case
def test_a_trace_is_the_module_at_any_size_also_after_save_and_load(
    subject: Subject, backend: Backend
) -> None:
    module, images = subject.module(), subject.images()
    with use_backend(backend), torch.no_grad():
        trace = traced(module, images[0])
        assert ("sknet_triton::" in str(trace.inlined_graph)) == (backend == "triton")
        for x in images:
            assert largest_error(trace(x), module(x)) < EXACT_NETWORK


LOAD = """
import sys, torch, sknet_triton
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), expected)
"""


@pytest.mark.slow
def test_a_saved_program_with_our_operators_loads_after_one_import(tmp_path: Path) -> None:
    module, (x, other) = CONV.module(), CONV.images()
    with use_backend("triton"):
        program = torch.export.export(module, (x,), dynamic_shapes=EVERY_SIZE)
    assert our_operators(program)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((other, module(other)), tmp_path / "tensors.pt")
    run_python("-c", LOAD, tmp_path / "program.pt2", tmp_path / "tensors.pt")


TRACED: dict[str, Callable[[], nn.Module]] = {
    "SKConv M3": lambda: SKConv(8, 8, M=3, G=4),
    "SKConv sum": lambda: SKConv(8, 8, G=4, aggregate="sum"),
    "SKUnit layer": lambda: SKUnit(8, 8, G=4, fc_norm="layer"),
    "SKNet": lambda: SKNet(SMALL, num_classes=5),
    "SKNetFeatures": lambda: SKNetFeatures(SMALL, out_indices=(0, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRACED)
def test_a_graph_of_torch_fx_is_the_module_at_any_size(name: str, training: bool) -> None:
    module = scramble(TRACED[name]()).double().train(training)
    graph = torch.fx.symbolic_trace(copy.deepcopy(module))
    channels = 3 if isinstance(module, SKNet) else 8
    backends: tuple[Backend, ...] = BACKENDS if "SKConv" in name else ("auto",)
    for backend, shape in zip(backends, ((2, 32, 24), (3, 12, 8)), strict=False):
        x = torch.randn(shape[0], channels, *shape[1:], dtype=torch.float64)
        with use_backend(backend):
            torch.testing.assert_close(graph(x), module(x), rtol=EXACT_NETWORK, atol=EXACT_NETWORK)


@pytest.mark.parametrize(
    "module",
    [SKConv(8, 8, G=4), SKUnit(8, 8, G=4), SKNet(TINY), nn.Sequential(SKConv(8, 8, G=4))],
    ids=["SKConv", "SKUnit", "SKNet", "inside another"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.script itself
def test_torch_jit_script_is_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(NotImplementedError) as caught:
        torch.jit.script(module)
    assert str(caught.value) == (
        "SKConv: torch.jit.script cannot compile this module; use torch.export.export, or "
        "torch.jit.trace of the model in eval mode"
    )
