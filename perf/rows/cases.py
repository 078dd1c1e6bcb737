"""What is measured: one case is one computation at one size, dtype, layout and mode."""

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["pass", "op", "layer", "family", "model", "workload"]
Mode = Literal["infer", "train", "bwd"]
DType = Literal["fp32", "tf32", "bf16", "fp16", "autocast"]
Layout = Literal["nchw", "channels_last"]

LEVELS: tuple[Level, ...] = get_args(Level)
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES: tuple[DType, ...] = get_args(DType)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
STAGES = (1, 2, 3, 4)

NO_STAGE = 0
DIGITS_RESOLUTION = 8


@dataclass(frozen=True)
class FamilyMap:
    """The map [B, C, H, W] that a family of modules sees in the network it comes from.

    Attributes:
        C: channels.
        reduction: pixels of the image for one position of the map, along a side.
        M: branches.
    """

    C: int
    reduction: int
    M: int


# What `accelerate` knows, in the first stage of SKNet-50, ResNeSt-50, SimCLRv2's ResNet-50,
# CycleMLP-B1 and ViP-Small/7, and at full resolution in MIRNet and DehazeFormer-B.
FAMILY_MAPS = {
    "timm_selective_kernel": FamilyMap(C=128, reduction=4, M=2),
    "port_sk_conv": FamilyMap(C=128, reduction=4, M=2),
    "pytorchcv_sk_conv": FamilyMap(C=128, reduction=4, M=2),
    "resnest_split_attention": FamilyMap(C=64, reduction=4, M=2),
    "simclr_sk_conv": FamilyMap(C=64, reduction=4, M=2),
    "cycle_mlp": FamilyMap(C=64, reduction=4, M=3),
    "vision_permutator": FamilyMap(C=192, reduction=7, M=3),
    "mirnet_skff": FamilyMap(C=64, reduction=1, M=3),
    "dehazeformer_sk_fusion": FamilyMap(C=24, reduction=1, M=2),
}

LEVEL_OF: dict[str, Level] = {
    "copy": "pass",
    "moments": "pass",
    "fuse": "pass",
    "select": "pass",
    "sums": "pass",
    "dx": "pass",
    "sk_fuse": "op",
    "sk_select": "op",
    "sk_fuse_select": "op",
    "sk_conv": "layer",
    "sk_unit": "layer",
    **dict.fromkeys(FAMILY_MAPS, "family"),
    "sknet26": "model",
    "sknet50": "model",
    "sknet101": "model",
    "digits": "workload",
}


@dataclass(frozen=True)
class Case:
    """One computation. The fields are the key columns of the CSV, in this order.

    ``resolution`` is that of the image; a pass, an op or a layer sees the map [B, C, H, W] that an
    SKNet has in ``stage`` at that resolution, a family the map that it has in its own network.
    ``stage`` is 0 there and for networks, whose C, H, W are those of their input.
    Mode infer is the forward pass without gradients, train the forward and the backward pass, bwd
    the backward pass of an op, a layer or a family alone; the digits workload trains to the end,
    optimiser included.
    """

    level: Level
    workload: str
    mode: Mode
    dtype: DType
    layout: Layout
    M: int
    B: int
    resolution: int
    stage: int
    C: int
    H: int
    W: int

    @property
    def differentiates(self) -> bool:
        """Whether a backward pass belongs to it."""
        return self.mode != "infer"

    @property
    def label(self) -> str:
        """The case in one short line."""
        stage = f" stage {self.stage}" if self.stage else ""
        return (
            f"{self.workload}{stage} {self.mode} {self.dtype} {self.layout} "
            f"M={self.M} B={self.B} {self.resolution}px"
        )


def make_case(
    workload: str,
    mode: Mode,
    *,
    dtype: DType = "fp32",
    layout: Layout = "nchw",
    M: int = 2,
    batch: int = 8,
    resolution: int = 224,
    stage: int = 1,
) -> Case:
    """Returns the case with the shape that ``workload`` has at ``resolution``.

    Only passes, ops and layers have a stage. A family has its own M, the digits their own
    resolution.
    """
    level = LEVEL_OF[workload]
    if level in ("pass", "op", "layer"):
        channels, size = stage_shape(stage, resolution)
    elif level == "family":
        stage, own = NO_STAGE, FAMILY_MAPS[workload]
        M, channels, size = own.M, own.C, -(-resolution // own.reduction)
    else:
        stage = NO_STAGE
        resolution = DIGITS_RESOLUTION if level == "workload" else resolution
        channels, size = (1 if level == "workload" else 3), resolution
    return Case(
        level, workload, mode, dtype, layout, M, batch, resolution, stage, channels, size, size
    )


def stage_shape(stage: int, resolution: int) -> tuple[int, int]:
    """Returns channels and side of the maps of an SKNet stage: 128 and 56 in stage 1 at 224.

    Every strided layer rounds up, so that the whole way down does.
    """
    reduction = 2 ** (stage + 1)
    return 64 * 2**stage, -(-resolution // reduction)
