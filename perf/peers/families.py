"""Other packages' modules: the families that `accelerate` knows, and timm's networks as they are.

An entry in `FAMILIES` is all that the harness needs to know of a family; its module is in
`perf.peers.rebuilt`. Here each takes maps [B, C, H, W] and returns one, so that a case's layout
means the same for all of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import sknet_triton as skt
from perf.peers import rebuilt
from perf.rows.schema import Case

_GROUPS = 32


class Adapted(nn.Module):
    """A module that is called in another way."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class OnList(Adapted):
    """A module that takes its M branches [B, C, H, W] in a list."""

    def forward(self, *branches: Tensor) -> Tensor:
        return self.module(list(branches))


class OnChannelsLast(Adapted):
    """A module on maps [B, H, W, C], called as in its network: on a view of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Family:
    """A family of modules in the network that it comes from."""

    build: Callable[[Case], nn.Module]  # before `accelerate`
    C: int
    reduction: int = 4  # pixels of the image for one position of a map, along a side
    M: int = 2
    given: bool = False  # whether it takes M maps, not one
    batch_norm: bool = True  # whether training takes statistics of one vector an image
    batch: int = 4  # images in the preset ``family``, and their resolution
    resolution: int = 224
    # Whether its compiled graph is that of another family, so that the preset leaves compiling to
    # flags.
    alike: bool = False


# Maps as in the first stage of SKNet-50, ResNeSt-50, SimCLRv2's ResNet-50, CycleMLP-B1 and
# ViP-Small/7, and at full resolution in MIRNet and DehazeFormer-B.
FAMILIES = {
    "timm_selective_kernel": Family(
        lambda case: rebuilt.SelectiveKernel(case.C, case.C, groups=_GROUPS), C=128
    ),
    "port_sk_conv": Family(
        lambda case: rebuilt.SKConv(case.C, case.C, groups=_GROUPS), C=128, alike=True
    ),
    "pytorchcv_sk_conv": Family(
        lambda case: rebuilt.SKConvBlock(case.C, case.C, groups=_GROUPS), C=128, alike=True
    ),
    "resnest_split_attention": Family(lambda case: rebuilt.SplitAttn(case.C, case.C), C=64),
    "simclr_sk_conv": Family(lambda case: rebuilt.SimCLRSelectiveKernel(case.C, case.C), C=64),
    "cycle_mlp": Family(
        lambda case: OnChannelsLast(rebuilt.CycleMLP(case.C)), C=64, M=3, batch_norm=False
    ),
    "vision_permutator": Family(
        lambda case: OnChannelsLast(rebuilt.WeightedPermuteMLP(case.C, case.H)),
        C=192,
        reduction=7,
        M=3,
        batch_norm=False,
    ),
    "mirnet_skff": Family(
        lambda case: OnList(rebuilt.SKFF(case.C, case.M)),
        C=64,
        reduction=1,
        M=3,
        given=True,
        batch_norm=False,
        batch=2,
        resolution=128,
    ),
    "dehazeformer_sk_fusion": Family(
        lambda case: OnList(rebuilt.SKFusion(case.C, case.M)),
        C=24,
        reduction=1,
        given=True,
        batch_norm=False,
        batch=2,
        resolution=256,
    ),
}


def accelerated(case: Case) -> nn.Module:
    """Returns the module of ``case`` after `accelerate`; ValueError where that left it."""
    module = FAMILIES[case.workload].build(case)
    report = skt.accelerate(module)
    if len(report.paths("accelerated")) != 1 or report.paths("left"):
        raise ValueError(f"{case.workload}: expected one accelerated module, got: {report}")
    return module


def original(module: nn.Module) -> nn.Module:
    """Returns a copy of what `accelerated` made that computes as its own package does."""
    twin = copy.deepcopy(module)
    skt.restore(twin)
    return twin


# timm's networks and layers, where it can be imported. They compute something else than ours, with
# their own parameters; each is checked against its own float64 run.

_COUNTERPARTS = {
    ("timm-sk", "sknet50"): "skresnext50_32x4d",
    ("timm-se", "sknet50"): "seresnext50_32x4d",
    ("timm-sk", "sk_conv"): "",
}


def timm_unavailable(source: str, case: Case) -> str | None:
    """Tells why ``source`` cannot carry out ``case``; None where it can."""
    if case.M != 2 or (source, case.workload) not in _COUNTERPARTS:
        return f"{source} has no counterpart of {case.workload} with M={case.M}"
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        # A torchvision that was built for another torch fails with a RuntimeError.
        return f"timm cannot be imported: {error}"
    return None


def timm_build(source: str, case: Case) -> nn.Module:
    """Returns timm's counterpart of the workload, with timm's own initialisation."""
    import timm
    from timm.layers.selective_kernel import SelectiveKernel

    if case.workload == "sk_conv":
        return SelectiveKernel(case.C, case.C, kernel_size=[3, 5], groups=32, split_input=False)
    return timm.create_model(_COUNTERPARTS[source, case.workload])
