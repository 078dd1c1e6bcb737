"""What a case computes: the module, its inputs, and the bytes that its mathematics moves.

Every provider of a case gets the same parameters and the same inputs, both from the seed. A new
workload is an entry in `WORKLOADS`, a family of modules one in `perf.peers.families`.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sknet_triton as skt
from perf.peers import baseline, digits, families
from perf.peers.families import FAMILIES
from perf.rows.schema import Case, DType, Layout, Level, Mode

Net = Callable[..., Tensor]
Source = Literal["plain", "port", "ours", "timm-sk", "timm-se"]

DTYPE_OF = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "autocast": torch.float32,
}
_COMPUTED_IN = {**DTYPE_OF, "tf32": torch.float16, "autocast": torch.bfloat16}  # as many digits
# Half the spacing of the numbers at one.
ROUNDOFF_OF = {name: torch.finfo(dtype).eps / 2 for name, dtype in _COMPUTED_IN.items()}

# As `perf.static` calls a layout.
LAYOUT_OF = {"nchw": "contiguous", "channels_last": "channels_last"}

NO_STAGE = 0
DIGITS_RESOLUTION = 8

CALIBRATION_BATCH = 4
# Images that a network is judged on: enough for a batch norm to average over, few enough for
# float64 (650 MiB an image through SKNet-50 at 320 pixels, gradients included).
JUDGED_IMAGES = 8

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _map(case: Case, generator: torch.Generator) -> Tensor:
    return _normal(generator, case.B, case.C, case.H, case.W)


def _features(case: Case, generator: torch.Generator) -> Tensor:
    # A mean in each channel, as a network has: else pooling leaves nothing.
    means = _normal(generator, case.C, 1, 1)
    return _map(case, generator) + means


def _digit_images(case: Case, generator: torch.Generator) -> Tensor:
    (images, _), _ = digits.load()
    rows = torch.randint(len(images), (case.B,), generator=generator, device=generator.device)
    return images.to(generator.device)[rows]


# Branch tensors that the mathematics of a mode reads or writes: (k, n) for k * M + n.
Moved = Mapping[Mode, tuple[int, int]]
# Reading M branches. The backward pass needs none, because the gradient of an average is a
# broadcast, which a view can express; a provider that writes it out moves more than is needed.
_FUSE: Moved = {"infer": (1, 0), "train": (1, 0), "bwd": (0, 0)}
# Reading M branches and writing one. The backward pass reads dout and the branches for dlogits and
# dx in one go, and writes M gradients.
_SELECT: Moved = {"infer": (1, 1), "train": (3, 2), "bwd": (2, 1)}
# Training reads the branches for their statistics, to fuse and to select, and writes V; the
# backward pass reads dout and the branches twice and writes M gradients. Inference needs no
# statistics.
_FUSE_SELECT: Moved = {"infer": (2, 1), "train": (6, 3), "bwd": (3, 2)}
# Reading the branches to fuse and to select, and writing one. The backward pass reads dout and the
# branches for dlogits, then dout again, and writes M gradients.
_FUSION: Moved = {"infer": (2, 1), "train": (4, 3), "bwd": (2, 2)}


@dataclass(frozen=True)
class Workload:
    """How to build one workload."""

    level: Level
    ours: Callable[[Case], nn.Module]
    # Builds the baseline from ours, with the same parameters.
    plain: Callable[[nn.Module], nn.Module] = baseline.with_plain_convs
    draw: Callable[[Case, torch.Generator], Tensor] = _map  # an input in float32
    given: bool = False  # whether it takes M of them, not one
    logits: bool = False  # whether it takes logits before them
    input_grads: bool = True  # whether the backward pass goes down to the inputs
    moved: Moved | None = None  # none where convolutions move more than the stages do
    batch_norm: bool = True  # whether training takes statistics of one vector an image, as fc1's

    def inputs(self, case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draws the inputs of a case in float32."""
        logits = [_normal(generator, case.B, case.M, case.C)] if self.logits else []
        drawn = [self.draw(case, generator) for _ in range(case.M if self.given else 1)]
        return (*logits, *drawn)


def _network(build: Callable[..., nn.Module]) -> Workload:
    return Workload("model", lambda case: build(M=case.M), input_grads=False)


WORKLOADS = {
    "sk_fuse": Workload(
        "op",
        lambda case: baseline.Function(baseline.sk_fuse),
        lambda ours: baseline.Function(baseline.plain_fuse),
        given=True,
        moved=_FUSE,
        batch_norm=False,
    ),
    "sk_select": Workload(
        "op",
        lambda case: baseline.Function(baseline.sk_select),
        lambda ours: baseline.Function(baseline.plain_select),
        given=True,
        logits=True,
        moved=_SELECT,
        batch_norm=False,
    ),
    "sk_fuse_select": Workload(
        "op",
        lambda case: baseline.OursFuseSelect(case.C, case.M),
        baseline.PlainFuseSelect,
        given=True,
        moved=_FUSE_SELECT,
    ),
    "sk_conv": Workload("layer", lambda case: skt.SKConv(case.C, case.C, M=case.M)),
    "sk_unit": Workload(
        "layer",
        lambda case: skt.SKUnit(2 * case.C, case.C, M=case.M),
        draw=lambda case, generator: _map(replace(case, C=2 * case.C), generator),
    ),
    **{
        name: Workload(
            "family",
            families.accelerated,
            families.original,
            draw=_features,
            given=family.given,
            moved=_FUSION if family.given else None,
            batch_norm=family.batch_norm,
        )
        for name, family in FAMILIES.items()
    },
    "sknet26": _network(skt.sknet26),
    "sknet50": _network(skt.sknet50),
    "sknet101": _network(skt.sknet101),
    "digits": Workload(
        "workload", lambda case: digits.digits_net(case.M), draw=_digit_images, input_grads=False
    ),
}

# The kernel that makes a pass, and what it moves as above; a copy is PyTorch's own.
PASSES: dict[str, tuple[str, tuple[int, int]]] = {
    "copy": ("", (0, 2)),
    "moments": ("sk_moments", (1, 0)),
    "fuse": ("sk_fuse", (1, 0)),
    "select": ("sk_select_fwd", (1, 1)),
    "sums": ("sk_fuse_select_sums", (1, 1)),
    "dx": ("sk_fuse_select_dx", (2, 1)),
}

LEVEL_OF: dict[str, Level] = {
    **dict.fromkeys(PASSES, "pass"),
    **{name: workload.level for name, workload in WORKLOADS.items()},
}


def make_case(
    workload: str,
    mode: Mode,
    dtype: DType = "fp32",
    layout: Layout = "nchw",
    M: int = 2,
    batch: int = 8,
    resolution: int = 224,
    stage: int = 1,
) -> Case:
    """Returns the case with the shape that ``workload`` has at ``resolution``.

    Only passes, ops and layers have a stage; a family has its own M, the digits their own size.
    """
    level = LEVEL_OF[workload]
    if level in ("pass", "op", "layer"):
        C, side = stage_shape(stage, resolution)
        return Case(
            level, workload, mode, dtype, layout, M, batch, resolution, stage, C, side, side
        )
    C, side = 3, resolution
    if level == "family":
        family = FAMILIES[workload]
        M, C, side = family.M, family.C, -(-resolution // family.reduction)
    if level == "workload":
        C, side, resolution = 1, DIGITS_RESOLUTION, DIGITS_RESOLUTION
    return Case(level, workload, mode, dtype, layout, M, batch, resolution, NO_STAGE, C, side, side)


def stage_shape(stage: int, resolution: int) -> tuple[int, int]:
    """Returns channels and side of an SKNet stage's maps: 128 and 56 in stage 1 at 224."""
    # Every strided layer rounds up, so that the whole way down does.
    return 64 * 2**stage, -(-resolution // 2 ** (stage + 1))


def unsupported(case: Case, device: torch.device) -> str | None:
    """Tells why no provider can carry out ``case`` on ``device``; None where one can."""
    plain = case.mode == "infer" and case.dtype in ("fp32", "bf16", "fp16")
    if case.level == "pass" and not plain:
        return "a pass alone is mode infer in fp32, bf16 or fp16"
    if case.dtype == "tf32" and device.type != "cuda":
        return "tf32 needs an NVIDIA GPU"
    if case.dtype == "autocast" and case.level == "op":
        return "autocast concerns layers: an op sees the dtype that its caller chose"
    if case.mode == "bwd" and case.level not in ("op", "layer", "family"):
        return "the backward pass alone is measured for ops, layers and families"
    if case.differentiates and WORKLOADS[case.workload].batch_norm and case.B == 1:
        return "training needs a batch of at least 2, for the batch norm of fc1"
    if case.level == "workload" and (case.mode, case.dtype) != ("train", "fp32"):
        return "the digits are trained, in fp32"
    if case.level == "workload" and importlib.util.find_spec("sklearn") is None:
        return "scikit-learn is not installed"
    if case.workload == "vision_permutator" and case.C % case.H:
        return f"Vision Permutator cuts {case.C} channels into one segment a row, not into {case.H}"
    return None


def parameters(case: Case, source: Source, seed: int) -> nn.Module:
    """Returns the module of ``case`` in float32 on the CPU, with parameters that all matter.

    Affine batch norms, attention logits of order one and running statistics of real activations:
    a provider that leaves one of them out cannot agree with the oracle.
    """
    workload = WORKLOADS[case.workload]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        timm = source in ("timm-sk", "timm-se")
        module = families.timm_build(source, case) if timm else workload.ours(case)
        side = DIGITS_RESOLUTION if case.level == "workload" else min(case.H, 64)
        small = replace(case, B=CALIBRATION_BATCH, H=side, W=side)
        _randomise(module, workload.inputs(small, torch.Generator().manual_seed(seed)))
    if source == "port":
        return baseline.with_plain_convs(module, baseline.PortSKConv)
    return workload.plain(module) if source == "plain" else module


def inputs(case: Case, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """Returns the inputs of ``case``; those of a network repeat those of its `judged` case."""
    generator = torch.Generator(device).manual_seed(seed + 1)
    drawn = WORKLOADS[case.workload].inputs(judged(case), generator)
    return tuple(laid_out(repeated(x.to(DTYPE_OF[case.dtype]), case.B), case) for x in drawn)


def judged(case: Case) -> Case:
    """Returns the case that float64 carries out: a network on a part of the batch.

    A batch that repeats some images has their outputs, their batch statistics and a multiple of
    their gradients. The part is the largest divisor of the batch up to `JUDGED_IMAGES`; a batch
    without one is judged whole, and so are ops, layers and families.
    """
    if case.level != "model":
        return case
    divisors = [b for b in range(2, JUDGED_IMAGES + 1) if case.B % b == 0]
    return replace(case, B=max(divisors, default=case.B))


def repeated(x: Tensor, batch: int) -> Tensor:
    """Returns ``x``, repeated along its first dimension up to ``batch``."""
    return x if len(x) == batch else x.repeat(batch // len(x), *[1] * (x.dim() - 1))


def laid_out(x: Tensor, case: Case) -> Tensor:
    """Returns ``x`` in the case's layout, which concerns tensors [B, C, H, W] only."""
    if case.layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def place_module(module: nn.Module, case: Case, device: torch.device) -> nn.Module:
    """Casts ``module``, moves it, lays it out and sets it to train or evaluate, in place."""
    module.to(device, DTYPE_OF[case.dtype]).train(case.differentiates)
    if case.layout == "channels_last":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def bytes_needed(case: Case) -> int | None:
    """Returns the bytes that the mathematics of ``case`` has to move, where they are known."""
    if case.level == "pass":
        k, n = PASSES[case.workload][1]
    elif (moved := WORKLOADS[case.workload].moved) is not None:
        k, n = moved[case.mode]
    else:
        return None
    elements = (k * case.M + n) * case.B * case.C * case.H * case.W
    return elements * DTYPE_OF[case.dtype].itemsize


def pass_of(case: Case, device: torch.device) -> Callable[[], object]:
    """Returns what carries a pass out on new tensors: a kernel as it is launched, or a copy."""
    shape, dtype = (case.B, case.C, case.H * case.W), DTYPE_OF[case.dtype]
    kernel = PASSES[case.workload][0]
    if not kernel:
        source = torch.ones(shape, dtype=dtype, device=device)
        return partial(torch.empty_like(source).copy_, source)
    # Here, since it imports triton, which only a kernel needs.
    from perf.static.specialisations import Setting, streaming_launch

    launch = streaming_launch(Setting(case.M, LAYOUT_OF[case.layout], dtype, shape, device), kernel)
    for x in tree_leaves(dict(launch.arguments)):
        if isinstance(x, Tensor):
            x.uniform_(0.5, 1.5)
    return launch.run


def _randomise(module: nn.Module, images: tuple[Tensor, ...]) -> None:
    usual = {m: m.momentum for m in module.modules() if isinstance(m, _BATCH_NORMS)}
    for norm in usual:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = 1.0
    for child in module.modules():
        if isinstance(child, skt.SKConv):
            nn.init.kaiming_normal_(child.fc2.weight)
    if usual:
        with torch.no_grad():
            module.train()(*images)
    for norm, momentum in usual.items():
        norm.momentum = momentum
