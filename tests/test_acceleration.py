"""accelerate: the modules of other packages keep their numbers, their state and their hooks."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sknet_triton as skt
from perf.peers import rebuilt
from sknet_triton import Backend, use_backend
from sknet_triton.acceleration import check, families, family, unregister_family
from sknet_triton.acceleration.swap import Accelerated
from tests.helpers import BACKENDS, EXACT, assert_same, outcome
from tests.plain_sknet import scramble

pytestmark = pytest.mark.usefixtures("on_the_device")


@dataclass(frozen=True)
class Peer:
    """A module, its family and the shape of its input; ``count`` inputs come as a list."""

    build: Callable[[], nn.Module]
    family: str
    shape: tuple[int, ...] = (3, 8, 6, 5)
    count: int = 0

    def inputs(self) -> Any:
        maps = [torch.randn(self.shape, dtype=torch.float64) for _ in range(self.count or 1)]
        return maps if self.count else maps[0]

    def module(self) -> nn.Module:
        return scramble(self.build()).double()


TIMM, SPLIT = "timm SelectiveKernel", "ResNeSt split attention"
PORTS = "SKConv of the common ports"
PEERS = {
    "timm": Peer(lambda: rebuilt.SelectiveKernel(8, 4, groups=2), TIMM),
    "timm split stride": Peer(
        lambda: rebuilt.SelectiveKernel(8, 6, stride=2, groups=2, split=True, width=5), TIMM
    ),
    "timm SplitAttn": Peer(lambda: rebuilt.SplitAttn(8, 4), SPLIT),
    "timm SplitAttn 4, 2": Peer(lambda: rebuilt.SplitAttn(8, 4, radix=4, groups=2), SPLIT),
    "timm SplitAttn 1": Peer(
        lambda: rebuilt.SplitAttn(8, 4, radix=1, groups=2), f"{SPLIT}, radix 1"
    ),
    "SplAtConv2d": Peer(lambda: rebuilt.SplitAttn(8, 4, one_relu=True), SPLIT),
    "port": Peer(lambda: rebuilt.SKConv(8, 4, groups=2), PORTS),
    "port M3": Peer(lambda: rebuilt.SKConv(8, 4, M=3, width=6), PORTS),
    "port heads": Peer(lambda: rebuilt.SKConvHeads(8, 4), PORTS),
    "port linear": Peer(lambda: rebuilt.SKConvHeads(8, 4, linear=True), PORTS),
    "pytorchcv": Peer(lambda: rebuilt.SKConvBlock(8, 4, groups=2), PORTS),
    "SKFF v1": Peer(lambda: rebuilt.SKFF(8), "MIRNet SKFF", count=3),
    "SKFF v2": Peer(lambda: rebuilt.SKFF(8, 2, leaky=True), "MIRNet SKFF", count=2),
    "SKFusion": Peer(lambda: rebuilt.SKFusion(8), "DehazeFormer SKFusion", count=2),
    "gUNet": Peer(lambda: rebuilt.SKFusion(8, inside=True), "DehazeFormer SKFusion", count=2),
    "SimCLRv2": Peer(lambda: rebuilt.SimCLRSelectiveKernel(8, 4), "SimCLRv2 SK convolution"),
    "CycleMLP": Peer(lambda: rebuilt.CycleMLP(8), "CycleMLP reweighting", (3, 6, 5, 8)),
    "ViP": Peer(
        lambda: rebuilt.WeightedPermuteMLP(8, 4), "Vision Permutator reweighting", (3, 4, 4, 8)
    ),
}

every_peer = pytest.mark.parametrize("name", PEERS)


@pytest.mark.parametrize(
    ("backend", "training"),
    [("reference", True), ("reference", False), ("triton", True)],
    ids=["reference-train", "reference-eval", "triton"],
)
@every_peer
def test_outputs_gradients_and_statistics_are_the_modules_own(
    name: str, backend: Backend, training: bool
) -> None:
    peer = PEERS[name]
    own = peer.module().train(training)
    module = copy.deepcopy(own)
    report = skt.accelerate(module)
    assert [(row.path, row.kind, row.status) for row in report] == [
        ("", peer.family, "accelerated")
    ]
    inputs = peer.inputs()
    with use_backend(backend):
        actual = outcome(module, module, inputs)
    assert_same(actual, outcome(own, own, inputs), least=1.0)


@every_peer
def test_state_dict_class_mode_and_parameters_stay_and_come_back(name: str) -> None:
    peer = PEERS[name]
    module = peer.module().eval()
    own, before, cls = copy.deepcopy(module), dict(module.state_dict()), type(module)
    skt.accelerate(module)
    assert isinstance(module, cls)
    assert type(module) is not cls
    assert not module.training
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)
    cls_forward = type(module).forward
    again = skt.accelerate(module)
    assert type(module).forward is cls_forward
    assert [(row.status, row.reason) for row in again] == [("accelerated", "before")]
    own.load_state_dict(module.state_dict(), strict=True)
    assert [row.status for row in skt.restore(module)] == ["restored"]
    assert type(module) is cls
    assert vars(module).keys() == vars(own).keys()
    assert len(skt.restore(module)) == 0


@every_peer
def test_copies_and_pickles_are_accelerated_and_apart(name: str) -> None:
    peer = PEERS[name]
    module = peer.module().eval()
    skt.accelerate(module)
    inputs = peer.inputs()
    expected = module(inputs)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert torch.equal(twin(inputs), expected)
        assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(
            p.data_ptr() for p in module.parameters()
        )
        inner = {id(m) for m in twin.modules()}
        assert all(id(silent) in inner for silent in cast(Accelerated, twin)._skt_silent)


@pytest.mark.parametrize("name", ["timm", "timm SplitAttn", "port", "pytorchcv", "SimCLRv2"])
def test_channels_last_is_kept(name: str) -> None:
    module = PEERS[name].module().eval()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types no such call
    x = PEERS[name].inputs().contiguous(memory_format=torch.channels_last)
    lost = module(x)
    assert lost.is_contiguous()
    skt.accelerate(module)
    for backend in BACKENDS:
        with use_backend(backend):
            out = module(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, lost, rtol=EXACT, atol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "SplAtConv2d", "SKFF v1"])
def test_compiled_before_or_after_it_is_one_graph(name: str, fresh_dynamo: None) -> None:
    own, inputs = PEERS[name].module(), PEERS[name].inputs()
    close = partial(torch.testing.assert_close, rtol=EXACT, atol=EXACT)
    module = copy.deepcopy(own)
    skt.accelerate(module)
    after = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(after(inputs), copy.deepcopy(own)(inputs))
    torch._dynamo.reset()
    counter = CompileCounter()
    before = cast(nn.Module, torch.compile(own.eval(), fullgraph=True, backend=counter))
    first = before(inputs)
    assert counter.frame_count == 1
    assert [row.path for row in skt.accelerate(before)] == ["_orig_mod"]
    close(before(inputs), first)
    assert counter.frame_count == 2
    skt.restore(before)
    close(before(inputs), first)


@pytest.mark.parametrize("name", ["timm", "timm SplitAttn", "pytorchcv"])
def test_an_exported_program_has_the_same_numbers(name: str) -> None:
    module = PEERS[name].module().eval()
    x = PEERS[name].inputs()
    expected = module(x)
    skt.accelerate(module)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=EXACT, atol=EXACT)


# Hooks: on what is called they fire; on what is not, the module's own forward comes back.
WATCHED = {
    "timm": ["attn", "attn.bn", "attn.fc_select", "paths.0", "paths.1.bn.act", "paths.1.conv"],
    "port": ["conv.0", "conv.1.1", "fc1", "fc1.2", "fc2", "global_pool", "softmax"],
    "timm SplitAttn": ["conv", "bn0", "fc1", "rsoftmax"],
    "SKFF v1": ["avg_pool", "conv_du.1", "fcs.2", "softmax"],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WATCHED)
def test_hooks_see_what_they_saw(name: str, backend: Backend) -> None:
    inputs = PEERS[name].inputs()
    for path in WATCHED[name]:
        module = PEERS[name].module().eval()
        seen: list[Tensor] = []
        hooked = module.get_submodule(path)
        hooked.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1].clone()))
        module(inputs)
        skt.accelerate(module)
        with use_backend(backend):
            module(inputs)
        assert len(seen) == 2, path
        torch.testing.assert_close(seen[1], seen[0], rtol=EXACT, atol=EXACT)


def test_the_check_calls_no_hook_and_touches_neither_gradients_nor_values() -> None:
    module, calls = PEERS["timm"].module(), list[None]()
    module.get_submodule("paths.0").register_forward_hook(lambda *_: calls.append(None))
    module(PEERS["timm"].inputs()).sum().backward()
    grads = {f"grad {name}": cast(Tensor, p.grad) for name, p in module.named_parameters()}
    before = copy.deepcopy({**module.state_dict(), **grads})
    assert len(skt.accelerate(module).paths("accelerated")) == len(calls) == 1
    assert_same({**module.state_dict(), **grads}, before, bound=0)


# What must be left, and why.


class Unknown(nn.Module):
    """Called as such modules are, made as none of them is."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mix(x)
        return out


class SKAttention(Unknown):
    pass


class SKConvWithSigmoid(rebuilt.SKConv):
    """A decoy: the same structure, and a sigmoid before the softmax."""

    def attention(self, wide: Tensor) -> Tensor:
        return super().attention(wide.sigmoid())


class TwoOutputs(rebuilt.SKConv):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return out, out


def test_the_report_of_a_network() -> None:
    report = skt.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    assert (len(report), str(report)) == (0, "no selective-kernel module found")
    model = nn.Sequential(
        rebuilt.SelectiveKernel(8, 8), nn.ReLU(), SKConvWithSigmoid(8, 4), Unknown()
    )
    report = skt.accelerate(model)
    assert report.paths("accelerated") == ["0"]
    assert report.paths("left") == ["2"]
    first, second, third = str(report).splitlines()
    assert (first, second) == ("1 accelerated, 1 left", f"accelerated  0  [{TIMM}]")
    assert third.startswith(f"left         2  [SKConvWithSigmoid]  {PORTS}: it")


def test_a_model_that_is_none_is_named() -> None:
    for function in (skt.accelerate, skt.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
            function("resnet")  # type: ignore[arg-type]  # on purpose


# A family of one's own.


class Blend(nn.Module):
    """Two given maps, blended by sigmoids that a linear layer makes of their sum over space."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 8)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        wide = self.gate((a + b).sum((2, 3))).view(-1, 2, 4)
        return self.scale * rebuilt.weighted(torch.stack([a, b], 1), wide.sigmoid())


def blend_family(**changes: Any) -> skt.Family:
    options: dict[str, Any] = {
        "name": "Blend",
        "recognises": lambda module: isinstance(module, Blend),
        "maps": lambda module, a, b: [a, b],
        "logits": lambda module, summed: module.gate(summed).view(-1, 2, 4),
        "example": lambda module: tuple(torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)),
        "activation": "sigmoid",
        "reduction": "sum",
        "finish": lambda module, out: module.scale * out,
    }
    return skt.Family(**{**options, **changes})


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "_known", dict(family._known))
    module, (a, b) = Blend().double(), torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    expected = module(a, b)
    skt.register_family(blend_family())
    assert families()[0].name == "Blend"
    with pytest.raises(ValueError, match="the name 'Blend' is taken"):
        skt.register_family(blend_family())
    assert skt.accelerate(module).paths("accelerated") == [""]
    for out in (module(a, b), module(a, b=b)):
        torch.testing.assert_close(out, expected, rtol=EXACT, atol=EXACT)
    unregister_family("Blend")
    with pytest.raises(ValueError, match=r"name: expected one of \[\], got 'Blend'"):
        unregister_family("Blend")
    with pytest.raises(TypeError, match="family: expected a Family, got str"):
        skt.register_family("Blend")  # type: ignore[arg-type]  # on purpose


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "formula": ({"activation": "softmax"}, "its output differs by"),
    "shape": ({"finish": lambda module, out: out[:, :2]}, "its output has shape (2, 4, 3, 3), not"),
    "error": ({"logits": lambda module, summed: module.head(summed)}, "Blend does not fit it"),
    "example": ({"example": lambda module: (torch.zeros(1),)}, "its own forward fails on"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_family_swaps_nothing(name: str) -> None:
    changes, reason = WRONG[name]
    module = Blend()
    checked = check.check(module, blend_family(**changes))
    assert checked.reason is not None
    assert reason in checked.reason
    assert type(module) is Blend
