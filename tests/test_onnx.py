"""ONNX: the exported model gives in onnxruntime what the module gives, at any size."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from sknet_triton import SKConv, SKNet, StageSpec, backend, use_backend
from tests.plain_sknet import largest_error, scramble

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

EVERY_SIZE = {"x": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
SMALL = (StageSpec(32, 1, 1), StageSpec(64, 1, 2))


def conv() -> SKConv:
    return scramble(SKConv(8, 8, G=4)).eval()


def export(module: nn.Module, x: Tensor, path: Path) -> Any:
    """Exports as README says; returns the ONNX graph."""
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=EVERY_SIZE, verbose=False)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def assert_same(path: Path, module: nn.Module, x: Tensor) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": x.contiguous().numpy()})
    expected = module(x).detach().double()
    # Both keep float32 and add in their own order; batch norms folded into weights are theirs.
    assert largest_error(torch.from_numpy(out), expected) < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_skconv_at_other_sizes_and_in_both_layouts(
    layout: torch.memory_format, tmp_path: Path
) -> None:
    module, path = conv(), tmp_path / "conv.onnx"
    module.to(memory_format=layout)  # type: ignore[call-overload]
    export(module, torch.randn(4, 8, 6, 5).to(memory_format=layout), path)
    for shape in ((4, 8, 6, 5), (7, 8, 9, 4), (1, 8, 3, 11)):
        assert_same(path, module, torch.randn(shape).to(memory_format=layout))


def test_a_network_at_other_sizes(tmp_path: Path) -> None:
    module, path = scramble(SKNet(SMALL, num_classes=5)).eval(), tmp_path / "net.onnx"
    export(module, torch.randn(4, 3, 64, 48), path)
    for shape in ((4, 3, 64, 48), (1, 3, 34, 71)):
        assert_same(path, module, torch.randn(shape))


def test_the_graph_has_its_batch_norms_folded_and_operators_of_onnx_alone(tmp_path: Path) -> None:
    graph = export(conv(), torch.randn(4, 8, 6, 5), tmp_path / "conv.onnx")
    counts = Counter(node.op_type for node in graph.node)
    assert {node.domain for node in graph.node} == {""}
    # Two branches, fc1 and fc2; nothing is left of a norm but the convolutions' biases.
    assert counts["Conv"] == 4
    assert counts["Relu"] == 3
    assert counts["BatchNormalization"] == counts["Sub"] == 0


def test_the_kernels_refuse_and_say_what_to_do(tmp_path: Path) -> None:
    message = (
        r"backend: 'triton' has no operators in ONNX; export under use_backend\('auto'\) or "
        r"use_backend\('reference'\)"
    )
    with use_backend("triton"), pytest.raises(Exception, match=message):
        export(conv(), torch.randn(4, 8, 6, 5), tmp_path / "conv.onnx")


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "torchscript"])
def test_auto_leaves_the_kernels_out_of_an_export_alone(dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the triton backend is not installed")
    # The choice of the backend asks for nothing else.
    choices, on_a_gpu = [], cast(Tensor, SimpleNamespace(is_cuda=True))

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            choices.append(backend.takes_triton(on_a_gpu))
            return x + 1

    module, x = Asks(), torch.ones(2)
    with use_backend("auto"):
        module(x)
        torch.onnx.export(module, (x,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
        module(x)
    assert choices[0] is choices[-1] is True
    assert choices[1:-1]
    assert not any(choices[1:-1])
