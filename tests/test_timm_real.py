"""accelerate on timm's own models and layers, where timm can be imported."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sknet_triton as skt
from sknet_triton import Backend, use_backend
from tests.helpers import EXACT_NETWORK, assert_same, outcome

pytestmark = pytest.mark.usefixtures("on_the_device")

try:
    timm: Any = importlib.import_module("timm")
except (ImportError, RuntimeError) as error:  # torchvision raises either where it does not fit
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

SELECTIVE, SPLIT = "timm SelectiveKernel", "ResNeSt split attention"
OWN_COMPILED = "  its own forward under torch.compile without kernels"


def accelerated(kind: str, module: str, units: tuple[int, ...], remark: str = "") -> str:
    """The printed report of a network whose stages have so many units."""
    lines = [
        f"accelerated  layer{stage}.{unit}.{module}  [{kind}]{remark}"
        for stage, count in enumerate(units, start=1)
        for unit in range(count)
    ]
    return "\n".join([f"{len(lines)} accelerated", *lines])


REPORTS = {
    "skresnext50_32x4d": accelerated(SELECTIVE, "conv2", (3, 4, 6, 3)),
    "skresnet18": accelerated(SELECTIVE, "conv1", (2, 2, 2, 2)),
    "resnest26d": accelerated(SPLIT, "conv2", (2, 2, 2, 2), OWN_COMPILED),
}


def randomised(module: nn.Module) -> nn.Module:
    """Gives norms and the attention's last layer values that no mistake can hide behind."""
    with torch.no_grad():
        for name, child in module.named_modules():
            if isinstance(child, nn.BatchNorm2d):
                for tensor in (child.weight, child.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5)
                for tensor in (child.bias, child.running_mean):
                    if tensor is not None:
                        tensor.uniform_(-0.3, 0.3)
            elif name.endswith(("fc_select", "fc2")):
                child.get_parameter("weight").uniform_(-1, 1)
    return module.double()


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", REPORTS)
def test_an_accelerated_network_has_the_same_numbers_and_names(name: str, training: bool) -> None:
    own = randomised(timm.create_model(name, num_classes=10)).train(training)
    model = copy.deepcopy(own)
    assert str(skt.accelerate(model)) == REPORTS[name]
    assert list(model.state_dict()) == list(own.state_dict())
    # With few images fc_reduce's batch norm divides by almost nothing, and magnifies roundings.
    x = torch.randn(8, 3, 48, 48, dtype=torch.float64)
    assert_same(outcome(model, model, x), outcome(own, own, x), EXACT_NETWORK, least=1.0)
    assert len(skt.restore(model)) == len(REPORTS[name].splitlines()) - 1
    assert [type(m) for m in model.modules()] == [type(m) for m in own.modules()]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SelectiveKernel": lambda: timm.layers.SelectiveKernel(8, 8, groups=2),
    "SelectiveKernel M3": lambda: timm.layers.SelectiveKernel(
        9, 8, kernel_size=[3, 5, 7], stride=2, split_input=True
    ),
    "SplitAttn": lambda: timm.layers.SplitAttn(8, 8, groups=2, norm_layer=nn.BatchNorm2d),
    "SplitAttn radix 1": lambda: timm.layers.SplitAttn(8, 8, radix=1, norm_layer=nn.BatchNorm2d),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_accelerated_layer_has_the_same_numbers_on_both_backends(
    name: str, backend: Backend, training: bool
) -> None:
    own = randomised(LAYERS[name]()).train(training)
    module = copy.deepcopy(own)
    assert [row.status for row in skt.accelerate(module)] == ["accelerated"]
    x = torch.randn(3, 9 if "M3" in name else 8, 6, 5, dtype=torch.float64)
    with use_backend(backend):
        actual = outcome(module, module, x)
    assert_same(actual, outcome(own, own, x), least=1.0)
